"""Scaling of advantages by the range of returns, as in DreamerV3 (Hafner et al., 2023)."""

from flax import struct
import jax
import jax.numpy as jnp

LOW, HIGH = 5.0, 95.0  # Percentiles of the returns between which their range lies.
DECAY = 0.99  # Of the moving averages, per update.
MIN_RANGE = 1.0  # Smaller ranges are not divided by: sparse rewards keep their scale.


@struct.dataclass
class ReturnRange:
    """Moving average of the range of the returns.

    Attributes:
      weight: Total weight of the batches so far, 1 - DECAY^n after n batches, float32 [].
      value: Distance of the 95th from the 5th percentile of the returns, float32 [].
    """

    weight: jax.Array
    value: jax.Array


def init() -> ReturnRange:
    """Returns the range of no returns, 0."""
    return ReturnRange(jnp.zeros(()), jnp.zeros(()))


def update(state: ReturnRange, returns: jax.Array, mask: jax.Array) -> ReturnRange:
    """Returns the range with a batch of returns; the first batch alone determines it.

    Args:
      state: Range of the batches before.
      returns: Returns, float32 [...].
      mask: 1 for returns that count, float32 [...]; without any, or with one that is not finite,
        the range stays.
    """
    values = jnp.where(mask > 0, returns, jnp.nan)
    low, high = jnp.nanpercentile(values, jnp.array([LOW, HIGH]))
    gain = jnp.float32(1 - DECAY)
    weight = (1 - gain) * state.weight + gain
    new = ReturnRange(weight, state.value + gain / weight * (high - low - state.value))
    usable = jnp.all(jnp.where(mask > 0, jnp.isfinite(returns), True)) & (jnp.sum(mask) > 0)
    return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, state)


def scale(state: ReturnRange, advantage: jax.Array) -> jax.Array:
    """Returns advantages divided by max(1, range), float32 [...]."""
    return advantage / jnp.maximum(state.value, MIN_RANGE)
