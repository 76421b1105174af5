"""Low-rank adapters, int8 matrices, and splits into trained and frozen parameters.

The variables of a model with adapters are {'params': base, 'lora': adapters}, and `Dense` adds the
adapter that stands at its own path. Policy and reference share one base in memory:

    policy = model.apply({"params": base, "lora": adapters}, ...)
    reference = model.apply({"params": base}, ...)

Paths are those of `Dense` layers, e.g. 'stack/block_3/attention/query'; patterns match all of one.
Embedding tables and output heads are no `Dense` layers.
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

NEAREST = 5  # Paths that an error lists.


@dataclasses.dataclass(frozen=True)
class LoraGroup:
    """Matrices that get adapters of one kind.

    Attributes:
      pattern: regular expression that matches the whole path of a `Dense` layer.
      rank: of the adapters, at least 1.
      alpha: what an adapter adds is scaled by alpha / rank.
      dropout: share of the adapter's inputs that are dropped in training, in [0, 1).
    """

    pattern: str
    rank: int
    alpha: float
    dropout: float = 0.0


class Adapter(struct.PyTreeNode):
    """What is added to a layer: alpha / rank * x a b (Hu et al., 2021).

    `a` and `b` alone are leaves, so that no optimizer moves `alpha` and `dropout`.

    Attributes:
      a: float32 [D, rank].
      b: float32 [rank, features].
      alpha: see `LoraGroup`.
      dropout: see `LoraGroup`.
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

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps [N, D] to [N, features], in the dtype of `x`; no dropout without a key."""
        if key is not None and self.dropout > 0.0:
            keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.dropout), 0)
        return self.scale * ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))


def init(key: jax.Array, params: Any, groups: Sequence[LoraGroup]) -> dict[str, Any]:
    """Adapters that add nothing yet: `a` is uniform in +-1 / sqrt(D), as in PEFT, and `b` zero.

    Args:
      key: PRNG key.
      params: nested dict of parameters, or of their shapes.
      groups: a layer gets its adapter from the first group that matches its path.

    Returns:
      Nested dict, the collection 'lora'.

    Raises:
      ValueError: a group that is the first of no layer, or whose numbers are out of range.
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
    """The path of the layer -> its adapter."""
    return {
        path.removesuffix("/adapter"): adapter
        for path, adapter in flatten_dict(lora, sep="/").items()
    }


def dense_kernels(params: Any) -> dict[str, Any]:
    """The path of a `Dense` layer -> its kernel."""
    return {
        path.removesuffix("/kernel"): x
        for path, x in flatten_dict(params, sep="/").items()
        if path.endswith("/kernel")
    }


def merge(params: Any, lora: Any) -> dict[str, Any]:
    """Parameters that do by themselves what `params` do with the adapters.

    Raises:
      ValueError: an adapter of a layer that is not there, or whose kernel is int8.
    """
    return _added(params, lora, 1.0)


def unmerge(params: Any, lora: Any) -> dict[str, Any]:
    """Undoes `merge`, up to the rounding of the kernels' dtype; for errors see there."""
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
    """Makes kernels int8, symmetric, with a float32 scale for each output (Dettmers et al., 2022).

    A weight is off by at most half a step, max|w| of its column / 254. Such parameters are frozen.

    Args:
      params: nested dict.
      pattern: regular expression that matches the whole paths of the layers.

    Returns:
      Nested dict, with int8 [D, features] for 'kernel', and beside it 'kernel_scale' [features].

    Raises:
      ValueError: the pattern matches no layer, or one whose kernel is int8 already.
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
    """Splits a pytree in two, each with None, which is no leaf, in the places of the other's.

    Args:
      tree: any pytree.
      trainable: regular expression that matches the whole paths, e.g.
        'params/stack/block_3/mlp_in/kernel', of the leaves of the first.

    Returns:
      The trainable and the frozen half.

    Raises:
      ValueError: the pattern matches no leaf.
    """
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    chosen = [re.fullmatch(trainable, path) is not None for path in paths]
    if not any(chosen):
        raise ValueError(f"{trainable!r} matches no leaf; {_nearest(trainable, paths)}")
    leaves, structure = jax.tree.flatten(tree)
    halves = (
        [x if is_first == first else None for x, is_first in zip(leaves, chosen, strict=True)]
        for first in (True, False)
    )
    trained, frozen = (jax.tree.unflatten(structure, half) for half in halves)
    return trained, frozen


def join(trainable: Any, frozen: Any) -> Any:
    """Undoes `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def _matching(pattern: str, kernels: Iterable[str], params: Any) -> list[str]:
    """The layers that a pattern matches, at least one."""
    matching = [path for path in kernels if re.fullmatch(pattern, path)]
    if matching:
        return matching
    others = [path for path in flatten_dict(params, sep="/") if re.fullmatch(pattern, path)]
    if others:
        raise ValueError(
            f"{pattern!r} matches {others[:NEAREST]}, but none of them is a Dense layer: embedding "
            "tables, output heads and norms have no adapters and no int8; name the path of a "
            "layer, without '/kernel'."
        )
    raise ValueError(f"{pattern!r} matches no Dense layer; {_nearest(pattern, kernels)}")


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, list(paths), NEAREST, cutoff=0.0)
    return f"a pattern matches the whole path. The nearest paths are {near}."
