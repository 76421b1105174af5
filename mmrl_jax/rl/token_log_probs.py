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
    shards: int = 1,
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
      shards: number of equal parts that the table's rows are split into over devices. A tile takes
        as many rows of each part, so that no device needs another's.

    Raises:
      ValueError: the temperature or the tile is not positive, or the shards do not divide the rows
        of the table.
    """
    if temperature <= 0 or tile <= 0:
        raise ValueError(f"temperature={temperature} and tile={tile} must be positive.")
    if len(table) % shards:
        raise ValueError(f"shards={shards} do not divide the {len(table)} rows of the table.")
    parts = table.reshape(shards, -1, table.shape[1])
    size = min(max(tile // shards, 1), parts.shape[1])
    return TokenLogProbs(*_tiled(temperature, softcap, size, hidden, parts, tokens))


class _Tile(NamedTuple):
    start: jax.Array  # int32 [], its first row in each shard.
    ids: jax.Array  # int32 [N], the tokens of its rows, of all shards.
    new: jax.Array  # bool [N], the rows that no earlier tile had.
    rows: jax.Array  # [N, D]


def _tile(i: jax.Array, size: int, table: jax.Array) -> _Tile:
    """Tile i of `size` rows of each shard of the table [shards, V / shards, D]."""
    shards, length, width = table.shape
    start = jnp.minimum(i * size, length - size)
    offsets = start + jnp.arange(size)
    ids = (jnp.arange(shards)[:, None] * length + offsets).reshape(-1)
    new = jnp.tile(offsets >= i * size, shards)  # The last tile reaches back into the one before.
    rows = jax.lax.dynamic_slice_in_dim(table, start, size, axis=1).reshape(-1, width)
    return _Tile(start, ids, new, rows)


def _product(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, rows.astype(hidden.dtype).T, preferred_element_type=jnp.float32)


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
        tile = _tile(i, size, table)
        raw, new = _product(hidden, tile.rows), tile.new
        logits = jnp.where(new, _logits(raw, temperature, softcap), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        shrink, exp = jnp.exp(top - higher), jnp.exp(logits - higher[:, None])
        total = shrink * total + jnp.sum(exp, axis=1)
        weighted = shrink * weighted + jnp.sum(exp * jnp.where(new, logits, 0.0), axis=1)
        # A sum, for no device has the logits of all rows, and those of one it need not gather.
        is_token = (tokens[:, None] == tile.ids) & new
        own += jnp.sum(jnp.where(is_token, logits, 0.0), axis=1)
        return (higher, total, weighted, own), None

    zeros = jnp.zeros(len(hidden), jnp.float32)
    first: tuple[jax.Array, ...] = (zeros - jnp.inf, zeros, zeros, zeros)
    tiles = jnp.arange(-(-table.shape[1] // size))
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
        tile = _tile(i, size, table)
        logits = _logits(_product(hidden, tile.rows), temperature, softcap)
        p = jnp.exp(logits - normalizer[:, None])
        one = tokens[:, None] == tile.ids
        to_raw = of_log_prob * (one - p) - of_entropy * p * (logits - mean[:, None])
        to_raw = jnp.where(tile.new, to_raw, 0.0) / temperature
        if softcap is not None:
            to_raw = to_raw * (1 - (logits * temperature / softcap) ** 2)
        to_raw = to_raw.astype(hidden.dtype)
        rows = tile.rows.astype(hidden.dtype)
        to_hidden += jnp.matmul(to_raw, rows, preferred_element_type=jnp.float32)
        to_rows = jnp.matmul(to_raw.T, hidden, preferred_element_type=jnp.float32)
        to_rows = to_rows.reshape(len(table), size, -1)
        before = jax.lax.dynamic_slice_in_dim(to_table, tile.start, size, axis=1)
        to_table = jax.lax.dynamic_update_slice_in_dim(
            to_table, before + to_rows, tile.start, axis=1
        )
        return (to_hidden, to_table), None

    first = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    tiles = jnp.arange(-(-table.shape[1] // size))
    (to_hidden, to_table), _ = jax.lax.scan(step, first, tiles)
    return to_hidden.astype(hidden.dtype), to_table.astype(table.dtype), None


_tiled.defvjp(_forward, _backward)
