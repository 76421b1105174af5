"""Policy, value and auxiliary heads, and what a policy returns."""

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
    """What every policy network returns for B samples.

    Attributes:
      distribution: over actions, batch shape [B].
      value: float32 [B].
      auxiliary: name -> prediction of a privileged target (training only): float32 [B, size], or
        for a place in the picture float32 [B, rows, columns], one logit a patch.
    """

    distribution: Distribution
    value: jax.Array
    auxiliary: dict[str, jax.Array]


class PolicyHead(nn.Module):
    """Features to an action distribution; starts near the center of the action range.

    Attributes:
      kind: 'continuous' (tanh-normal; one learned log std a dimension, 0 at first) or 'discrete'.
      actions: number of action dimensions, or of discrete actions.
      state_std: the log std depends on the features too.
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
    """Features [B, D] to float32 [B]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        return Dense(1, kernel_init=small, name="value")(x.astype(jnp.float32))[..., 0]
