"""Shared data types and the glossary of axes.

Axes: B environments or samples, T time steps, K frames of history, S tokens, D width, N heads,
H and W image height and width, L words of an instruction, P proprioceptive readings, A action
dimensions. `_t` and `_tp1` mark time steps; time-major arrays are [T, B, ...].
"""

from typing import Any

from flax import struct
import jax

Params = Any  # A pytree of float32 arrays.
Metrics = dict[str, jax.Array]

# The observation of a policy. A multimodal environment has the entries
#   'pixels'       uint8 [B, H, W, 3], or [B, K, H, W, 3] with a history of K frames;
#   'instruction'  {'tokens': int32 [B, L], 'mask': bool [B, L]}, the mask False for padding;
#   'proprio'      float32 [B, P], or [B, K, P] with a history.
# A flat environment has only 'proprio'.
Observation = dict[str, Any]


class Transition(struct.PyTreeNode):
    """The record of one environment step, time-major [T, B, ...] after an unroll.

    Attributes:
      observation: Observation of the policy at t; for token policies the Prompt.
      action: Sample of the action distribution at t before tanh, float32 [T, B, A], or int32
        [T, B] for discrete actions; for token policies the Completions.
      log_prob: Log-probability of `action` under the acting policy, float32 [T, B].
      value: Value estimate of the acting policy at t, float32 [T, B].
      reward: Reward of the step from t to t + 1, float32 [T, B].
      terminated: 1 where the task ended at t + 1, so that no state follows, float32 [T, B].
      truncated: 1 where a limit truncated the episode at t + 1, so that returns are bootstrapped
        with the value of that state, float32 [T, B].
      valid: 0 where the step only reset the environment, float32 [T, B]. Such a step has no action
        of the policy, and every loss and statistic masks it out.
      privileged: Targets for training, each [T, B, ...]; they are never an input of the policy.
      metrics: Measurements of the environment after the step, float32 [T, B] each.
    """

    observation: Any
    action: Any
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array
    privileged: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
