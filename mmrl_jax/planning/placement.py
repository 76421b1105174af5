"""Where the arrays of a run lie on a mesh that is only described."""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mmrl_jax.distributed import partition
from mmrl_jax.planning.program import Split, Value
from mmrl_jax.planning.usage import Analyzer
from mmrl_jax.problems import problem
from mmrl_jax.training.stage import Carry


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """Returns a mesh without devices.

    Args:
      sizes: Sizes of the axes by their names.
    """
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def placements(carry: Carry, constants: Any, mesh: Any) -> tuple[Carry, Any]:
    """Returns the shardings of the carry and the constants of one device's share of a stage.

    Variables and optimizer state are split by `distributed.partition`. Samples are not split: one
    device has all of its share.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    everywhere = functools.partial(jax.tree.map, lambda _: whole)
    placed = everywhere(carry).replace(learner=problem.shard_learner(carry.learner, mesh))
    frozen = partition.shardings(constants.frozen, mesh)
    return placed, constants._replace(frozen=frozen, data=everywhere(constants.data))


def split_of(x: Any, sharding: NamedSharding) -> Split:
    """Returns the mesh axes over which each dimension of an array is split."""
    entries = [
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in sharding.spec
    ]
    return tuple(entries + [()] * (len(x.shape) - len(entries)))


def pairs(tree: Any, shardings: Any) -> list[tuple[Any, NamedSharding]]:
    """Returns the leaves of a pytree of shapes with their shardings."""
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))


def count(tree: Any) -> int:
    """Returns the number of elements of a pytree of shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def tree_bytes(tree: Any, shardings: Any, *, analyzer: Analyzer) -> float:
    """Returns the bytes of the part of a pytree that a device holds.

    Args:
      tree: Pytree of shapes.
      shardings: Pytree of shardings on an abstract mesh.
      analyzer: Analyzer of the device.
    """
    return sum(
        analyzer.nbytes(Value(jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype)))
        for x, s in pairs(tree, shardings)
    )
