"""Advantage estimators on time-major arrays [T, B]."""

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
    """Generalized advantage estimation (Schulman et al., 2016, arXiv 1506.02438).

      delta_t = r_t + discount * (1 - terminated_t) * v_{t+1} - v_t
      A_t = delta_t + discount * lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}

    A truncated step is bootstrapped with the value of the state in which it was truncated, so
    value[t + 1] must be the value of that state. `AutoReset` therefore resets an environment in the
    step after it; that step is invalid, and no other step reads its advantage.

    Args:
      reward: Rewards r_t, float32 [T, B].
      value: Value estimates v_t, float32 [T, B].
      last_value: Value estimate v_T of the state after the last step, float32 [B].
      terminated: 1 where the step ended the task, float32 [T, B].
      truncated: 1 where the step reached a limit, float32 [T, B].
      discount: Discount factor per step, in [0, 1].
      lambda_: Weight of later errors, in [0, 1]; 1 gives Monte Carlo returns, 0 the one-step error.

    Returns:
      The advantages A_t, float32 [T, B], and the value targets A_t + v_t, float32 [T, B].
    """
    next_value = jnp.concatenate([value[1:], last_value[None]])
    # Selects instead of products: the value after a terminated step may be NaN.
    delta = reward + discount * jnp.where(terminated > 0, 0.0, next_value) - value
    decay = discount * lambda_ * (1 - terminated) * (1 - truncated)

    def step(advantage_tp1: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple:
        delta_t, decay_t = x
        advantage_t = delta_t + jnp.where(decay_t > 0, decay_t * advantage_tp1, 0.0)
        return advantage_t, advantage_t

    _, advantage = jax.lax.scan(step, jnp.zeros_like(last_value), (delta, decay), reverse=True)
    return advantage, advantage + value


def truncation_mask(terminated: jax.Array, truncated: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns 1 where an episode was truncated by a limit or by a failure, float32 [T, B].

    An environment whose state is no longer finite is reset in the next step, without termination or
    truncation. The step before such a reset counts as truncated: the value estimate there is all
    that is known about the rest of the episode.

    Args:
      terminated: 1 where the step ended the task, float32 [T, B].
      truncated: 1 where the step reached a limit, float32 [T, B].
      valid: 0 where the step only reset the environment, float32 [T, B].
    """
    next_valid = jnp.concatenate([valid[1:], jnp.ones_like(valid[:1])])
    return jnp.maximum(truncated, valid * (1 - next_valid) * (1 - terminated))


@jax.named_scope("advantages")
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
    """Generalized advantages of the tokens of T turns, each a completion of up to L tokens.

    Every token is a step. The last token of a completion has the reward, the termination and the
    discount of its turn, and is followed by the first token of the next turn. All other tokens have
    reward 0 and discount 1.

    Args:
      reward: Rewards of the turns, float32 [T, B].
      value: Value estimates before each token, float32 [T, B, L].
      last_value: Value estimate before the first token that would follow the last turn, float32
        [B].
      mask: True for tokens, False for padding, bool [T, B, L]; every turn has its first token.
      terminated: 1 where the turn ended the task, float32 [T, B].
      truncated: 1 where a limit truncated the episode after the turn, float32 [T, B].
      discount: Discount factor per turn, in [0, 1].
      lambda_: Weight of later errors, per token, in [0, 1].

    Returns:
      The advantages A, float32 [T, B, L], and the value targets A + v, float32 [T, B, L]; the
      entries of padding have no meaning.
    """
    follows = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    last = mask & ~follows

    def in_order(x: jax.Array) -> jax.Array:
        """Reshapes [T, B, L] to [T * L, B]."""
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
    """Advantages of one step followed by the lambda-return, as in IMPALA and in Brax's PPO.

      A_t = r_t + discount * (1 - terminated_t) * G_{t+1} - v_t

    (Espeholt et al., 2018, arXiv 1802.01561, section 4.2). Compared with generalized advantages,
    the temporal-difference errors after the first one have 1 / lambda times the weight.

    Args:
      reward: Rewards r_t, float32 [T, B].
      value: Value estimates v_t, float32 [T, B].
      last_value: Value estimate v_T of the state after the last step, float32 [B].
      target: Lambda-returns G_t, the second result of `generalized_advantages`, float32 [T, B].
        After a truncated step and after the last one, the value estimate takes the place of
        G_{t+1}.
      terminated: 1 where the step ended the task, float32 [T, B].
      truncated: 1 where the step reached a limit, float32 [T, B].
      discount: Discount factor per step, in [0, 1].

    Returns:
      The advantages A_t, float32 [T, B].
    """
    next_value = jnp.concatenate([target[1:], last_value[None]])
    following_value = jnp.concatenate([value[1:], last_value[None]])
    next_value = jnp.where(truncated > 0, following_value, next_value)
    return reward + discount * jnp.where(terminated > 0, 0.0, next_value) - value


def bootstrapped_returns(
    *, reward: jax.Array, terminated: jax.Array, truncated: jax.Array, discount: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Monte Carlo returns up to the observation that they are bootstrapped from.

      G_t = return_t + weight_t * v(o_{step_t})

    That observation follows the first truncated step from t on, or the last recorded step. The
    weight is 0 where the episode terminates first.

    Args:
      reward: Rewards r_t, float32 [T, B].
      terminated: 1 where the step ended the task, float32 [T, B].
      truncated: 1 where the step reached a limit, float32 [T, B].
      discount: Discount factor per step, in [0, 1].

    Returns:
      The discounted sums of rewards, float32 [T, B], the weights, float32 [T, B], and the steps,
      int32 [T, B] in [1, T].
    """
    length, batch = reward.shape

    def step(following: tuple[jax.Array, ...], x: tuple[jax.Array, ...]) -> tuple:
        return_tp1, weight_tp1, step_tp1 = following
        t, reward_t, terminated_t, truncated_t = x
        is_terminated, is_truncated = terminated_t > 0, truncated_t > 0
        is_last = is_terminated | is_truncated
        current = (
            reward_t + discount * jnp.where(is_last, 0.0, return_tp1),
            discount * jnp.where(is_terminated, 0.0, jnp.where(is_truncated, 1.0, weight_tp1)),
            jnp.where(is_last, t + 1, step_tp1),
        )
        return current, current

    first = jnp.zeros(batch), jnp.ones(batch), jnp.full(batch, length, jnp.int32)
    steps = jnp.arange(length, dtype=jnp.int32)
    return jax.lax.scan(step, first, (steps, reward, terminated, truncated), reverse=True)[1]
