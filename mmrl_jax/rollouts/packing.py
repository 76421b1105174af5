"""Packing of several short completions into one row, so that less padding is computed.

    completions [B, G, T]   two   <end> <pad> <pad>      rows   three  red   balls <end>
                            three red   balls <end>             two    <end> none  <end>
                            none  <end> <pad> <pad>             <pad>  <pad> <pad> <pad>

Completions are placed by first fit, longest first. This needs at most 11/9 OPT + 6/9 rows, where
OPT is the smallest possible number (Dosa, 2007).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """Tokens of the completions of each of B prompts, in R rows of T slots.

    Attributes:
      tokens: Token ids, int32 [B, R, T]; those of padding have no meaning.
      segment_ids: Index in [0, G) of the completion of each token, int32 [B, R, T]; -1 for padding.
      positions: Index of each token in its completion, int32 [B, R, T].
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


def padded(tokens: jax.Array, mask: jax.Array) -> Rows:
    """Returns a row for each completion, from tokens int32 [B, G, T] and a mask bool [B, G, T]."""
    _, group, length = tokens.shape
    segment_ids = jnp.where(mask, jnp.arange(group)[:, None], -1)
    return Rows(tokens, segment_ids, jnp.broadcast_to(jnp.arange(length), tokens.shape))


def slots(mask: jax.Array) -> jax.Array:
    """Returns the slot of each token when the completions of a prompt are packed into G rows.

    Args:
      mask: False for padding, which follows the tokens, bool [B, G, T].

    Returns:
      The slots row * T + column, int32 [B, G, T]; -1 for padding.
    """
    _, group, length = mask.shape

    def place_completion(free: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jnp.argmax(free >= size)
        return free.at[row].add(-size), row * length + length - free[row]

    def first_fit(sizes: jax.Array) -> jax.Array:
        """Returns the first slot of each of G completions with these lengths, int32 [G]."""
        order = jnp.argsort(-sizes)
        _, begin = jax.lax.scan(place_completion, jnp.full(group, length), sizes[order])
        return jnp.zeros_like(begin).at[order].set(begin)

    begin = jax.vmap(first_fit)(jnp.sum(mask, axis=2, dtype=jnp.int32))
    return jnp.where(mask, begin[..., None] + jnp.arange(length), -1)


def rows_used(mask: jax.Array) -> jax.Array:
    """Returns the largest number of rows that the completions of a prompt need, int32 []."""
    return jnp.max(slots(mask)) // mask.shape[2] + 1


def pack(tokens: jax.Array, mask: jax.Array) -> tuple[Rows, jax.Array]:
    """Packs completions int32 [B, G, T] into G rows, of which the last may be empty.

    Returns:
      The rows, and the slot of each token as in `slots`.
    """
    slot = slots(mask)
    batch, nowhere = len(slot), slot[0].size
    to = jnp.where(mask, slot, nowhere).reshape(batch, -1)

    def scatter(x: jax.Array, fill: int) -> jax.Array:
        scattered = jax.vmap(lambda at, x: jnp.full_like(x, fill).at[at].set(x, mode="drop"))(
            to, x.reshape(batch, -1)
        )
        return scattered.reshape(x.shape)

    rows = padded(tokens, mask)
    return Rows(
        scatter(rows.tokens, 0), scatter(rows.segment_ids, -1), scatter(rows.positions, 0)
    ), slot
