"""Answers in rows, several short ones one behind another, so that less padding is computed.

    answers [B, G, T]   two   <end> <pad> <pad>        rows   three  red  balls <end>
                        three red   balls <end>               two    <end> none  <end>
                        none  <end> <pad> <pad>               <pad>  <pad> <pad> <pad>

First fit in the order of falling length needs at most 11/9 of the fewest rows and 6/9 (Dosa, 2007).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """Tokens of the answers to each of B questions, in R rows of T places.

    Attributes:
      tokens: int32 [B, R, T]; anything where there is no answer.
      segment_ids: int32 [B, R, T], the index in [0, G) of a token's completion; -1 for padding.
      positions: int32 [B, R, T], how many tokens of its answer stand before it.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


def padded(tokens: jax.Array, mask: jax.Array) -> Rows:
    """A row for each of G answers, int32 [B, G, T], of which bool [B, G, T] tells padding."""
    _, group, length = tokens.shape
    segment_ids = jnp.where(mask, jnp.arange(group)[:, None], -1)
    return Rows(tokens, segment_ids, jnp.broadcast_to(jnp.arange(length), tokens.shape))


def slots(mask: jax.Array) -> jax.Array:
    """Where each token of packed answers is among its question's G rows of T places.

    Args:
      mask: bool [B, G, T]; an answer begins at its first place and has no holes.

    Returns:
      int32 [B, G, T], row * T + column, the rows from 0 on; -1 for padding.
    """
    _, group, length = mask.shape

    def place_completion(free: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jnp.argmax(free >= size)
        return free.at[row].add(-size), row * length + length - free[row]

    def first_fit(sizes: jax.Array) -> jax.Array:
        """Where each of answers of sizes [G] begins, int32 [G]."""
        order = jnp.argsort(-sizes)
        _, begin = jax.lax.scan(place_completion, jnp.full(group, length), sizes[order])
        return jnp.zeros_like(begin).at[order].set(begin)

    begin = jax.vmap(first_fit)(jnp.sum(mask, axis=2, dtype=jnp.int32))
    return jnp.where(mask, begin[..., None] + jnp.arange(length), -1)


def rows_used(mask: jax.Array) -> jax.Array:
    """The most rows that the answers [B, G, T] to a question are packed into, int32 []."""
    return jnp.max(slots(mask)) // mask.shape[2] + 1


def pack(tokens: jax.Array, mask: jax.Array) -> tuple[Rows, jax.Array]:
    """Answers int32 [B, G, T] in rows [B, G, T], of which the last may be empty; their places."""
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
