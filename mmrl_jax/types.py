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

# What a policy sees. A multimodal environment gives
#   'pixels'       uint8 [B, H, W, 3], or [B, K, H, W, 3] with a history of K frames;
#   'instruction'  {'tokens': int32 [B, L], 'mask': bool [B, L]}, mask True where there is a word;
#   'proprio'      float32 [B, P], or [B, K, P] with a history;
# a flat one gives 'proprio' alone.
Observation = dict[str, Any]


class Transition(struct.PyTreeNode):
    """What one environment step leaves behind, time-major [T, B, ...] after an unroll.

    Attributes:
      observation: what the policy saw at t, an Observation; for PPO over tokens a Prompt.
      action: the distribution's sample at t before any squashing, float32 [T, B, A], or int32
        [T, B] for discrete actions; for PPO over tokens the Completions.
      log_prob: float32 [T, B], log-probability of `action` under the acting policy.
      value: float32 [T, B], the acting policy's value estimate at t.
      reward: float32 [T, B], reward of the step from t to t + 1.
      terminated: float32 [T, B], 1 where the task ended at t + 1: nothing follows.
      truncated: float32 [T, B], 1 where a limit cut the episode at t + 1: the value there counts.
      valid: float32 [T, B], 0 where the step only reset the environment: no decision was made, and
        every loss and statistic leaves it out.
      privileged: dict of training-only targets [T, B, ...]; never an input of the policy.
      metrics: dict of the environment's own measurements after the step, float32 [T, B].
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
