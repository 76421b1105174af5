"""Intrinsic rewards: novelty as a prediction error, and its normalization."""

import jax
import jax.numpy as jnp

from mmrl_jax.rl import normalization
from mmrl_jax.rl.normalization import RunningStatistics


def prediction_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean squared error over features [..., K], float32 [...].

    With the features of a fixed random network as target it is the novelty of an observation in
    random network distillation (Burda et al., 2018, arXiv 1810.12894, section 2.2).
    """
    return jnp.mean((prediction - target) ** 2, axis=-1)


def running_returns(reward: jax.Array, start: jax.Array, discount: float) -> jax.Array:
    """Returns g_t = discount * g_{t-1} + r_t of rewards [T, B], float32 [T, B].

    Args:
      reward: Rewards r_t, float32 [T, B].
      start: g before the first step, float32 [B] or [].
      discount: Discount factor per step, in [0, 1].
    """

    def step(g: jax.Array, reward_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        g = discount * g + reward_t
        return g, g

    return jax.lax.scan(step, jnp.broadcast_to(start, reward.shape[1:]), reward)[1]


def scale(reward: jax.Array, returns: RunningStatistics) -> jax.Array:
    """Divides rewards by the standard deviation of their running returns (arXiv 1810.12894, 2.4).

    Args:
      reward: Rewards of any shape, float32.
      returns: Statistics of the running returns, of rows of size 1.
    """
    variance = returns.m2[0] / jnp.maximum(returns.count, 1.0)
    return reward / jnp.maximum(jnp.sqrt(variance), 1e-8)


def whiten(observations: RunningStatistics, x: jax.Array) -> jax.Array:
    """Normalizes observations [..., F] and clips them to [-5, 5], as the paper does (2.4)."""
    return jnp.clip(normalization.normalize(observations, x), -5.0, 5.0)
