"""Penalty of completions that approach the maximum length."""

import jax
import jax.numpy as jnp


def soft_overlong_penalty(length: jax.Array, *, max_length: int, buffer: int) -> jax.Array:
    """DAPO's soft overlong punishment (Yu et al., 2025, arXiv 2503.14476, eq. 13).

    With L_max = `max_length`, L_cache = `buffer`, and |y| the length of a completion,

      0                             if |y| <= L_max - L_cache,
      (L_max - L_cache - |y|) / L_cache  if L_max - L_cache < |y| <= L_max,
      -1                            if L_max < |y|.

    Args:
      length: Number of tokens of each completion, the stop token included, [...].
      max_length: Number of tokens at which a completion is truncated.
      buffer: Number of tokens before `max_length` over which the penalty grows, in [1, max_length].

    Returns:
      The penalty that is added to the reward, float32 [...] in [-1, 0].
    """
    excess = length.astype(jnp.float32) - (max_length - buffer)
    return -jnp.clip(excess / buffer, 0.0, 1.0)
