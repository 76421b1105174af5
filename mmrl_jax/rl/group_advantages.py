"""Advantages of G answers to each of B prompts, from their rewards alone: [B, G] in, [B, G] out.

An answer that could not be scored (`scored` 0) has no part in any statistic, and advantage 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmrl_jax.rl.losses import masked_mean

EPSILON = 1e-4  # As in TRL.


def _std(x: jax.Array, scored: jax.Array, axis: int | None) -> jax.Array:
    """With n - 1 in the denominator; 0 of a single value."""
    squares = jnp.where(scored > 0, (x - masked_mean(x, scored, axis)) ** 2, 0.0)
    count = jnp.sum(scored, axis, keepdims=axis is not None)
    total = jnp.sum(squares, axis, keepdims=axis is not None)
    return jnp.sqrt(total / jnp.maximum(count - 1, 1.0))


def centered(reward: jax.Array, scored: jax.Array) -> jax.Array:
    """r_i - mean(r) of the group: Dr. GRPO (Liu et al., 2025, arXiv 2503.20783)."""
    advantage = jnp.where(scored > 0, reward - masked_mean(reward, scored, 1), 0.0)
    # Equal rewards are exactly 0: the rounding of their mean, over its own spread, is not.
    return jnp.where(degenerate(reward, scored)[:, None], 0.0, advantage)


def standardized(reward: jax.Array, scored: jax.Array) -> jax.Array:
    """(r_i - mean(r)) / (std(r) + 1e-4) of the group: GRPO (arXiv 2402.03300, section 4.1.2)."""
    return centered(reward, scored) / (_std(reward, scored, 1) + EPSILON)


def leave_one_out(reward: jax.Array, scored: jax.Array) -> jax.Array:
    """r_i - mean of the others' rewards: RLOO (Ahmadian et al., 2024, arXiv 2402.14740).

    It is n / (n - 1) times the centered reward; 0 where there are no others.
    """
    count = jnp.sum(scored, axis=1, keepdims=True)
    factor = jnp.where(count > 1, count / jnp.maximum(count - 1, 1.0), 0.0)
    return factor * centered(reward, scored)


def batch_standardized(reward: jax.Array, scored: jax.Array) -> jax.Array:
    """The centered rewards, over their standard deviation in the whole batch.

    REINFORCE++ with the group's mean as baseline (Hu et al., 2025, arXiv 2501.03262).
    """
    advantage = centered(reward, scored)
    advantage = (advantage - masked_mean(advantage, scored, None)) / (
        _std(advantage, scored, None) + EPSILON
    )
    return jnp.where(scored > 0, advantage, 0.0)


def pass_at_k(reward: jax.Array, scored: jax.Array, *, k: int) -> jax.Array:
    """Advantages whose objective is that one of k answers is right (arXiv 2508.10751, section 2.4).

    With N answers of which c are right (reward above 0), R = 1 - C(N - c, k) / C(N, k) the share of
    sets of k that hold a right one, and s = sqrt(R (1 - R)):

      A = (1 - R) / s of a right answer,
      A = (1 - R - C(N - c - 1, k - 1) / C(N - 1, k - 1)) / s of a wrong one;

    0 where s is 0, and where fewer than k could be scored.

    Raises:
      ValueError: k is not in [1, G].
    """
    group = reward.shape[1]
    if not 1 <= k <= group:
        raise ValueError(f"k={k} is not in [1, {group}], the answers of a group.")
    right = (reward > 0) & (scored > 0)
    count = jnp.sum(scored, axis=1, keepdims=True)
    wrong = count - jnp.sum(right, axis=1, keepdims=True)

    def none_of(m: jax.Array, n: jax.Array, size: int) -> jax.Array:
        """C(m, size) / C(n, size): how likely `size` of n are all of those m."""
        share = jnp.ones_like(m)
        for i in range(size):
            share *= jnp.maximum(m - i, 0.0) / jnp.maximum(n - i, 1.0)
        return share

    all_wrong = none_of(wrong, count, k)
    others_wrong = none_of(wrong - 1, count - 1, k - 1)
    spread = jnp.sqrt(all_wrong * (1 - all_wrong))
    advantage = jnp.where(right, all_wrong, all_wrong - others_wrong)
    safe = jnp.where(spread > 0, spread, 1.0)
    known = (spread > 0) & (scored > 0) & (count >= k)
    return jnp.where(known, advantage / safe, 0.0)


ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "centred": centered,
    "standardised": standardized,
    "leave_one_out": leave_one_out,
    "batch_standardised": batch_standardized,
}


def degenerate(reward: jax.Array, scored: jax.Array) -> jax.Array:
    """Groups whose scored rewards are all equal, bool [B]: nothing can be learned from them."""
    high = jnp.max(jnp.where(scored > 0, reward, -jnp.inf), axis=1)
    low = jnp.min(jnp.where(scored > 0, reward, jnp.inf), axis=1)
    return ~(high > low)
