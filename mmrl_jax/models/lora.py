"""Low-rank adapters (LoRA), int8 kernels, and the split of parameters into trainable and frozen.

The variables of a model with adapters are {'params': base, 'lora': adapters}, and each `Dense`
layer applies the adapter at its own path. Policy and reference share one base in memory:

    policy = model.apply({"params": base, "lora": adapters}, ...)
    reference = model.apply({"params": base}, ...)

Paths name `Dense` layers, e.g. 'stack/block_3/attention/query', and patterns must match a full
path. Embedding tables and output heads are not `Dense` layers.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import difflib
import re
from typing import Any

from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

from mmrl_jax.distributed import partition
from mmrl_jax.models.stacked import layer_paths

NEAREST = 5  # Number of paths that an error message lists.


@dataclasses.dataclass(frozen=True)
class LoraGroup:
    """Specification of the adapters of a group of layers.

    Attributes:
      pattern: Regular expression that must match the full path of a `Dense` layer.
      rank: Rank of the adapters, at least 1.
      alpha: Scale of the adapters: their output is multiplied by alpha / rank.
      dropout: Dropout rate of the adapters' inputs in training, in [0, 1).
    """

    pattern: str
    rank: int
    alpha: float
    dropout: float = 0.0


class Adapter(struct.PyTreeNode):
    """The adapter of a layer, which adds alpha / rank * x a b to its output (Hu et al., 2021).

    Only `a` and `b` are leaves, so that no optimizer changes `alpha` or `dropout`.

    Attributes:
      a: Down projection, float32 [D, rank].
      b: Up projection, float32 [rank, features].
      alpha: Scale of the adapter, see `LoraGroup`.
      dropout: Dropout rate of the input, in [0, 1); it is applied when there is a key.
    """

    a: jax.Array
    b: jax.Array
    alpha: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def gathered(self, path: Sequence[str]) -> "Adapter":
        """Returns the adapter at a path with its matrices gathered, see `partition.gathered`."""
        a, b = (partition.gathered(getattr(self, name), (*path, name)) for name in ("a", "b"))
        return self.replace(a=a, b=b)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps [N, D] to [N, features] in the dtype of `x`, with dropout if there is a key."""
        if key is not None and self.dropout > 0.0:
            keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.dropout), 0)
        return self.scale * ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))


def init(key: jax.Array, params: Any, groups: Sequence[LoraGroup]) -> dict[str, Any]:
    """Initializes adapters as in PEFT: `a` is uniform in +-1 / sqrt(D), and `b` is zero.

    Args:
      key: PRNG key.
      params: Nested dict of parameters or of their shapes.
      groups: Adapter groups; a layer gets its adapter from the first group that matches its path.

    Returns:
      The collection 'lora' as a nested dict.

    Raises:
      ValueError: A group is the first match of no layer, or has a value out of range.
    """
    for group in groups:
        if group.rank < 1 or not 0.0 <= group.dropout < 1.0:
            raise ValueError(f"{group} needs a rank of at least 1 and a dropout in [0, 1).")
    kernels, chosen = dense_kernels(params), {}
    for group in groups:
        matching = _matching(group.pattern, kernels, params)
        fresh = [path for path in matching if path not in chosen]
        if not fresh:
            raise ValueError(f"Groups before {group} take all layers that it matches: {matching}.")
        chosen |= dict.fromkeys(fresh, group)
    uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    flat = {}
    for path, k in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        group, (inputs, features) = chosen[path], kernels[path].shape
        flat[f"{path}/adapter"] = Adapter(
            uniform(k, (inputs, group.rank), jnp.float32),
            jnp.zeros((group.rank, features), jnp.float32),
            group.alpha,
            group.dropout,
        )
    return unflatten_dict(flat, sep="/")


def adapters(lora: Any) -> dict[str, Adapter]:
    """Returns the adapter of each layer, by the path of the layer."""
    return {
        path.removesuffix("/adapter"): adapter
        for path, adapter in flatten_dict(lora, sep="/").items()
    }


def dense_kernels(params: Any) -> dict[str, Any]:
    """Returns the kernel of each `Dense` layer, by the path of the layer."""
    return {
        path.removesuffix("/kernel"): x
        for path, x in flatten_dict(params, sep="/").items()
        if path.endswith("/kernel")
    }


def merge(params: Any, lora: Any) -> dict[str, Any]:
    """Returns parameters that compute by themselves what `params` compute with the adapters.

    Raises:
      ValueError: An adapter belongs to a layer that does not exist, or whose kernel is int8.
    """
    return _added(params, lora, 1.0)


def unmerge(params: Any, lora: Any) -> dict[str, Any]:
    """Undoes `merge` up to the rounding of the kernels' dtype, and raises the same errors."""
    return _added(params, lora, -1.0)


def _added(params: Any, lora: Any, sign: float) -> dict[str, Any]:
    flat = flatten_dict(params, sep="/")
    for path, adapter in adapters(lora).items():
        kernel = flat.get(f"{path}/kernel")
        if kernel is None:
            raise ValueError(f"The parameters have no layer {path!r}, but there is an adapter.")
        if kernel.dtype == jnp.int8:
            raise ValueError(f"{path}/kernel is int8; merge before `quantize`.")
        product = jnp.matmul(adapter.a, adapter.b, precision="highest")
        added = kernel.astype(jnp.float32) + sign * adapter.scale * product
        flat[f"{path}/kernel"] = added.astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def quantize(params: Any, pattern: str) -> dict[str, Any]:
    """Quantizes kernels to int8 with one float32 scale per output (Dettmers et al., 2022).

    The quantization is symmetric. The error of a weight is at most half a step, which is max|w| of
    its column / 254. Quantized parameters cannot be trained.

    Args:
      params: Nested dict of parameters.
      pattern: Regular expression that must match the full paths of the layers.

    Returns:
      Nested dict with 'kernel' int8 [D, features] and 'kernel_scale' float32 [features].

    Raises:
      ValueError: The pattern matches no layer, or one whose kernel is already int8.
    """
    kernels, flat = dense_kernels(params), flatten_dict(params, sep="/")
    for path in _matching(pattern, kernels, params):
        if kernels[path].dtype == jnp.int8:
            raise ValueError(f"{path}/kernel is int8 already.")
        kernel = kernels[path].astype(jnp.float32)
        scale = jnp.max(jnp.abs(kernel), axis=0) / 127
        scale = jnp.where(scale > 0, scale, 1.0)
        flat[f"{path}/kernel"] = jnp.round(kernel / scale).astype(jnp.int8)
        flat[f"{path}/kernel_scale"] = scale
    return unflatten_dict(flat, sep="/")


def split(tree: Any, trainable: str) -> tuple[Any, Any]:
    """Splits a pytree into trainable and frozen parts, each with None in place of other leaves.

    Args:
      tree: Any pytree.
      trainable: Regular expression that must match the full path of a trainable leaf, e.g.
        'params/stack/block_3/mlp_in/kernel'; blocks that are scanned have the paths of unrolled
        ones, see `models.stacked`.

    Returns:
      The trainable and the frozen part, of the same structure as `tree` except for the Nones.

    Raises:
      ValueError: The pattern matches no leaf, or only some layers of blocks that are scanned.
    """
    paths = [
        layer_paths(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    chosen = [_is_trainable(trainable, names) for names in paths]
    if not any(chosen):
        raise ValueError(f"{trainable!r} matches no leaf; {_nearest(trainable, sum(paths, []))}")
    leaves, structure = jax.tree.flatten(tree)
    parts = (
        [
            x if is_trainable == part else None
            for x, is_trainable in zip(leaves, chosen, strict=True)
        ]
        for part in (True, False)
    )
    trained, frozen = (jax.tree.unflatten(structure, part) for part in parts)
    return trained, frozen


def _is_trainable(pattern: str, paths: Sequence[str]) -> bool:
    """Returns whether a pattern matches a leaf, given its path in each layer that it covers.

    The scales of int8 kernels are not trainable, because they belong to frozen kernels.
    """
    if paths[0].endswith("/kernel_scale"):
        return False
    matches = [re.fullmatch(pattern, path) is not None for path in paths]
    if any(matches) and not all(matches):
        raise ValueError(
            f"{pattern!r} matches {paths[matches.index(True)]!r} and not "
            f"{paths[matches.index(False)]!r}, but model.scan_layers=True trains all layers of a "
            "stack or none; change one of them."
        )
    return matches[0]


def join(trainable: Any, frozen: Any) -> Any:
    """Undoes `split`: returns the tree that has both parts."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def _matching(pattern: str, kernels: Iterable[str], params: Any) -> list[str]:
    """Returns the layers that a pattern matches, at least one."""
    matching = [path for path in kernels if re.fullmatch(pattern, path)]
    if matching:
        return matching
    others = [path for path in flatten_dict(params, sep="/") if re.fullmatch(pattern, path)]
    if others:
        raise ValueError(
            f"{pattern!r} matches {others[:NEAREST]}, but none of them is a Dense layer. Embedding "
            "tables, output heads and norms can have neither adapters nor int8 weights. Name the "
            "path of a layer, without '/kernel'."
        )
    raise ValueError(f"{pattern!r} matches no Dense layer; {_nearest(pattern, kernels)}")


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, list(paths), NEAREST, cutoff=0.0)
    return f"a pattern must match the full path. The nearest paths are {near}."
