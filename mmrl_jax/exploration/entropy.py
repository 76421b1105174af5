"""The entropy bonus whose coefficient follows a target entropy."""

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class EntropyBonus:
    """State of the coefficient of an entropy bonus.

    Attributes:
      coef: Coefficient that moves up and down, float32 [].
      applied: Coefficient of the next update, float32 []; 0 while the entropy is above its target.
    """

    coef: jax.Array
    applied: jax.Array


def init(coef: float) -> EntropyBonus:
    """Returns the state before the first update, in which the bonus is not applied."""
    return EntropyBonus(jnp.float32(coef), jnp.zeros(()))


def adapt(
    bonus: EntropyBonus, entropy: jax.Array, *, target: float, step: float, maximum: float
) -> EntropyBonus:
    """Adapts the coefficient after an update (He et al., 2025, Skywork-OR1, arXiv 2505.22312, 4.3).

    The coefficient rises by `step` after an update with an entropy of at most `target`, and falls
    by it otherwise. The bonus is applied only while the entropy is at or below the target.

    Args:
      bonus: State before the update.
      entropy: Mean entropy in the update, float32 []; NaN for an update without an optimizer step,
        which changes nothing.
      target: Entropy that is held, in the unit of `entropy`.
      step: Change of the coefficient in an update, > 0.
      maximum: Largest coefficient; the smallest one is 0.
    """
    is_low = entropy <= target
    moved = jnp.clip(bonus.coef + jnp.where(is_low, step, -step), 0.0, maximum)
    adapted = EntropyBonus(moved, jnp.where(is_low, moved, 0.0))
    return jax.tree.map(lambda new, old: jnp.where(jnp.isnan(entropy), old, new), adapted, bonus)
