"""Which parts of parameters lie on which devices: rules from paths to partitions.

The first rule whose pattern matches all of a path says along which axes of the mesh the dimensions
of that array are split, as in t5x and big_vision. Paths are those of `models.lora`; the rules hold
for optimizer states too, whose paths end as their parameters' do.
"""

from collections.abc import Sequence
import difflib
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mmrl_jax.distributed.mesh import AXES, FSDP, TENSOR

Rules = Sequence[tuple[str, PartitionSpec]]

# A layer splits its features over 'tensor', and the one after it its inputs, so that only the sum
# at the end of attention or MLP crosses devices (Shoeybi et al., 2019, Megatron-LM); over 'fsdp'
# goes the other side of each matrix. An adapter's A is split as the inputs of its matrix and its B
# as the outputs, its rank never. What is small is copied.
_OUT = r".*/(attention/out|mlp_out)"
RULES: Rules = (
    (r"(.*/)?table", PartitionSpec(TENSOR, FSDP)),
    (r"(.*/)?head", PartitionSpec(FSDP, TENSOR)),
    # Of the rows of a convolution, no file holds a part by itself.
    (r"(.*/)?patch_embedding/kernel", PartitionSpec(None, (TENSOR, FSDP))),
    (rf"{_OUT}/kernel", PartitionSpec(TENSOR, FSDP)),
    (rf"{_OUT}/adapter/a", PartitionSpec(TENSOR, None)),
    (rf"{_OUT}/adapter/b", PartitionSpec(None, FSDP)),
    (r"(.*/)?kernel", PartitionSpec(FSDP, TENSOR)),
    (r"(.*/)?adapter/a", PartitionSpec(FSDP, None)),
    (r"(.*/)?adapter/b", PartitionSpec(None, TENSOR)),
    (r".*", PartitionSpec()),
)


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Where each leaf of a pytree goes.

    Axes of 'data', 'fsdp' and 'tensor' that the mesh lacks are left out, and so are those that do
    not divide a dimension, which stays whole there.

    Args:
      tree: pytree of arrays, or of their shapes.
      mesh: of the devices.
      rules: pattern of whole paths, and the partition of what the first one matches.

    Returns:
      Pytree of `NamedSharding`, like `tree`.

    Raises:
      ValueError: a leaf that no rule matches, a rule for more dimensions than its leaf has, or one
        that names an axis which neither the mesh nor this package has.
    """
    for pattern, spec in rules:
        for axis in (axis for entry in spec for axis in _axes(entry)):
            known = (*mesh.axis_names, *AXES)
            if axis not in known:
                near = difflib.get_close_matches(axis, known, 1, cutoff=0.0)[0]
                raise ValueError(
                    f"Rule {pattern!r} splits over {axis!r}, which is no axis of the mesh "
                    f"{dict(mesh.shape)}; the nearest name is {near!r}."
                )

    def sharding(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            raise ValueError(f"No rule matches {name!r}: end the rules with ('.*', ...).")
        if len(spec) > len(x.shape):
            raise ValueError(f"The rule for {name!r}, {spec}, has more dimensions than {x.shape}.")
        entries = (_fitting(_axes(entry), n, mesh) for entry, n in zip(spec, x.shape, strict=False))
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gathered(kernel: jax.Array, path: Sequence[str]) -> jax.Array:
    """Inside a model: gathers what the axis 'fsdp' splits of a matrix, for one use of it.

    It is what makes the axis a split of storage alone (Rajbhandari et al., 2020, ZeRO, stage 3):
    left to itself XLA may split the product instead, over devices that have different samples, and
    its CPU compiler computed wrong gradients of such a product (jax 0.10.2, all three axes).

    Args:
      kernel: A matrix of the parameters, whole for the program; see `mesh.on_mesh`.
      path: Of the layer that the matrix is the kernel of.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(FSDP, 1) == 1:
        return kernel
    name = "/".join((*path, "kernel"))
    spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
    entries = (
        _fitting(tuple(axis for axis in _axes(entry) if axis != FSDP), size, mesh)
        for entry, size in zip(spec, kernel.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*entries))


def _axes(entry: Any) -> tuple[str, ...]:
    """Of an entry of a partition: None, an axis, or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fitting(axes: tuple[str, ...], size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """Those axes, in order, that the mesh has and that together divide a dimension."""
    kept: tuple[str, ...] = ()
    for axis in axes:
        if axis in mesh.shape and size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0:
            kept += (axis,)
    return kept or None
