"""Log-probs of tokens, computed without the logits of the whole vocabulary in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLogProbs(NamedTuple):
    """Log-probs of N tokens, and entropies of the distributions over the vocabulary.

    Attributes:
      log_prob: Log-probability of each token, float32 [N], in nats.
      entropy: Entropy of the distribution that each token is sampled from, float32 [N], in nats.
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
    """Returns the log-probs of tokens whose logits are `hidden @ table.T`.

    With the logits l_j, log p(token) = l_token - log sum_j exp(l_j). The forward and the backward
    pass process the vocabulary in tiles, with the sum as in online softmax (Milakov and Gimelshein,
    2018), so that neither holds more than [N, tile] logits. The backward pass recomputes them,
    which costs a third more matrix products.

    Args:
      hidden: Features of the token before each token, float [N, D]; their dtype is that of the
        matrix products.
      table: Weights of the output layer, float [V, D].
      tokens: Token ids, int32 [N] in [0, V).
      temperature: Sampling temperature, by which logits are divided, > 0.
      softcap: Bound c of the logits, which become c * tanh(logits / c) before the temperature is
        applied; None for no bound.
      tile: Number of rows of the table in a tile, > 0.
      shards: Number of equal shards of the table's rows over devices. A tile has equally many rows
        of each shard, so that no device needs the rows of another one.

    Raises:
      ValueError: The temperature or the tile is not positive, or `shards` does not divide the
        number of rows of the table.
    """
    if temperature <= 0 or tile <= 0:
        raise ValueError(f"temperature={temperature} and tile={tile} must be positive.")
    if len(table) % shards:
        raise ValueError(f"shards={shards} does not divide the {len(table)} rows of the table.")
    parts = table.reshape(shards, -1, table.shape[1])
    size = min(max(tile // shards, 1), parts.shape[1])
    return TokenLogProbs(*_tiled(temperature, softcap, size, hidden, parts, tokens))


class _Tile(NamedTuple):
    start: jax.Array  # int32 [], first row of the tile in each shard.
    ids: jax.Array  # int32 [R], token ids of the rows, of all shards.
    new: jax.Array  # bool [R], False for rows that the tile before has too.
    rows: jax.Array  # float [R, D]


def _tile(i: jax.Array, size: int, table: jax.Array) -> _Tile:
    """Returns tile i, with `size` rows of each shard of a table [shards, V / shards, D]."""
    shards, length, width = table.shape
    start = jnp.minimum(i * size, length - size)
    offsets = start + jnp.arange(size)
    ids = (jnp.arange(shards)[:, None] * length + offsets).reshape(-1)
    new = jnp.tile(offsets >= i * size, shards)  # The last tile overlaps the one before.
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
        largest, total, weighted, token_logit = carry
        tile = _tile(i, size, table)
        raw, new = _product(hidden, tile.rows), tile.new
        logits = jnp.where(new, _logits(raw, temperature, softcap), -jnp.inf)
        higher = jnp.maximum(largest, jnp.max(logits, axis=1))
        shrink, exp = jnp.exp(largest - higher), jnp.exp(logits - higher[:, None])
        total = shrink * total + jnp.sum(exp, axis=1)
        weighted = shrink * weighted + jnp.sum(exp * jnp.where(new, logits, 0.0), axis=1)
        # A masked sum needs no gather of the logits, whose rows are sharded over devices.
        is_token = (tokens[:, None] == tile.ids) & new
        token_logit += jnp.sum(jnp.where(is_token, logits, 0.0), axis=1)
        return (higher, total, weighted, token_logit), None

    zeros = jnp.zeros(len(hidden), jnp.float32)
    first: tuple[jax.Array, ...] = (zeros - jnp.inf, zeros, zeros, zeros)
    tiles = jnp.arange(-(-table.shape[1] // size))
    (largest, total, weighted, token_logit), _ = jax.lax.scan(step, first, tiles)
    normalizer = largest + jnp.log(total)
    mean = weighted / total  # The expected logit under the distribution.
    result = (token_logit - normalizer, normalizer - mean)
    return result, (hidden, table, tokens, normalizer, mean)


def _backward(
    temperature: float,
    softcap: float | None,
    size: int,
    residuals: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    """The gradients with respect to `hidden` and `table`, with p = softmax(l).

    d log p(token) / d l_j = [j = token] - p_j,  d entropy / d l_j = -p_j (l_j - sum_k p_k l_k).
    """
    hidden, table, tokens, normalizer, mean = residuals
    grad_log_prob, grad_entropy = (g[:, None] for g in gradients)

    def step(
        carry: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        grad_hidden, grad_table = carry
        tile = _tile(i, size, table)
        logits = _logits(_product(hidden, tile.rows), temperature, softcap)
        p = jnp.exp(logits - normalizer[:, None])
        is_token = tokens[:, None] == tile.ids
        grad_raw = grad_log_prob * (is_token - p) - grad_entropy * p * (logits - mean[:, None])
        grad_raw = jnp.where(tile.new, grad_raw, 0.0) / temperature
        if softcap is not None:
            grad_raw = grad_raw * (1 - (logits * temperature / softcap) ** 2)
        grad_raw = grad_raw.astype(hidden.dtype)
        rows = tile.rows.astype(hidden.dtype)
        grad_hidden += jnp.matmul(grad_raw, rows, preferred_element_type=jnp.float32)
        grad_rows = jnp.matmul(grad_raw.T, hidden, preferred_element_type=jnp.float32)
        grad_rows = grad_rows.reshape(len(table), size, -1)
        before = jax.lax.dynamic_slice_in_dim(grad_table, tile.start, size, axis=1)
        grad_table = jax.lax.dynamic_update_slice_in_dim(
            grad_table, before + grad_rows, tile.start, axis=1
        )
        return (grad_hidden, grad_table), None

    first = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    tiles = jnp.arange(-(-table.shape[1] // size))
    (grad_hidden, grad_table), _ = jax.lax.scan(step, first, tiles)
    return grad_hidden.astype(hidden.dtype), grad_table.astype(table.dtype), None


_tiled.defvjp(_forward, _backward)
