"""A plain actor-critic for flat observations."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from mmrl_jax.models.heads import ActionKind, PolicyHead, PolicyOutput, ValueHead
from mmrl_jax.models.transformer import Dense
from mmrl_jax.types import Observation


class MLPPolicy(nn.Module):
    """Separate swish MLPs for policy and value over obs['proprio'] [B, P], as in Brax's PPO.

    As in Brax, the standard deviation of the actions depends on the state.

    Attributes:
      kind: Kind of actions, 'continuous' or 'discrete', see `PolicyHead`.
      actions: Number of action dimensions, or number of discrete actions.
      policy_layers: Widths of the hidden layers of the policy.
      value_layers: Widths of the hidden layers of the value function.
    """

    kind: ActionKind
    actions: int
    policy_layers: Sequence[int] = (32, 32, 32, 32)
    value_layers: Sequence[int] = (256, 256, 256, 256, 256)

    @nn.compact
    def __call__(self, observation: Observation) -> PolicyOutput:
        def mlp(x: jax.Array, layers: Sequence[int], name: str) -> jax.Array:
            for i, features in enumerate(layers):
                init = nn.initializers.lecun_uniform()
                x = nn.swish(Dense(features, kernel_init=init, name=f"{name}_{i}")(x))
            return x

        x = observation["proprio"].reshape(observation["proprio"].shape[0], -1)
        features = mlp(x, self.policy_layers, "policy")
        policy_head = PolicyHead(self.kind, self.actions, state_std=True, name="policy_head")
        return PolicyOutput(
            distribution=policy_head(features),
            value=ValueHead(name="value_head")(mlp(x, self.value_layers, "value")),
            auxiliary={},
            features=x,  # There are few readings, and policy and value share no layers.
        )
