"""Scaled dot-product attention, and the choice of who computes it.

`attend` and `attend_cached` are what models call. In bfloat16 and with enough keys, attention is
computed by a kernel on TPU and on NVIDIA GPUs, see `flash`. Everything else, and everything on CPU,
is computed here by XLA, with float32 attention logits [B, N, Q, S].
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Literal

import jax
import jax.numpy as jnp

from mmrl_jax.models import flash
from mmrl_jax.models.masks import Mask

NEGATIVE = -1e30  # It is finite, so that a row whose keys are all masked has finite gradients.

Implementation = Literal["auto", "xla"]

_implementation: contextvars.ContextVar[Implementation] = contextvars.ContextVar(
    "implementation", default="auto"
)


@contextlib.contextmanager
def attention_by(name: Implementation) -> Iterator[None]:
    """Context in which models are traced with or without attention kernels.

    Args:
      name: 'auto' for a kernel where there is one, 'xla' for no kernel.
    """
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    initializing: bool = False,
) -> jax.Array:
    """Scaled dot-product attention by the platform's kernel, or by XLA where there is none.

    The platform is the one that a program is lowered for, which need not be present.

    Args:
      query: Queries of N heads of size H, float [B, Q, N, H].
      key: Keys, float [B, S, K, H]; K must divide N, and N / K neighboring heads share a key head.
      value: Values, float [B, S, K, H].
      mask: Attention mask.
      scale: Factor of the attention logits; None for 1 / sqrt(H).
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.
      initializing: Whether a module is being initialized, which no kernel does: the devices that
        parameters are initialized on are not known in the model.

    Returns:
      Attention output [B, Q, N, H], in the dtype of `value`.
    """
    lengths = query.shape[1], key.shape[1]

    def by_xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
        allowed = mask.allowed(*lengths)
        return attention(query, key, value, allowed, scale=scale, softcap=softcap)

    kernels = _kernels(query, key, mask, scale, softcap, initializing)
    if not kernels:
        return by_xla(query, key, value, mask)
    # The gradient keeps what any of the branches keeps: with checkpoint, no attention logits.
    return jax.lax.platform_dependent(
        query, key, value, mask, default=jax.checkpoint(by_xla), **kernels
    )


def attend_cached(
    query: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    initializing: bool = False,
) -> jax.Array:
    """`attend` over a prefix that G neighboring samples share and over each sample's own keys.

    A kernel reads a copy of the prefix for each sample.

    Args:
      query: Queries of N heads of size H, float [B * G, Q, N, H].
      prefix: Keys and values of the shared prefix, float [B, K, S, H] each.
      own: Keys and values of each sample, float [B * G, K, T, H] each.
      mask: Attention mask over the S + T keys. Unless it is explicit, the queries are those of the
        last Q keys.
      scale: Factor of the attention logits; None for 1 / sqrt(H).
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.
      initializing: Whether a module is being initialized, which no kernel does: the devices that
        parameters are initialized on are not known in the model.

    Returns:
      Attention output [B * G, Q, N, H], in the dtype of the values.
    """
    Pair = tuple[jax.Array, jax.Array]
    samples, queries = query.shape[:2]
    keys = prefix[0].shape[2] + own[0].shape[2]

    def by_xla(query: jax.Array, prefix: Pair, own: Pair, mask: Mask) -> jax.Array:
        allowed = mask.allowed(queries, keys)
        return cached_attention(query, prefix, own, allowed, scale=scale, softcap=softcap)

    def joined(prefix: Pair, own: Pair) -> Pair:
        """Returns the keys and the values of each sample, float [B * G, S + T, K, H]."""
        group = samples // len(prefix[0])
        both = ((jnp.repeat(x, group, axis=0), y) for x, y in zip(prefix, own, strict=True))
        key, value = (jnp.swapaxes(jnp.concatenate(pair, axis=2), 1, 2) for pair in both)
        return key, value

    key, _ = jax.eval_shape(joined, prefix, own)
    kernels = _kernels(query, key, mask, scale, softcap, initializing)
    if not kernels:
        return by_xla(query, prefix, own, mask)

    def over_joined(kernel: flash.Kernel) -> Callable[..., jax.Array]:
        return lambda query, prefix, own, mask: kernel(query, *joined(prefix, own), mask)

    return jax.lax.platform_dependent(
        query,
        prefix,
        own,
        mask,
        default=jax.checkpoint(by_xla),
        **{platform: over_joined(kernel) for platform, kernel in kernels.items()},
    )


def _kernels(
    query: jax.Array,
    key: jax.Array | jax.ShapeDtypeStruct,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    initializing: bool,
) -> dict[str, flash.Kernel]:
    if initializing or _implementation.get() == "xla":
        return {}
    queries, keys = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))
    scale = scale or query.shape[-1] ** -0.5
    return flash.kernels(queries, keys, mask, scale=scale, softcap=softcap)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax (Vaswani et al., 2017).

    Args:
      query: Queries of N heads of size H, float [B, Q, N, H].
      key: Keys, float [B, S, K, H]; K must divide N, and N / K neighboring heads share a key head.
      value: Values, float [B, S, K, H].
      mask: Attention mask, bool and broadcastable to [B, Q, S], True where query q may read key s.
      scale: Factor of the attention logits; None for 1 / sqrt(H).
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.

    Returns:
      Attention output [B, Q, N, H], in the dtype of `value`. A query whose keys are all masked gets
      the mean value.
    """
    batch, queries, heads, size = query.shape
    groups, length = key.shape[2], key.shape[1]
    # Heads come before tokens, so that XLA's CPU backend runs plain batched matmuls, whose forward
    # and backward passes take half the time of an einsum over [B, S, N, H].
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    query = query.reshape(batch, groups, -1, size)
    scores = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, queries, length) * (scale or size**-0.5)
    weights = _softmax(scores, mask, softcap).astype(value.dtype)
    mixed = jnp.matmul(weights.reshape(batch, groups, -1, length), value)
    return jnp.swapaxes(mixed.reshape(batch, heads, queries, size), 1, 2)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Returns the weights by which `attention` mixes the values, float32 [B, N, Q, S].

    Args:
      query: Queries of N heads of size H, float [B, Q, N, H].
      key: Keys, float [B, S, K, H]; K must divide N, and N / K neighboring heads share a key head.
      mask: Attention mask, bool and broadcastable to [B, Q, S], True where query q may read key s.
      scale: Factor of the attention logits; None for 1 / sqrt(H).
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.
    """
    heads, size = query.shape[2:]
    key = jnp.repeat(key, heads // key.shape[2], axis=2)
    scores = jnp.einsum("bqnh,bsnh->bnqs", query, key, preferred_element_type=jnp.float32)
    return _softmax(scores * (scale or size**-0.5), mask, softcap)


def cached_attention(
    query: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`attention` over a prefix that G neighboring samples share and over each sample's own keys.

    Args:
      query: Queries of N heads of size H, float [B * G, Q, N, H].
      prefix: Keys and values of the shared prefix, float [B, K, S, H] each.
      own: Keys and values of each sample, float [B * G, K, T, H] each.
      mask: Attention mask, bool and broadcastable to [B * G, Q, S + T].
      scale: Factor of the attention logits; None for 1 / sqrt(H).
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.

    Returns:
      Attention output [B * G, Q, N, H], in the dtype of the values.
    """
    samples, queries, heads, size = query.shape
    batch, groups, length, _ = prefix[0].shape
    rows = (heads // groups) * queries  # Number of queries that read the same keys.
    query = jnp.swapaxes(query, 1, 2).reshape(samples, groups, rows, size)

    def fold(x: jax.Array) -> jax.Array:
        """Concatenates the rows of the samples of a group."""
        x = jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
        return x.reshape(batch, groups, -1, x.shape[-1])

    def unfold(x: jax.Array) -> jax.Array:
        """Undoes `fold`."""
        x = jnp.swapaxes(x.reshape(batch, groups, -1, rows, x.shape[-1]), 1, 2)
        return x.reshape(samples, groups, rows, x.shape[-1])

    def scores(q: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.matmul(q, jnp.swapaxes(keys, 2, 3), preferred_element_type=jnp.float32)

    both = [unfold(scores(fold(query), prefix[0])), scores(query, own[0])]
    score = jnp.concatenate(both, axis=-1).reshape(samples, heads, queries, -1)
    weights = _softmax(score * (scale or size**-0.5), mask, softcap).astype(own[1].dtype)
    weights = weights.reshape(samples, groups, rows, -1)
    mixed = unfold(jnp.matmul(fold(weights[..., :length]), prefix[1]))
    mixed = mixed + jnp.matmul(weights[..., length:], own[1])
    return jnp.swapaxes(mixed.reshape(samples, heads, queries, size), 1, 2)


def _softmax(scores: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    """Returns attention weights of scaled scores, float32 [B, N, Q, S]."""
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jax.nn.softmax(jnp.where(mask[:, None], scores, NEGATIVE), axis=-1)
