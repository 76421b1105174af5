"""Advantage estimation: arrays in, arrays out, time-major [T, B]."""

import jax
import jax.numpy as jnp


def generalized_advantages(
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


def truncation_mask(terminated: jax.Array, truncated: jax.Array, valid: jax.Array) -> jax.Array:
    """Where an episode was cut short, float32 [T, B]: truncated, or broken.

    Without an end of its own, an episode whose next step is not valid broke there: what it was
    worth until then is all that is known.

    Args:
      terminated: float32 [T, B].
      truncated: float32 [T, B].
      valid: float32 [T, B].
    """
    next_valid = jnp.concatenate([valid[1:], jnp.ones_like(valid[:1])])
    return jnp.maximum(truncated, valid * (1 - next_valid) * (1 - terminated))


def token_advantages(
    *,
    reward: jax.Array,
    value: jax.Array,
    last_value: jax.Array,
    mask: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    discount: float,
    lambda_: float,
) -> tuple[jax.Array, jax.Array]:
    """`generalized_advantages` of the tokens of T turns, each an answer of up to L tokens.

    Every token is a step. The last one of an answer is followed by the first one of the next turn,
    and has the turn's reward, end and discount; between the tokens of an answer nothing is earned
    and nothing discounted.

    Args:
      reward: float32 [T, B], of the turns.
      value: float32 [T, B, L], estimates before each token.
      last_value: float32 [B], before the first token of the turn after the last one.
      mask: bool [T, B, L], the tokens that are there; at least the first of every turn.
      terminated: float32 [T, B], 1 where the turn ended the task.
      truncated: float32 [T, B], 1 where a limit cut the episode after the turn.
      discount: of a turn, in [0, 1].
      lambda_: of a token, in [0, 1].

    Returns:
      advantages float32 [T, B, L], and the value targets A + v, float32 [T, B, L]; what stands
      where no token is has no meaning.
    """
    follows = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    last = mask & ~follows

    def in_order(x: jax.Array) -> jax.Array:
        """[T, B, L] to [T * L, B]."""
        return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1])

    def at_last(x: jax.Array, else_: float = 0.0) -> jax.Array:
        return in_order(jnp.where(last, x[..., None], else_))

    def step(following: tuple[jax.Array, jax.Array], x: tuple) -> tuple:
        is_token, value_t, reward_t, ended, was_truncated, discount_t = x
        advantage_tp1, value_tp1 = following
        delta = reward_t + discount_t * jnp.where(ended > 0, 0.0, value_tp1) - value_t
        decay = discount_t * lambda_ * (1 - ended) * (1 - was_truncated)
        advantage_t = delta + jnp.where(decay > 0, decay * advantage_tp1, 0.0)
        current = (advantage_t, value_t)
        return jax.tree.map(lambda a, b: jnp.where(is_token, a, b), current, following), advantage_t

    _, advantage = jax.lax.scan(
        step,
        (jnp.zeros_like(last_value), last_value),
        (
            in_order(mask),
            in_order(value),
            at_last(reward),
            at_last(terminated),
            at_last(truncated),
            at_last(jnp.full_like(reward, discount), 1.0),
        ),
        reverse=True,
    )
    turns, batch, length = value.shape
    advantage = jnp.moveaxis(advantage.reshape(turns, length, batch), 1, 2)
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

    (Espeholt et al., 2018, arXiv 1802.01561, section 4.2). Against generalized advantages the
    errors after the first count 1 / lambda times as much: the value right behind the action, whose
    error the action itself brings about, falls out.

    Args:
      reward: float32 [T, B].
      value: float32 [T, B], estimates v_t.
      last_value: float32 [B], v_T.
      target: float32 [T, B], the lambda-returns G_t that `generalized_advantages` gives; behind a
        truncated step, and behind the last one, the value stands for them.
      terminated: float32 [T, B], 1 where the step ended the task.
      truncated: float32 [T, B], 1 where the step reached a limit.
      discount: in [0, 1].

    Returns:
      float32 [T, B].
    """
    next_value = jnp.concatenate([target[1:], last_value[None]])
    following_value = jnp.concatenate([value[1:], last_value[None]])
    next_value = jnp.where(truncated > 0, following_value, next_value)
    return reward + discount * jnp.where(terminated > 0, 0.0, next_value) - value


def bootstrapped_returns(
    *, reward: jax.Array, terminated: jax.Array, truncated: jax.Array, discount: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Monte Carlo returns up to the observation whose value stands for the rest of the episode.

      G_t = return_t + weight_t * v(o_{step_t})

    That observation is the one behind a truncated step, or behind the last recorded one. A step
    that terminates is followed by nothing, and has weight 0.

    Args:
      reward: float32 [T, B].
      terminated: float32 [T, B], 1 where the step ended the task.
      truncated: float32 [T, B], 1 where the step reached a limit.
      discount: in [0, 1].

    Returns:
      The discounted sums of rewards float32 [T, B], the weights float32 [T, B], and the steps
      int32 [T, B], in [1, T].
    """
    length, batch = reward.shape

    def step(following: tuple[jax.Array, ...], x: tuple[jax.Array, ...]) -> tuple:
        return_tp1, weight_tp1, step_tp1 = following
        t, reward_t, terminated_t, truncated_t = x
        ended, cut_short = terminated_t > 0, truncated_t > 0
        over = ended | cut_short
        current = (
            reward_t + discount * jnp.where(over, 0.0, return_tp1),
            discount * jnp.where(ended, 0.0, jnp.where(cut_short, 1.0, weight_tp1)),
            jnp.where(over, t + 1, step_tp1),
        )
        return current, current

    first = jnp.zeros(batch), jnp.ones(batch), jnp.full(batch, length, jnp.int32)
    steps = jnp.arange(length, dtype=jnp.int32)
    return jax.lax.scan(step, first, (steps, reward, terminated, truncated), reverse=True)[1]
