"""What a completion loses for coming close to the most tokens that it may have."""

import jax
import jax.numpy as jnp


def soft_overlong_penalty(length: jax.Array, *, max_length: int, buffer: int) -> jax.Array:
    """DAPO's soft overlong punishment (Yu et al., 2025, arXiv 2503.14476, eq. 13).

    With L_max = `max_length`, L_cache = `buffer`, and |y| the length of a completion,

      0                             if |y| <= L_max - L_cache,
      (L_max - L_cache - |y|) / L_cache  if L_max - L_cache < |y| <= L_max,
      -1                            if L_max < |y|.

    Args:
      length: [...], tokens of each completion, its stop token among them.
      max_length: the most tokens of a completion, where it is truncated.
      buffer: tokens before that over which the penalty grows, in [1, max_length].

    Returns:
      float32 [...] in [-1, 0], to be added to the reward.
    """
    beyond = length.astype(jnp.float32) - (max_length - buffer)
    return -jnp.clip(beyond / buffer, 0.0, 1.0)
