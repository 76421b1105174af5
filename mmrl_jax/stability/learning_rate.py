"""A factor of the learning rate that is part of the optimizer state.

The factor can be lowered between two updates without compiling the update again, or follow the KL
divergence of the policy within an update, and a checkpoint restores it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import POSITIVE, option

# As in Brax and rsl_rl.
_STEP = 1.5  # Factor of one change of the learning rate.
_TOLERANCE = 2.0  # Largest ratio of the measured KL divergence and the desired one, or its inverse.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveKLOptions:
    """The options of a learning rate that follows the KL divergence of the policy."""

    desired_kl: float | None = option(
        None,
        "KL divergence from the policy that acted, usually 0.01: each optimizer step divides the "
        "learning rate by 1.5 where its minibatch has more than twice as much, and multiplies it "
        "by 1.5 where it has less than half; None for the learning rate of the schedule.",
        POSITIVE,
    )
    min_learning_rate: float = option(1e-5, "Smallest learning rate with a desired_kl.", POSITIVE)
    max_learning_rate: float = option(1e-2, "Largest learning rate with a desired_kl.", POSITIVE)


class LearningRateScale(NamedTuple):
    """State of `scale_by_state` and of `scale_by_kl`.

    Attributes:
      scale: Factor of the learning rate, float32 [].
    """

    scale: jax.Array


def scale_by_state() -> optax.GradientTransformation:
    """Returns a transformation that multiplies updates by the factor in its state, at first 1.

    It is the last one of an optimizer, whose updates are proportional to the learning rate. A
    factor of 1 leaves them bitwise as they are.
    """

    def init(params: optax.Params) -> LearningRateScale:
        del params
        return LearningRateScale(jnp.ones((), jnp.float32))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LearningRateScale]:
        del params
        assert isinstance(state, LearningRateScale)
        return jax.tree.map(lambda x: x * state.scale.astype(x.dtype), updates), state

    return optax.GradientTransformation(init, update)


_applied = scale_by_state()


def scale_by_kl(
    *, desired_kl: float, min_scale: float, max_scale: float
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose factor of the learning rate follows a KL divergence.

    As in Brax and rsl_rl, the factor is changed before it is applied:

      scale / 1.5  if kl > 2 * desired_kl
      scale * 1.5  if 0 < kl < desired_kl / 2
      scale        otherwise, also if kl is NaN

    and is then clipped to [min_scale, max_scale]. A step that is skipped, because it is not finite
    or a spike, changes no factor, whatever its divergence. The transformation is the last one of an
    optimizer, whose updates are proportional to the learning rate. Its state is a
    `LearningRateScale`, at first 1.

    Args:
      desired_kl: KL divergence in nats that is aimed at.
      min_scale: Smallest factor, at most 1.
      max_scale: Largest factor, at least 1.

    Returns:
      A transformation whose `update` needs a further keyword argument: `kl`, the KL divergence of
      the current policy from the one that acted, float32 []. It is 0 where it says nothing, because
      no step was taken since.
    """

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        kl: jax.Array,
        **extra: Any,
    ) -> tuple[optax.Updates, LearningRateScale]:
        del extra
        assert isinstance(state, LearningRateScale)
        high = kl > _TOLERANCE * desired_kl
        low = (kl > 0) & (kl < desired_kl / _TOLERANCE)
        scale = state.scale * jnp.where(high, 1 / _STEP, jnp.where(low, _STEP, 1.0))
        state = LearningRateScale(jnp.clip(scale, min_scale, max_scale))
        return _applied.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(_applied.init, update)


def lower(opt_state: Any, factor: float) -> Any:
    """Returns an optimizer state whose factor of the learning rate is multiplied by `factor`."""
    return jax.tree.map(
        lambda x: LearningRateScale(x.scale * factor) if _is_scale(x) else x,
        opt_state,
        is_leaf=_is_scale,
    )


def scale_of(opt_state: Any) -> jax.Array | None:
    """Returns the factor of the learning rate, float32 []; None if the optimizer has none."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_scale)
    return next((x.scale for x in leaves if _is_scale(x)), None)


def _is_scale(node: Any) -> bool:
    return isinstance(node, LearningRateScale)
