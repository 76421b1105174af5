"""Policy, value and auxiliary heads, and the output type of policies."""

from typing import Literal

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.transformer import Dense
from mmrl_jax.rl.distributions import Categorical, Distribution, TanhNormal

ActionKind = Literal["continuous", "discrete"]


@struct.dataclass
class PolicyOutput:
    """Output of a policy network for B samples.

    Attributes:
      distribution: Distribution over actions, of batch shape [B].
      value: Estimated return, float32 [B].
      auxiliary: Predictions of privileged targets by name, used in training only: float32
        [B, size], or, for a position in the image, one logit per patch, float32 [B, rows, columns].
      features: Features of the observations for critics of actions, float32 [B, F]; None if the
        network gives none.
    """

    distribution: Distribution
    value: jax.Array
    auxiliary: dict[str, jax.Array]
    features: jax.Array | None = None


class PolicyHead(nn.Module):
    """Maps features to an action distribution whose mean starts near the center of the range.

    Attributes:
      kind: 'continuous' for a tanh-normal distribution with one learned log standard deviation per
        dimension, initially 0, or 'discrete' for a categorical distribution.
      actions: Number of action dimensions, or number of discrete actions.
      state_std: Whether the log standard deviation also depends on the features.
    """

    kind: ActionKind
    actions: int
    state_std: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Distribution:
        """Maps float32 [B, D] to a distribution of batch shape [B]."""
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        out = Dense(self.actions, kernel_init=small, name="mean")(x.astype(jnp.float32))
        if self.kind == "discrete":
            return Categorical(out)
        log_std = self.param("log_std", nn.initializers.zeros, (self.actions,))
        if self.state_std:
            log_std += Dense(self.actions, kernel_init=small, name="std")(x.astype(jnp.float32))
        return TanhNormal(out, jnp.broadcast_to(log_std, out.shape))


class ValueHead(nn.Module):
    """Maps features [B, D] to values, float32 [B]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        return Dense(1, kernel_init=small, name="value")(x.astype(jnp.float32))[..., 0]
