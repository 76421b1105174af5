"""Advantages of G completions of each of B prompts, computed from their rewards alone.

All functions take rewards and `valid`, float32 [B, G] each, and return advantages, float32 [B, G].
A completion without a reward (`valid` 0) is excluded from every statistic and has advantage 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmrl_jax.rl.losses import masked_mean

EPSILON = 1e-4  # As in TRL.


def _std(x: jax.Array, valid: jax.Array, axis: int | None) -> jax.Array:
    """Standard deviation with n - 1 in the denominator; 0 for a single value."""
    squares = jnp.where(valid > 0, (x - masked_mean(x, valid, axis)) ** 2, 0.0)
    count = jnp.sum(valid, axis, keepdims=axis is not None)
    total = jnp.sum(squares, axis, keepdims=axis is not None)
    return jnp.sqrt(total / jnp.maximum(count - 1, 1.0))


def centered(reward: jax.Array, valid: jax.Array) -> jax.Array:
    """r_i - mean(r), the mean over the group: Dr. GRPO (Liu et al., 2025, arXiv 2503.20783)."""
    advantage = jnp.where(valid > 0, reward - masked_mean(reward, valid, 1), 0.0)
    # Equal rewards must give exactly 0, because `standardized` would divide the rounding error of
    # their mean by a spread as small.
    return jnp.where(degenerate(reward, valid)[:, None], 0.0, advantage)


def standardized(reward: jax.Array, valid: jax.Array) -> jax.Array:
    """(r_i - mean(r)) / (std(r) + 1e-4) in the group: GRPO (arXiv 2402.03300, section 4.1.2)."""
    return centered(reward, valid) / (_std(reward, valid, 1) + EPSILON)


def leave_one_out(reward: jax.Array, valid: jax.Array) -> jax.Array:
    """r_i minus the mean reward of the rest: RLOO (Ahmadian et al., 2024, arXiv 2402.14740).

    This is n / (n - 1) times the centered reward, or 0 in a group with a single reward.
    """
    count = jnp.sum(valid, axis=1, keepdims=True)
    factor = jnp.where(count > 1, count / jnp.maximum(count - 1, 1.0), 0.0)
    return factor * centered(reward, valid)


def batch_standardized(reward: jax.Array, valid: jax.Array) -> jax.Array:
    """Centered rewards, divided by their standard deviation in the whole batch.

    This is REINFORCE++ with the group's mean as baseline (Hu et al., 2025, arXiv 2501.03262).
    """
    advantage = centered(reward, valid)
    advantage = (advantage - masked_mean(advantage, valid, None)) / (
        _std(advantage, valid, None) + EPSILON
    )
    return jnp.where(valid > 0, advantage, 0.0)


def pass_at_k(reward: jax.Array, valid: jax.Array, *, k: int) -> jax.Array:
    """Advantages for the objective pass@k (arXiv 2508.10751, section 2.4).

    Of N completions, the c with a reward above 0 are correct. With the share of sets of k
    completions that contain a correct one, R = 1 - C(N - c, k) / C(N, k), and s = sqrt(R (1 - R)),

      A = (1 - R) / s for a correct completion,
      A = (1 - R - C(N - c - 1, k - 1) / C(N - 1, k - 1)) / s for a wrong one.

    The advantage is 0 where s is 0, and in groups with fewer than k rewards.

    Args:
      reward: Rewards of the completions, float32 [B, G].
      valid: 0 for completions without a reward, float32 [B, G].
      k: Number of completions of which one has to be correct, in [1, G].

    Raises:
      ValueError: k is not in [1, G].
    """
    group = reward.shape[1]
    if not 1 <= k <= group:
        raise ValueError(f"k={k} is not in [1, {group}], the completions of a group.")
    correct = (reward > 0) & (valid > 0)
    count = jnp.sum(valid, axis=1, keepdims=True)
    wrong = count - jnp.sum(correct, axis=1, keepdims=True)

    def subset_share(m: jax.Array, n: jax.Array, size: int) -> jax.Array:
        """C(m, size) / C(n, size), the share of subsets of n that lie in a given m of them."""
        share = jnp.ones_like(m)
        for i in range(size):
            share *= jnp.maximum(m - i, 0.0) / jnp.maximum(n - i, 1.0)
        return share

    all_wrong = subset_share(wrong, count, k)
    others_wrong = subset_share(wrong - 1, count - 1, k - 1)
    spread = jnp.sqrt(all_wrong * (1 - all_wrong))
    advantage = jnp.where(correct, all_wrong, all_wrong - others_wrong)
    safe = jnp.where(spread > 0, spread, 1.0)
    known = (spread > 0) & (valid > 0) & (count >= k)
    return jnp.where(known, advantage / safe, 0.0)


ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "centered": centered,
    "standardized": standardized,
    "leave_one_out": leave_one_out,
    "batch_standardized": batch_standardized,
}


def degenerate(reward: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns True for groups whose rewards are all equal, bool [B]; their advantages are all 0."""
    high = jnp.max(jnp.where(valid > 0, reward, -jnp.inf), axis=1)
    low = jnp.min(jnp.where(valid > 0, reward, jnp.inf), axis=1)
    return ~(high > low)
