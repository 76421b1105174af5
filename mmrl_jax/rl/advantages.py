"""Advantage estimation: arrays in, arrays out, time-major [T, B]."""

import jax
import jax.numpy as jnp


def generalised_advantages(
    *,
    reward: jax.Array,
    value: jax.Array,
    last_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    discount: float,
    lambda_: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438).

      delta_t = r_t + discount * (1 - terminated_t) * v_{t+1} - v_t
      A_t = delta_t + discount * lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}

    A truncated step is bootstrapped with the value of the state it was cut at, so value[t + 1] has
    to be that state's: here an environment resets itself only in the following step, which is
    marked invalid and whose advantage no other step reads.

    Args:
      reward: float32 [T, B].
      value: float32 [T, B], estimates v_t.
      last_value: float32 [B], v_T.
      terminated: float32 [T, B], 1 where the step ended the task.
      truncated: float32 [T, B], 1 where the step reached a limit.
      discount: in [0, 1].
      lambda_: in [0, 1]; 1 is the Monte Carlo return, 0 the one-step error.

    Returns:
      advantages float32 [T, B], and the value targets A_t + v_t, float32 [T, B].
    """
    next_value = jnp.concatenate([value[1:], last_value[None]])
    # Selects, not products: what follows an end need not be a number.
    delta = reward + discount * jnp.where(terminated > 0, 0.0, next_value) - value
    decay = discount * lambda_ * (1 - terminated) * (1 - truncated)

    def step(advantage_tp1: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple:
        delta_t, decay_t = x
        advantage_t = delta_t + jnp.where(decay_t > 0, decay_t * advantage_tp1, 0.0)
        return advantage_t, advantage_t

    _, advantage = jax.lax.scan(step, jnp.zeros_like(last_value), (delta, decay), reverse=True)
    return advantage, advantage + value


def return_advantages(
    *,
    reward: jax.Array,
    value: jax.Array,
    last_value: jax.Array,
    target: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    discount: float,
) -> jax.Array:
    """Advantages of one step and the lambda-return behind it, as IMPALA's and those of Brax's PPO.

      A_t = r_t + discount * (1 - terminated_t) * G_{t+1} - v_t

    (Espeholt et al., 2018, arXiv 1802.01561, section 4.2). Against generalised advantages the
    errors after the first count 1 / lambda times as much: the value right behind the action, whose
    error the action itself brings about, falls out.

    Args:
      reward: float32 [T, B].
      value: float32 [T, B], estimates v_t.
      last_value: float32 [B], v_T.
      target: float32 [T, B], the lambda-returns G_t that `generalised_advantages` gives; behind a
        truncated step, and behind the last one, the value stands for them.
      terminated: float32 [T, B], 1 where the step ended the task.
      truncated: float32 [T, B], 1 where the step reached a limit.
      discount: in [0, 1].

    Returns:
      float32 [T, B].
    """
    behind = jnp.concatenate([target[1:], last_value[None]])
    value_behind = jnp.concatenate([value[1:], last_value[None]])
    behind = jnp.where(truncated > 0, value_behind, behind)
    return reward + discount * jnp.where(terminated > 0, 0.0, behind) - value


def discounted_returns(
    *,
    reward: jax.Array,
    last_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    discount: float,
) -> jax.Array:
    """Monte Carlo returns within the recorded steps: G_t = r_t + discount * G_{t+1}, cut at ends.

    Args:
      reward: float32 [T, B].
      last_value: float32 [B], what follows the last step.
      terminated: float32 [T, B].
      truncated: float32 [T, B]; nothing is known of what would have followed, so it counts as 0.
      discount: in [0, 1].

    Returns:
      float32 [T, B].
    """
    going_on = (1 - terminated) * (1 - truncated)

    def step(return_tp1: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple:
        reward_t, going_on_t = x
        return_t = reward_t + discount * going_on_t * return_tp1
        return return_t, return_t

    return jax.lax.scan(step, last_value, (reward, going_on), reverse=True)[1]
