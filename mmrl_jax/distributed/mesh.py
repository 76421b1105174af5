"""The device mesh and where arrays lie on it: environments and samples are split, the rest copied.

On the one axis 'data', every device holds B / devices environments and all parameters. The axes
'fsdp' and 'tensor' are for parameters that no device holds whole, see `partition`. Programs are
plain `jit` over arrays placed here, and XLA inserts the collectives.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)


def make_mesh(devices: int | None, axes: Mapping[str, int] | None = None) -> Mesh:
    """Returns a mesh.

    Args:
      devices: how many of `jax.devices()` to use, the first ones; None: all of them.
      axes: names, of 'data', 'fsdp' and 'tensor', and sizes; neighboring devices differ in the
        last one. None: the one axis 'data'.

    Raises:
      ValueError: there are fewer devices, `devices` is not positive, an axis has another name, or
        their sizes do not make up the devices.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(
            f"devices={devices}, but JAX sees {len(available)}; ask for 1 to {len(available)}, or "
            f"for all of them with None."
        )
    sizes = {DATA: count} if axes is None else dict(axes)
    if unknown := [name for name in sizes if name not in AXES]:
        raise ValueError(f"axes={sizes} has {unknown}; the names are {list(AXES)}.")
    if min(sizes.values(), default=0) < 1 or math.prod(sizes.values()) != count:
        raise ValueError(
            f"axes={sizes} must be positive and multiply to the number of devices, {count}; change "
            f"a size, or devices={devices}."
        )
    # Auto lets XLA propagate shardings; make_mesh's default would have every operation typed.
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=available[:count],
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis_index: int) -> NamedSharding:
    """Axis `axis_index` is split over the devices, e.g. 1 for B in [T, B, ...]; the rest is not."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis_index, DATA))


def put_batch(tree: Any, *, mesh: Mesh) -> Any:
    """Puts a batch [N, ...] of the host on the devices, split along axis 0; they divide N."""
    return jax.device_put(tree, batch_sharding(mesh, 0))


def replicated_shapes(tree: Any, *, mesh: Mesh) -> Any:
    """Shapes and dtypes of a tree of arrays that have a whole copy on every device."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree
    )


def constrain_batch(tree: Any, *, mesh: Mesh) -> Any:
    """Inside `jit`: splits axis 0 of a batch [N, ...] over the devices, each learns its part.

    Without it a minibatch that is gathered by index lies whole on every device, and every device
    does all of the work.
    """
    return jax.lax.with_sharding_constraint(tree, batch_sharding(mesh, 0))
