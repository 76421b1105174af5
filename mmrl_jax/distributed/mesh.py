"""The device mesh and shardings: how batches and parameters are split over devices.

    axis      what is split over it
    data      samples and environments
    fsdp      samples and environments, and the input dimension of each matrix of the parameters
    tensor    the output dimension of each matrix, or the input dimension at the end of a block

Devices that differ in their position on 'data' or 'fsdp' learn from different samples. `partition`
has the shardings of parameters. Programs are plain `jit` over arrays that are placed with these
shardings, and XLA inserts the collectives.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import contextvars
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)


# Devices of which meshes are made; None for the devices of this process.
_devices: contextvars.ContextVar[tuple[Any, ...] | None] = contextvars.ContextVar(
    "devices", default=None
)


@contextlib.contextmanager
def described_devices(devices: Iterable[Any]) -> Iterator[None]:
    """Makes meshes of devices that are not present, in order to compile programs for them.

    Within the context, what would be computed, read or put on devices has shapes only, see
    `computed`.

    Args:
      devices: Descriptions of devices, for example
        `jax.experimental.topologies.get_topology_desc(...).devices`.
    """
    token = _devices.set(tuple(devices))
    try:
        yield
    finally:
        _devices.reset(token)


def only_described() -> bool:
    """Returns whether devices are described and cannot hold arrays, see `described_devices`."""
    return _devices.get() is not None


def computed(function: Callable[..., Any], *arguments: Any, out_shardings: Any = None) -> Any:
    """Returns what a function of arrays returns, computed by a compiled program.

    If devices are only described, it returns the shapes and dtypes, and nothing is compiled.

    Args:
      function: Pure function.
      *arguments: Its arguments.
      out_shardings: Shardings of the results, as for `jax.jit`; None to leave them to XLA.
    """
    if only_described():
        return jax.eval_shape(function, *arguments)
    return jax.jit(function, out_shardings=out_shardings)(*arguments)


def available_devices() -> tuple[Any, ...]:
    """Returns the devices of which meshes can be made, see `described_devices`."""
    described = _devices.get()
    return tuple(jax.devices()) if described is None else described


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
    available = available_devices()
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


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of the mesh over which samples are split: all except 'tensor'."""
    return tuple(axis for axis in mesh.axis_names if axis != TENSOR)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh, axis_index: int) -> NamedSharding:
    """Returns the sharding that splits one dimension over samples and replicates the others.

    Args:
      mesh: Device mesh.
      axis_index: Dimension that is split, for example 1 for B in [T, B, ...].
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * axis_index, batch_axes(mesh)))


def put_batch(tree: Any, *, mesh: Mesh) -> Any:
    """Transfers a host batch [N, ...] to the devices, split along axis 0.

    Args:
      tree: Pytree of arrays with a leading axis N, which is a multiple of `batch_shards`; the same
        in all processes. `rows.BatchRows.put` transfers a batch of which each process has a part.
      mesh: Device mesh.
    """
    return put(tree, batch_sharding(mesh, 0))


def env_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of the states of environments [N, ...], which are split like samples.

    Args:
      tree: Pytree of arrays with a leading axis N.
      mesh: Device mesh.
    """
    # XLA always replicates arrays without elements.
    return jax.tree.map(lambda x: batch_sharding(mesh, 0) if x.size else replicated(mesh), tree)


def put(tree: Any, shardings: Any) -> Any:
    """Transfers arrays to devices with the given shardings; shapes only get the shardings.

    Args:
      tree: Pytree of arrays or of `jax.ShapeDtypeStruct`. In a run of several processes, an array
        is either global, or each process has all of it and transfers what its devices hold.
      shardings: Pytree of shardings, which may be a prefix of `tree`.
    """

    def each(sharding: NamedSharding, x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        is_global = isinstance(x, jax.Array) and not x.is_fully_addressable
        if is_global or sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        # For such an array, device_put would first compare it between all processes.
        array = np.asarray(jax.device_get(x))
        return from_parts(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(lambda s, part: jax.tree.map(lambda x: each(s, x), part), shardings, tree)


def from_parts(
    shape: tuple[int, ...],
    sharding: NamedSharding,
    part: Callable[[Any], np.ndarray],
) -> jax.Array:
    """Transfers the parts of a global array that devices of this process hold.

    Args:
      shape: Shape of the whole array.
      sharding: Sharding of the array.
      part: Returns the part of the array with the given index, a tuple of slices.
    """
    with jax.transfer_guard("allow"):  # JAX counts this transfer as an implicit one.
        return jax.make_array_from_callback(shape, sharding, part)


def get(tree: Any) -> Any:
    """Transfers whole arrays to the host of every process, which must all call this function.

    Args:
      tree: Pytree of arrays with any shardings.

    Returns:
      Pytree of numpy arrays.
    """

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def placed_shapes(tree: Any, shardings: Any) -> Any:
    """Returns the shapes and dtypes of a pytree of arrays with the given shardings.

    Args:
      tree: Pytree of arrays or of their shapes.
      shardings: One sharding for all leaves, or a pytree of shardings with the structure of `tree`.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
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


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Returns the context in which a model with arrays on a mesh is traced.

    Args:
      mesh: Device mesh; None for a model on one device.
    """
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split_samples(x: jax.Array) -> jax.Array:
    """Constrains activations [B, ...] inside a model to be split over samples only, see `on_mesh`.

    Without this constraint, XLA derives the shardings of activations from those of the matrices,
    and may gather complete activations to convert between two such shardings.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(mesh)))


def split_heads(x: jax.Array) -> jax.Array:
    """Constrains keys or values [..., B, K, S, H] to be split over samples and over heads.

    A dimension is not split if the number of devices does not divide it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    samples = None if x.shape[-4] % batch_shards(mesh) else batch_axes(mesh)
    heads = None if x.shape[-3] % mesh.shape.get(TENSOR, 1) else TENSOR
    layers = [None] * (x.ndim - 4)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*layers, samples, heads))
