"""Evaluation of a bounded number of samples at a time, whatever their number."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def chunk_size(count: int, most: int, *, devices: int) -> int:
    """The size of equal chunks of `count` samples; the last one may have to be filled up.

    Args:
      count: number of samples, > 0.
      most: the most samples of a chunk; it is raised to a multiple of the devices.
      devices: that share a chunk; they divide its size.
    """
    chunks = -(-count // most)
    return -(-count // (chunks * devices)) * devices


def in_chunks(function: Callable[[Any], Any], batch: Any, *, most: int, devices: int) -> Any:
    """What a function maps a batch [N, ...] to, on the host, worked out for one chunk at a time.

    The last chunk is filled up with the first samples again, and what comes of these is dropped, so
    that every sample counts once and one compiled program serves all chunks.

    Args:
      function: of a chunk [n, ...], of arrays as `batch` has them, to a tree of arrays [n, ...].
      batch: tree of arrays on the host.
      most: see `chunk_size`.
      devices: see `chunk_size`.
    """
    count = len(jax.tree.leaves(batch)[0])
    size = chunk_size(count, most, devices=devices)
    found = []
    for first in range(0, count, size):
        numbers = np.arange(first, first + size) % count
        chunk = jax.tree.map(lambda x, numbers=numbers: x[numbers], batch)
        found.append(jax.device_get(function(chunk)))
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *found)
