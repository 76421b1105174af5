"""Evaluation of any number of samples in chunks of a bounded size."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib


def chunk_size(count: int, max_size: int, *, devices: int) -> int:
    """Returns the size of equal chunks of `count` samples, of which the last may need padding.

    Args:
      count: Number of samples, > 0.
      max_size: Maximum number of samples in a chunk, which is rounded up to a multiple of
        `devices`.
      devices: Number of devices over which a chunk is split. The size is a multiple of it.
    """
    chunks = -(-count // max_size)
    return -(-count // (chunks * devices)) * devices


def in_chunks(function: Callable[[Any], Any], batch: Any, *, max_size: int, devices: int) -> Any:
    """Applies a function to a batch [N, ...] one chunk at a time, and returns the results in numpy.

    The last chunk is padded with samples from the front of the batch, and their results are
    dropped. Every sample therefore counts once, and one compiled program serves all chunks.

    Args:
      function: Maps a chunk [n, ...] with the structure of `batch` to a pytree of arrays [n, ...].
      batch: Pytree of host arrays [N, ...].
      max_size: Maximum number of samples in a chunk, see `chunk_size`.
      devices: Number of devices over which a chunk is split.

    Returns:
      Pytree of numpy arrays [N, ...].
    """
    count = len(jax.tree.leaves(batch)[0])
    size = chunk_size(count, max_size, devices=devices)
    results = []
    for first in range(0, count, size):
        indices = np.arange(first, first + size) % count
        chunk = jax.tree.map(lambda x, indices=indices: x[indices], batch)
        results.append(mesh_lib.get(function(chunk)))
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *results)
