"""The rows of a batch from the host that each process of a run reads, transfers and scores."""

from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost


class BatchRows:
    """The rows of a batch [N, ...] that is split over the devices of a mesh along axis 0.

    Attributes:
      held: Indices of the rows that devices of this process hold, ascending, int64 [n].
      shares: For each process the indices of rows, ascending, such that each row is in one share
        only and its process holds it. Processes hold the same rows if the axis 'tensor' spans them.

    Args:
      mesh: Device mesh.
      count: Number of rows N, a multiple of `mesh.batch_shards`.
    """

    def __init__(self, mesh: Mesh, count: int):
        self._count, self._sharding = count, mesh_lib.batch_sharding(mesh, 0)
        holders: list[set[int]] = [set() for _ in range(count)]
        places: Any = self._sharding.devices_indices_map((count,))
        for device, (rows,) in places.items():
            for row in range(count)[rows]:
                holders[row].add(device.process_index)
        scoring = np.array([sorted(x)[row % len(x)] for row, x in enumerate(holders)])
        this = jax.process_index()
        self.held = np.flatnonzero([this in x for x in holders])
        self.shares = [np.flatnonzero(scoring == i) for i in range(jax.process_count())]

    @property
    def share(self) -> np.ndarray:
        """Positions in `held` of the rows in the share of this process."""
        return np.searchsorted(self.held, self.shares[jax.process_index()])

    def put(self, tree: Any) -> Any:
        """Transfers the rows of a host batch to the devices that hold them.

        Args:
          tree: Pytree of numpy arrays [n, ...] with the rows `held`.

        Returns:
          Pytree of global arrays [N, ...], split along axis 0.
        """
        if jax.process_count() == 1:
            return jax.device_put(tree, self._sharding)

        def each(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                rows = range(self._count)[index[0]]
                first = int(np.searchsorted(self.held, rows.start))
                return x[first : first + len(rows)]

            shape = (self._count, *x.shape[1:])
            return mesh_lib.from_parts(shape, self._sharding, part)

        return jax.tree.map(each, tree)

    def get(self, tree: Any) -> Any:
        """Transfers the rows in the share of this process to the host.

        Args:
          tree: Pytree of global arrays [N, ...], split along axis 0.

        Returns:
          Pytree of numpy arrays, with the rows in the order of the share.
        """
        if jax.process_count() == 1:
            return jax.device_get(tree)

        def each(x: jax.Array) -> np.ndarray:
            parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            held = np.concatenate([jax.device_get(parts[first]) for first in sorted(parts)])
            return held[self.share]

        return jax.tree.map(each, tree)


def strided_shares(count: int) -> list[np.ndarray]:
    """Returns for each process its share of N rows that all processes have on the host."""
    return [np.arange(i, count, jax.process_count()) for i in range(jax.process_count())]


def join_shares(tree: Any, shares: list[np.ndarray]) -> Any:
    """Returns the rows of all processes in one batch, in every process.

    All processes must call it.

    Args:
      tree: Pytree of numpy arrays [n, ...] with the rows in the share of this process.
      shares: Indices in [0, N) of the rows of each process; each row is in one share only.

    Returns:
      Pytree of numpy arrays [N, ...].
    """
    if jax.process_count() == 1:
        return tree
    size, count = max(map(len, shares)), sum(map(len, shares))

    def padded(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])

    def joined(x: np.ndarray) -> np.ndarray:
        rows = np.empty((count, *x.shape[2:]), x.dtype)
        for part, share in zip(x, shares, strict=True):
            rows[share] = part[: len(share)]
        return rows

    return jax.tree.map(joined, multihost.gather(jax.tree.map(padded, tree)))
