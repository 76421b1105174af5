"""Flash attention by kernels of JAX: splash attention on TPU, and cuDNN on NVIDIA GPUs.

A kernel computes attention in tiles, with running statistics of the softmax, so that the memory it
needs grows with the number of tokens and not with its square (Dao et al., 2022). The kernels
compute in bfloat16 with float32 statistics. Outputs at padding have no meaning, but are finite.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from mmrl_jax.distributed.mesh import TENSOR, batch_axes, batch_shards
from mmrl_jax.models.masks import Mask

Kernel = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]

LANES = 128  # Number of keys in the smallest tile; with fewer keys a kernel saves nothing.
_TILES = (640, 512, 384, 256, LANES)  # Sizes of tiles that fit into the memory of a TPU's core.
_NOWHERE = np.iinfo(np.int32).min  # Segment of padding.


def kernels(
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> dict[str, Kernel]:
    """Returns the kernels that serve an attention, by platform; the others have none.

    Args:
      query: Shape and dtype of the queries, [B, Q, N, H].
      key: Shape and dtype of the keys and of the values, [B, S, K, H].
      mask: Attention mask.
      scale: Factor of the attention logits.
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if query.dtype != jnp.bfloat16 or query.shape[1] == 1 or key.shape[1] < LANES:
        return {}
    if not mesh.empty and query.shape[0] % batch_shards(mesh):
        return {}
    found: dict[str, Kernel] = {}
    if mask.explicit is None and (mask.window is None or _counted(mask, query, key)):
        found["tpu"] = functools.partial(splash, scale=scale, softcap=softcap)
    if softcap is None and _cudnn_accepts(query, key, mask, scale):
        found["cuda"] = functools.partial(cudnn, scale=scale)
    return {
        platform: functools.partial(_on_each_device, kernel) for platform, kernel in found.items()
    }


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention by the splash attention kernel for TPU.

    Args:
      query: Queries of N heads of size H, float [B, Q, N, H].
      key: Keys, float [B, S, K, H]; K must divide N.
      value: Values, float [B, S, K, H].
      mask: Attention mask without `explicit`; its window must be over contiguous positions.
      scale: Factor of the attention logits.
      softcap: Bound of the attention logits, see `BlockSpec`; None for no bound.
      interpret: Whether to interpret the kernel, on any platform.

    Returns:
      Attention output [B, Q, N, H], in the dtype of `query`.
    """
    # Pallas is imported where it is used: it takes most of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    run = functools.partial(splash, scale=scale, softcap=softcap, interpret=interpret)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    if mask.prefix is not None:
        # The prefix precedes all other valid tokens: its own attention is over the prefix alone,
        # and that of the tokens after it is causal.
        readable = mask.prefix if mask.valid is None else mask.prefix & mask.valid
        both_ways = Mask(segments=readable.astype(jnp.int32))
        inside = run(query, key, value, both_ways)
        outside = run(query, key, value, mask.replace(prefix=None))
        return jnp.where(mask.prefix[:, keys - queries :, None, None], inside, outside)
    padded = _tiling(queries)[0], _tiling(keys)[0]
    ids = None
    if mask.valid is not None or mask.segments is not None or padded != (queries, keys):
        ids = jnp.zeros((batch, keys), jnp.int32) if mask.segments is None else mask.segments
        if mask.valid is not None:
            ids = jnp.where(mask.valid, ids, _NOWHERE)
        pads = (
            ((0, 0), (0, n - length)) for n, length in zip(padded, (queries, keys), strict=True)
        )
        query_ids, key_ids = (
            jnp.pad(x, pad, constant_values=_NOWHERE)
            for x, pad in zip((ids[:, keys - queries :], ids), pads, strict=True)
        )
        ids = SegmentIds(query_ids, key_ids)

    def tiled(x: jax.Array, length: int) -> jax.Array:
        """Maps [B, S, N, H] to [B, N, length, H]."""
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

    window = None if mask.window is None or mask.window >= keys else mask.window
    kernel = _splash_kernel(
        (queries, keys), padded, heads, mask.causal, window, mask.readouts, softcap, interpret
    )
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # The kernel has no scale.
    inputs = tiled(query, padded[0]), tiled(key, padded[1]), tiled(value, padded[1])
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(*inputs, ids)
    return jnp.swapaxes(out[:, :, :queries], 1, 2)


def _tiling(length: int) -> tuple[int, int]:
    """Returns the number of tokens after padding, and the size of a tile, which divides it.

    Small tiles are slow, and so is much padding: the choice assumes that a tile takes the time of
    `LANES` more tokens, which has not been measured.
    """
    first = -(-length // LANES) * LANES
    padded = range(first, first + max(_TILES), LANES)
    sizes = [(n, next(tile for tile in _TILES if n % tile == 0)) for n in padded]
    return min(sizes, key=lambda size: size[0] * (1 + LANES / size[1]))


@functools.cache
def _splash_kernel(
    lengths: tuple[int, int],
    padded: tuple[int, int],
    heads: int,
    causal: bool,
    window: int | None,
    readouts: int,
    softcap: float | None,
    interpret: bool,
) -> Callable[..., jax.Array]:
    """Returns the kernel for queries and keys of given numbers, before and after padding."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    queries, keys = lengths
    behind = keys - queries  # Number of keys before that of the first query.
    mask: Any = splash_lib.FullMask(padded)
    if causal:
        mask = splash_lib.CausalMask(padded, offset=behind)
    if window is not None:
        mask = mask & splash_lib.LocalMask(padded, (window - 1, None), offset=behind)
    if readouts:
        key = np.arange(padded[1])
        query = np.arange(padded[0])[:, None] + behind
        first = keys - readouts
        mask = mask & splash_lib.NumpyMask((key < first) | (query < first) | (key == query))
    block_q, block_kv = (_tiling(length)[1] for length in lengths)
    sizes = splash_lib.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    # The kernel's tables are made now, also while a program is traced, since they are kept.
    with jax.ensure_compile_time_eval():
        kernel = splash_lib.make_splash_mha(
            splash_lib.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, *, scale: float
) -> jax.Array:
    """Attention by the flash attention of cuDNN, in bfloat16 or float16 alone.

    cuDNN knows causal masks, windows and lengths; for others it reads a bias [B, 1, Q, S].

    Args:
      query: Queries of N heads of size H, float [B, Q, N, H].
      key: Keys, float [B, S, K, H]; K must divide N.
      value: Values, float [B, S, K, H].
      mask: Attention mask.
      scale: Factor of the attention logits.

    Returns:
      Attention output [B, Q, N, H], in the dtype of `query`.

    Raises:
      NotImplementedError: cuDNN does not support the size of a head on this GPU.
      RuntimeError: cuDNN is not installed.
    """
    run = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    queries, keys = query.shape[1], key.shape[1]
    if not _has_lengths(mask, query, key):
        # With a bias, gradients need even lengths.
        allowed = mask.allowed(queries, keys)
        allowed = jnp.broadcast_to(allowed, (allowed.shape[0], queries, keys))
        rows, columns = (0, queries % 2), (0, keys % 2)
        query = jnp.pad(query, ((0, 0), rows, (0, 0), (0, 0)))
        key, value = (jnp.pad(x, ((0, 0), columns, (0, 0), (0, 0))) for x in (key, value))
        allowed = jnp.pad(allowed, ((0, 0), rows, columns))
        return run(query, key, value, mask=allowed[:, None])[:, :queries]
    window = None if mask.window is None or mask.window >= keys else (mask.window - 1, 0)
    run = functools.partial(run, is_causal=mask.causal, local_window_size=window)
    if mask.valid is None:
        return run(query, key, value)
    # Padding is moved behind the other tokens, whose order is kept. A row needs one token.
    valid = jnp.broadcast_to(mask.valid, (query.shape[0], keys))
    order = jnp.argsort(~valid, axis=1, stable=True)
    lengths = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32), 1)
    moved = (_take_tokens(x, order) for x in (query, key, value))
    out = run(*moved, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    out = _take_tokens(out, jnp.argsort(order, axis=1))
    return jnp.where(valid[:, :, None, None], out, 0)


def _take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """Permutes the tokens of [B, S, ...] by an index int32 [B, S]."""
    # Unique indices spare the gradient atomic additions.
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, index].get(unique_indices=True, mode="promise_in_bounds")


def _counted(mask: Mask, query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct) -> bool:
    """Returns whether a window over positions is one over the indices of tokens."""
    return mask.contiguous and query.shape[1] == key.shape[1]


def _has_lengths(mask: Mask, query: jax.Array, key: jax.Array) -> bool:
    """Returns whether a mask has no conditions but a causal order, a window and padding."""
    others = mask.segments, mask.prefix, mask.explicit
    if mask.readouts or any(x is not None for x in others) or query.shape[1] != key.shape[1]:
        return False
    return mask.window is None or (mask.causal and mask.contiguous)


def _cudnn_accepts(
    query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct, mask: Mask, scale: float
) -> bool:
    """Returns whether cuDNN is installed and supports an attention and its gradient."""

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(cudnn(query, key, value, mask, scale=scale).astype(jnp.float32))

    try:
        jax.eval_shape(jax.grad(total, (0, 1, 2)), query, key, key)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _on_each_device(
    kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask
) -> jax.Array:
    """Runs a kernel on each device's samples and heads: XLA cannot split a kernel itself.

    Where the axis 'tensor' does not divide the heads, every device computes all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value, mask)
    tensor = mesh.shape.get(TENSOR, 1)
    heads = None if tensor == 1 or query.shape[2] % tensor or key.shape[2] % tensor else TENSOR
    samples = batch_axes(mesh)
    split = PartitionSpec(samples, None, heads)
    batch = query.shape[0]
    masks = jax.tree.map(lambda x: PartitionSpec(samples if x.shape[0] == batch else None), mask)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(split, split, split, masks),
        out_specs=split,
        check_vma=False,
    )(query, key, value, mask)
