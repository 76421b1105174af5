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
      index: int32 [B, R, T], which token of its answer it is.
    """

    tokens: jax.Array
    answer: jax.Array
    index: jax.Array


def padded(tokens: jax.Array, present: jax.Array) -> Rows:
    """A row for each of G answers, int32 [B, G, T], of which bool [B, G, T] tells padding."""
    _, group, length = tokens.shape
    answer = jnp.where(present, jnp.arange(group)[:, None], -1)
    return Rows(tokens, answer, jnp.broadcast_to(jnp.arange(length), tokens.shape))


def pack(tokens: jax.Array, present: jax.Array) -> tuple[Rows, jax.Array]:
    """Answers in the first rows of G, in as few as first fit finds.

    Args:
      tokens: int32 [B, G, T].
      present: bool [B, G, T]; an answer begins at its first place and has no holes.

    Returns:
      Rows [B, G, T], and where each token is among its question's G * T places, int32 [B, G, T];
      0 for padding.
    """
    batch, group, length = tokens.shape
    places = group * length

    def put(free: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jnp.argmax(free >= size)
        return free.at[row].add(-size), row * length + length - free[row]

    def first_fit(sizes: jax.Array) -> jax.Array:
        """Where each of answers of sizes [G] begins, int32 [G]."""
        order = jnp.argsort(-sizes)
        _, begin = jax.lax.scan(put, jnp.full(group, length), sizes[order])
        return jnp.zeros_like(begin).at[order].set(begin)

    begin = jax.vmap(first_fit)(jnp.sum(present, axis=2, dtype=jnp.int32))
    place = begin[..., None] + jnp.arange(length)
    to = jnp.where(present, place, places).reshape(batch, places)  # Padding is put nowhere.

    def lay(x: jax.Array, none: int) -> jax.Array:
        empty = jnp.full((batch, places), none, x.dtype)
        laid = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(
            empty, to, x.reshape(batch, places)
        )
        return laid.reshape(x.shape)

    rows = padded(tokens, present)
    laid = Rows(lay(rows.tokens, 0), lay(rows.answer, -1), lay(rows.index, 0))
    return laid, jnp.where(present, place, 0)
