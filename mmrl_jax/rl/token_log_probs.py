"""Log-probs of tokens without the logits of a whole vocabulary in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLogProbs(NamedTuple):
    """Of each of N tokens, under its distribution over the vocabulary.

    Attributes:
      log_prob: float32 [N], of the token.
      entropy: float32 [N], of the distribution, nats.
    """

    log_prob: jax.Array
    entropy: jax.Array


def token_log_probs(
    hidden: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    tile: int = 4096,
) -> TokenLogProbs:
    """Log-probs of tokens whose logits are `hidden @ table.T`.

    The vocabulary is gone through in tiles, forward and backward: with l_j the logits,
    log p(token) = l_token - log sum_j exp(l_j), the sum as in online softmax (Milakov and
    Gimelshein, 2018). Neither pass holds more than [N, tile] logits; the backward pass makes them
    anew, a third more matmuls.

    Args:
      hidden: float [N, D], features of the tokens before; their dtype is the products'.
      table: float [V, D], the output layer.
      tokens: int32 [N], in [0, V).
      temperature: logits are divided by it.
      softcap: logits are softcap * tanh(logits / softcap) before that; None: as they are.
      tile: rows of the table at a time.

    Raises:
      ValueError: the temperature or the tile is not positive.
    """
    if temperature <= 0 or tile <= 0:
        raise ValueError(f"temperature={temperature} and tile={tile} must be positive.")
    return TokenLogProbs(
        *_tiled(temperature, softcap, min(tile, len(table)), hidden, table, tokens)
    )


def _tile(
    i: jax.Array, size: int, hidden: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where tile i begins, which of its rows [size] no earlier tile had, and hidden @ rows.T."""
    start = jnp.minimum(i * size, len(table) - size)
    new = start + jnp.arange(size) >= i * size  # The last tile reaches back into the one before.
    rows = jax.lax.dynamic_slice_in_dim(table, start, size).astype(hidden.dtype)
    return start, new, jnp.matmul(hidden, rows.T, preferred_element_type=jnp.float32)


def _logits(raw: jax.Array, temperature: float, softcap: float | None) -> jax.Array:
    return (raw if softcap is None else softcap * jnp.tanh(raw / softcap)) / temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled(
    temperature: float,
    softcap: float | None,
    size: int,
    hidden: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _forward(temperature, softcap, size, hidden, table, tokens)[0]


def _forward(
    temperature: float,
    softcap: float | None,
    size: int,
    hidden: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    def step(carry: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        top, total, weighted, own = carry
        start, new, raw = _tile(i, size, hidden, table)
        logits = jnp.where(new, _logits(raw, temperature, softcap), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        shrink, exp = jnp.exp(top - higher), jnp.exp(logits - higher[:, None])
        total = shrink * total + jnp.sum(exp, axis=1)
        weighted = shrink * weighted + jnp.sum(exp * jnp.where(new, logits, 0.0), axis=1)
        place = tokens - start
        here = (place >= 0) & (place < size)
        logit = jnp.take_along_axis(logits, jnp.clip(place, 0, size - 1)[:, None], axis=1)[:, 0]
        return (higher, total, weighted, jnp.where(here & (logit > -jnp.inf), logit, own)), None

    zeros = jnp.zeros(len(hidden), jnp.float32)
    first: tuple[jax.Array, ...] = (zeros - jnp.inf, zeros, zeros, zeros)
    tiles = jnp.arange(-(-len(table) // size))
    (top, total, weighted, own), _ = jax.lax.scan(step, first, tiles)
    normalizer = top + jnp.log(total)
    mean = weighted / total  # Of the logits, under the distribution.
    result = (own - normalizer, normalizer - mean)
    return result, (hidden, table, tokens, normalizer, mean)


def _backward(
    temperature: float,
    softcap: float | None,
    size: int,
    residuals: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    """The gradient, with p the distribution over the logits l.

    d log p(token) / d l_j = [j = token] - p_j,  d entropy / d l_j = -p_j (l_j - sum_k p_k l_k).
    """
    hidden, table, tokens, normalizer, mean = residuals
    of_log_prob, of_entropy = (g[:, None] for g in gradients)

    def step(
        carry: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        to_hidden, to_table = carry
        start, new, raw = _tile(i, size, hidden, table)
        logits = _logits(raw, temperature, softcap)
        p = jnp.exp(logits - normalizer[:, None])
        one = (tokens - start)[:, None] == jnp.arange(size)
        to_raw = of_log_prob * (one - p) - of_entropy * p * (logits - mean[:, None])
        to_raw = jnp.where(new, to_raw, 0.0) / temperature
        if softcap is not None:
            to_raw = to_raw * (1 - (logits * temperature / softcap) ** 2)
        to_raw = to_raw.astype(hidden.dtype)
        rows = jax.lax.dynamic_slice_in_dim(table, start, size).astype(hidden.dtype)
        to_hidden += jnp.matmul(to_raw, rows, preferred_element_type=jnp.float32)
        to_rows = jnp.matmul(to_raw.T, hidden, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(to_table, start, size)
        to_table = jax.lax.dynamic_update_slice_in_dim(to_table, before + to_rows, start, 0)
        return (to_hidden, to_table), None

    first = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    tiles = jnp.arange(-(-len(table) // size))
    (to_hidden, to_table), _ = jax.lax.scan(step, first, tiles)
    return to_hidden.astype(hidden.dtype), to_table.astype(table.dtype), None


_tiled.defvjp(_forward, _backward)
