"""The device mesh and shardings: batches are split over the axis 'data', the rest is replicated.

With the axis 'data' alone, every device holds B / devices environments and a full copy of the
parameters. The axes 'fsdp' and 'tensor' shard the parameters themselves, see `partition`. Programs
are plain `jit` over arrays that are placed with these shardings, and XLA inserts the collectives.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)


def make_mesh(devices: int | None, axes: Mapping[str, int] | None = None) -> Mesh:
    """Returns a device mesh.

    Args:
      devices: Number of devices to use, from the front of `jax.devices()`. None uses all devices.
      axes: Size of each mesh axis by its name, which is 'data', 'fsdp' or 'tensor'. The last axis
        varies fastest over `jax.devices()`. None makes a mesh with the axis 'data' alone.

    Raises:
      ValueError: If `devices` is not in [1, number of available devices], an axis has another
        name, or the product of the axis sizes is not the number of devices.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(
            f"devices={devices}, but JAX sees {len(available)}; choose 1 to {len(available)}, or "
            f"None for all of them."
        )
    sizes = {DATA: count} if axes is None else dict(axes)
    if unknown := [name for name in sizes if name not in AXES]:
        raise ValueError(f"axes={sizes} has {unknown}; valid names are {list(AXES)}.")
    if min(sizes.values(), default=0) < 1 or math.prod(sizes.values()) != count:
        raise ValueError(
            f"axes={sizes} must be positive and their product must be the number of devices, "
            f"{count}; change a size, or devices={devices}."
        )
    # Auto lets XLA propagate shardings. The default of make_mesh, Explicit, would require every
    # operation to state its sharding.
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=available[:count],
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that has a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis_index: int) -> NamedSharding:
    """Returns the sharding that splits one dimension over 'data' and replicates the others.

    Args:
      mesh: Device mesh.
      axis_index: Dimension that is split, for example 1 for B in [T, B, ...].
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * axis_index, DATA))


def put_batch(tree: Any, *, mesh: Mesh) -> Any:
    """Transfers a host batch [N, ...] to the devices, split along axis 0.

    Args:
      tree: Pytree of arrays with a leading axis N, which is a multiple of the size of 'data'.
      mesh: Device mesh.
    """
    return jax.device_put(tree, batch_sharding(mesh, 0))


def replicated_shapes(tree: Any, *, mesh: Mesh) -> Any:
    """Returns the shapes and dtypes of a pytree of arrays, with a replicated sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree
    )


def constrain_batch(tree: Any, *, mesh: Mesh) -> Any:
    """Constrains a batch [N, ...] inside `jit` to be split over the devices along axis 0.

    Without this constraint, a minibatch that is gathered by index is replicated on every device,
    and every device repeats the whole computation.

    Args:
      tree: Pytree of arrays with a leading axis N.
      mesh: Device mesh.
    """
    return jax.lax.with_sharding_constraint(tree, batch_sharding(mesh, 0))
