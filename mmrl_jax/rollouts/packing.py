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
      answer: int32 [B, R, T], the number of the answer that a token is of; -1 where there is none.
      offset: int32 [B, R, T], how many tokens of its answer stand before it.
    """

    tokens: jax.Array
    answer: jax.Array
    offset: jax.Array


def padded(tokens: jax.Array, present: jax.Array) -> Rows:
    """A row for each of G answers, int32 [B, G, T], of which bool [B, G, T] tells padding."""
    _, group, length = tokens.shape
    answer = jnp.where(present, jnp.arange(group)[:, None], -1)
    return Rows(tokens, answer, jnp.broadcast_to(jnp.arange(length), tokens.shape))


def places(present: jax.Array) -> jax.Array:
    """Where each token of packed answers is among its question's G rows of T places.

    Args:
      present: bool [B, G, T]; an answer begins at its first place and has no holes.

    Returns:
      int32 [B, G, T], row * T + column, the rows from 0 on; -1 for padding.
    """
    _, group, length = present.shape

    def put(free: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jnp.argmax(free >= size)
        return free.at[row].add(-size), row * length + length - free[row]

    def first_fit(sizes: jax.Array) -> jax.Array:
        """Where each of answers of sizes [G] begins, int32 [G]."""
        order = jnp.argsort(-sizes)
        _, begin = jax.lax.scan(put, jnp.full(group, length), sizes[order])
        return jnp.zeros_like(begin).at[order].set(begin)

    begin = jax.vmap(first_fit)(jnp.sum(present, axis=2, dtype=jnp.int32))
    return jnp.where(present, begin[..., None] + jnp.arange(length), -1)


def rows_used(present: jax.Array) -> jax.Array:
    """The most rows that the answers [B, G, T] to a question are packed into, int32 []."""
    return jnp.max(places(present)) // present.shape[2] + 1


def pack(tokens: jax.Array, present: jax.Array) -> tuple[Rows, jax.Array]:
    """Answers int32 [B, G, T] in rows [B, G, T], of which the last may be empty; their places."""
    place = places(present)
    batch, nowhere = len(place), place[0].size
    to = jnp.where(present, place, nowhere).reshape(batch, -1)

    def lay(x: jax.Array, none: int) -> jax.Array:
        laid = jax.vmap(lambda at, x: jnp.full_like(x, none).at[at].set(x, mode="drop"))(
            to, x.reshape(batch, -1)
        )
        return laid.reshape(x.shape)

    rows = padded(tokens, present)
    return Rows(lay(rows.tokens, 0), lay(rows.answer, -1), lay(rows.offset, 0)), place
