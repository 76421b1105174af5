"""PopArt: value targets of unit scale, and a last layer whose outputs are kept.

(van Hasselt et al., 2016, arXiv 1602.07714; Hessel et al., 2019, arXiv 1809.04474.) A value
v = scale * n + shift is learned by its normalized form n, whose targets have mean 0 and standard
deviation 1. When the statistics move, the last layer is changed so that all values v stay.
"""

from flax import struct
import jax
import jax.numpy as jnp

from mmrl_jax.rl.losses import masked_mean

# Where targets are nearly equal, as before the first of rare rewards, the errors of the value are
# far above their spread, and the gradient grows by the inverse of the scale.
_MIN_SCALE = 1e-2


@struct.dataclass
class TargetStatistics:
    """Moving averages of mean and variance of the value targets.

    Attributes:
      weight: Total weight of the batches so far, 1 - decay^n after n batches, float32 [].
      mean: Mean of the targets, float32 [].
      variance: Variance of the targets, float32 [].
    """

    weight: jax.Array
    mean: jax.Array
    variance: jax.Array

    @property
    def scale(self) -> jax.Array:
        """Standard deviation of the targets, at least 0.01, float32 []."""
        return jnp.maximum(jnp.sqrt(self.variance), _MIN_SCALE)


def init() -> TargetStatistics:
    """Returns statistics of no targets, with mean 0 and scale 1."""
    return TargetStatistics(jnp.zeros(()), jnp.zeros(()), jnp.ones(()))


def update(
    statistics: TargetStatistics, target: jax.Array, mask: jax.Array, decay: float
) -> TargetStatistics:
    """Returns statistics that include a batch of targets.

    The averages are those of an exponential moving average without a bias to its start: the first
    batch alone determines the statistics after it.

    Args:
      statistics: Statistics of the batches before.
      target: Value targets, float32 [...].
      mask: 1 for targets that count, float32 [...]; without any, or with one that is not finite,
        the statistics stay.
      decay: Factor of the weight of the batches before, in [0, 1).
    """
    mean = masked_mean(target, mask)
    variance = masked_mean((target - mean) ** 2, mask)
    gain = jnp.float32(1 - decay)
    weight = (1 - gain) * statistics.weight + gain
    step = gain / weight  # Of the first batch it is exactly 1.
    difference = mean - statistics.mean
    # The variance of a mixture of two distributions, of which the new one has the weight `step`.
    spread = (1 - step) * (statistics.variance + step * difference**2) + step * variance
    new = TargetStatistics(weight, statistics.mean + step * difference, spread)
    usable = (jnp.sum(mask) > 0) & jnp.isfinite(new.mean) & jnp.isfinite(new.variance)
    return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, statistics)


def normalized(statistics: TargetStatistics, value: jax.Array) -> jax.Array:
    """Returns the normalized form of values, float32 [...]."""
    return (value - statistics.mean) / statistics.scale


def normalized_layer(
    statistics: TargetStatistics, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the linear layer whose outputs are the normalized form of those of another one.

    Args:
      statistics: Statistics of the targets.
      kernel: Kernel of the layer of values, float32 [D, 1].
      bias: Its bias, float32 [1].
    """
    return kernel / statistics.scale, (bias - statistics.mean) / statistics.scale


def value_layer(
    statistics: TargetStatistics, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the linear layer of values, the inverse of `normalized_layer`."""
    return kernel * statistics.scale, bias * statistics.scale + statistics.mean
