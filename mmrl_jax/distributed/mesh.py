"""The device mesh and where arrays lie on it: environments and samples are split, the rest copied.

One axis, 'data': every device holds B / devices environments and all parameters. Programs are
plain `jit` over arrays placed here, and XLA inserts the collectives.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(devices: int | None) -> Mesh:
    """Returns a mesh with the one axis 'data'.

    Args:
      devices: how many of `jax.devices()` to use, the first ones; None: all of them.

    Raises:
      ValueError: there are fewer devices, or `devices` is not positive.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(
            f"devices={devices}, but JAX sees {len(available)}; ask for 1 to {len(available)}, or "
            f"for all of them with None."
        )
    # Auto lets XLA propagate shardings; make_mesh's default would have every operation typed.
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,), devices=available[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis_index: int) -> NamedSharding:
    """Axis `axis_index` is split over the devices, e.g. 1 for B in [T, B, ...]; the rest is not."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis_index, DATA))


def constrain_batch(tree: Any, *, mesh: Mesh) -> Any:
    """Inside `jit`: splits axis 0 of a batch [N, ...] over the devices, each learns its part.

    Without it a minibatch that is gathered by index lies whole on every device, and every device
    does all of the work.
    """
    return jax.lax.with_sharding_constraint(tree, batch_sharding(mesh, 0))
