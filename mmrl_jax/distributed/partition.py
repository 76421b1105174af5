"""Partition rules, which map parameter paths to shardings.

As in t5x and big_vision, the first rule whose pattern matches a whole path gives the mesh axes over
which the dimensions of that array are split. Paths are written as in `models.lora`. The rules also
apply to optimizer states, whose paths end with the paths of their parameters.
"""

from collections.abc import Sequence
import difflib
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mmrl_jax.distributed.mesh import AXES, FSDP, TENSOR, batch_axes, batch_shards, split_samples

Rules = Sequence[tuple[str, PartitionSpec]]
# Name of the parameters of all blocks of a stack together, whose first dimension is the layer and
# is never split, see `models.stacked`.
BLOCKS = "blocks"

# The first matrix of attention or an MLP splits its outputs over 'tensor', and the second splits
# its inputs, so that only the sum at the end crosses devices (Shoeybi et al., 2019, Megatron-LM).
# The other dimension of each matrix is split over 'fsdp'. An adapter's A is split like the inputs
# of its matrix and its B like the outputs; the rank is never split. Small arrays are replicated.
_OUT = r".*/(attention/out|mlp_out)"
RULES: Rules = (
    (r"(.*/)?table", PartitionSpec(TENSOR, FSDP)),
    (r"(.*/)?head", PartitionSpec(FSDP, TENSOR)),
    # The rows of a convolution kernel are not split: no checkpoint file stores them contiguously.
    (r"(.*/)?patch_embedding/kernel", PartitionSpec(None, (TENSOR, FSDP))),
    (rf"{_OUT}/kernel", PartitionSpec(TENSOR, FSDP)),
    (rf"{_OUT}/adapter/a", PartitionSpec(TENSOR, None)),
    (rf"{_OUT}/adapter/b", PartitionSpec(None, FSDP)),
    (r"(.*/)?kernel", PartitionSpec(FSDP, TENSOR)),
    (r"(.*/)?adapter/a", PartitionSpec(FSDP, None)),
    (r"(.*/)?adapter/b", PartitionSpec(None, TENSOR)),
    (r".*", PartitionSpec()),
)


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES, *, without: tuple[str, ...] = ()) -> Any:
    """Returns the sharding of each leaf of a pytree according to the partition rules.

    An axis of a rule is ignored if the mesh does not have it, or if its size does not divide the
    dimension, which is then not split over that axis.

    Args:
      tree: Pytree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: Device mesh.
      rules: Pairs of a regular expression for a whole path and a partition spec. The first rule
        that matches the path of a leaf applies.
      without: Axes of the mesh over which nothing is split.

    Returns:
      Pytree of `NamedSharding` with the structure of `tree`.

    Raises:
      ValueError: If no rule matches a leaf, a rule has more dimensions than its leaf, or a rule
        names an axis that is neither in the mesh nor in `mesh.AXES`.
    """
    for pattern, spec in rules:
        for axis in (axis for entry in spec for axis in _axes(entry)):
            known = (*mesh.axis_names, *AXES)
            if axis not in known:
                near = difflib.get_close_matches(axis, known, 1, cutoff=0.0)[0]
                raise ValueError(
                    f"Rule {pattern!r} splits over {axis!r}, which is not an axis of the mesh "
                    f"{dict(mesh.shape)}; the nearest name is {near!r}."
                )

    def sharding(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _spec(name, rules)
        if spec is None:
            raise ValueError(f"No rule matches {name!r}: end the rules with ('.*', ...).")
        if re.search(rf"(^|/){BLOCKS}/", name):
            spec = PartitionSpec(None, *spec)
        if len(spec) > len(x.shape):
            raise ValueError(f"The rule for {name!r}, {spec}, has more dimensions than {x.shape}.")
        return NamedSharding(mesh, _fitted(spec, x.shape, mesh, without))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gathered(x: jax.Array, path: Sequence[str]) -> jax.Array:
    """Gathers a parameter over the axis 'fsdp' before its use inside a model.

    The axis therefore splits the storage of parameters only (Rajbhandari et al., 2020, ZeRO, stage
    3). Without this constraint, XLA may instead split the product over devices with different
    samples, for which its CPU compiler computed wrong gradients (jax 0.10.2, with all three axes).

    Args:
      x: Parameter, in a model that is traced in `mesh.on_mesh`.
      path: Path of the parameter, which determines the rule.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(FSDP, 1) == 1:
        return x
    spec = _spec("/".join(path), RULES)
    assert spec is not None
    return jax.lax.with_sharding_constraint(x, _fitted(spec, x.shape, mesh, without=(FSDP,)))


def embedding_lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns rows of a table that is split by `RULES`, in a model traced in `mesh.on_mesh`.

    No device holds the whole table, nor the rows of other devices' samples: each looks up its part
    of the columns for the samples of all devices along 'fsdp', with which it then exchanges parts.

    Args:
      table: Table, float [V, D].
      indices: Indices of rows, int32 [B, ...].

    Returns:
      Rows, float [B, ..., D], which are split over samples.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = table[indices]
    if mesh.empty or mesh.shape.get(FSDP, 1) == 1 or indices.shape[0] % batch_shards(mesh):
        return split_samples(rows)
    columns = None if table.shape[1] % mesh.shape[FSDP] else FSDP
    others = tuple(axis for axis in batch_axes(mesh) if axis != FSDP) or None
    middle = [None] * (indices.ndim - 1)
    rows = jax.lax.with_sharding_constraint(rows, PartitionSpec(others, *middle, columns))
    return split_samples(rows)


def keep_in_loop(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps XLA from gathering or widening a matrix before the loop in which it is used.

    In a loop over tokens or parts of a minibatch, XLA would otherwise compute the whole matrices of
    all layers once before the loop, and hold them in memory as long as the loop runs.

    Args:
      kernel: Matrix of the parameters.
      x: Other factor of the product, whose dtype is that of the computation.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_split = not mesh.empty and mesh.shape.get(FSDP, 1) > 1
    if is_split or kernel.dtype.itemsize < x.dtype.itemsize:
        return jax.lax.optimization_barrier((kernel, x))
    return kernel, x


def _spec(path: str, rules: Rules) -> PartitionSpec | None:
    """Returns the spec of the first rule that matches a path; None if there is no such rule."""
    return next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)


def _fitted(
    spec: PartitionSpec,
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    without: tuple[str, ...] = (),
) -> PartitionSpec:
    """Returns a spec for a shape, without some axes and those that do not divide a dimension."""
    entries = zip(spec, shape, strict=False)
    kept = ((tuple(a for a in _axes(entry) if a not in without), n) for entry, n in entries)
    return PartitionSpec(*(_fitting(axes, n, mesh) for axes, n in kept))


def _axes(entry: Any) -> tuple[str, ...]:
    """Returns the axes of one entry of a partition spec: None, one axis, or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fitting(axes: tuple[str, ...], size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """Returns the axes, in order, that the mesh has and whose product divides `size`."""
    fitting: tuple[str, ...] = ()
    for axis in axes:
        if axis in mesh.shape and size % math.prod(mesh.shape[a] for a in (*fitting, axis)) == 0:
            fitting += (axis,)
    return fitting or None
