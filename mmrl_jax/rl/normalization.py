"""Running mean and variance of a vector, from sums and counts (Chan et al., 1979)."""

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class RunningStatistics:
    """Statistics of all rows so far.

    Attributes:
      count: Number of rows, float32 [].
      mean: Mean of the rows, float32 [P].
      m2: Sum of the squared differences from the mean, float32 [P].
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array


def init(size: int) -> RunningStatistics:
    """Returns statistics of no rows, with which `normalize` is the identity."""
    return RunningStatistics(jnp.zeros(()), jnp.zeros(size), jnp.zeros(size))


def update(statistics: RunningStatistics, x: jax.Array, mask: jax.Array) -> RunningStatistics:
    """Adds the rows x float32 [..., P] where mask [...] is 1."""
    weight = mask[..., None]
    axes = tuple(range(x.ndim - 1))
    count = jnp.sum(mask)
    x = jnp.where(weight > 0, x, 0.0)
    mean = jnp.sum(x * weight, axes) / jnp.maximum(count, 1.0)
    m2 = jnp.sum(weight * (x - mean) ** 2, axes)
    total = jnp.maximum(statistics.count + count, 1.0)
    delta = mean - statistics.mean
    return RunningStatistics(
        count=statistics.count + count,
        mean=statistics.mean + delta * count / total,
        m2=statistics.m2 + m2 + delta**2 * statistics.count * count / total,
    )


def normalize(statistics: RunningStatistics, x: jax.Array) -> jax.Array:
    """Returns (x - mean) / std of x [..., P], clipped to [-10, 10]; std is at least 1e-3."""
    variance = statistics.m2 / jnp.maximum(statistics.count, 1.0)
    std = jnp.where(statistics.count > 0, jnp.maximum(jnp.sqrt(variance), 1e-3), 1.0)
    return jnp.clip((x - statistics.mean) / std, -10.0, 10.0)
