"""Weights of samples: their file, and the order of the samples of an epoch.

    {"id": "episode 3", "digest": "5f0c...", "weight": 0.0, "flags": ["random_actions"]}

A file has a line of JSON for each sample of a split. `mmrl-audit` writes it, and the option
`weights` of demonstrations and of folders reads it. The weights may be changed by hand.
"""

from collections.abc import Iterable, Sequence
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.data import files
from mmrl_jax.data.records import InvalidData


class SampleWeight(NamedTuple):
    """A line of a file of weights.

    Attributes:
      id: Name of the sample in its split.
      digest: Digest of its content, or of the data set that has it; '' if it could not be read and
        has none.
      weight: Mean number of times that an epoch has the sample, relative to others; at least 0.
      flags: Names of the checks that flagged it.
    """

    id: str
    digest: str
    weight: float
    flags: tuple[str, ...] = ()


def write(path: pathlib.Path, rows: Iterable[SampleWeight]) -> None:
    """Writes a file of weights atomically."""
    lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def select(path: str, ids: Sequence[str], digests: Sequence[str], *, key: str) -> np.ndarray:
    """Returns the weights of some samples, float64 [n].

    Args:
      path: File of weights, which may have further samples.
      ids: Names of the n samples.
      digests: Digests of their contents, or of the data set that has them.
      key: Name of the option that has the path, for messages.

    Raises:
      InvalidData: If the file cannot be read, has two lines for the same sample, no line for one of
        these, or one for other content or for a sample that the audit could not read, or all
        weights are 0.
    """
    known: dict[str, SampleWeight] = {}
    for row in _read(pathlib.Path(path), key):
        if row.id in known:
            raise InvalidData(f"{key}={path!r} has two lines for {row.id!r}; remove one of them.")
        known[row.id] = row
    for name, digest in zip(ids, digests, strict=True):
        found = known.get(name)
        if found is None or found.digest != digest:
            fault = "was written for other contents of"
            if found is None:
                fault = "has no line for"
            elif not found.digest:
                fault = "is of an audit that could not read"
            raise InvalidData(
                f"{key}={path!r} {fault} {name!r}; audit the data again, with the same files and "
                "columns."
            )
    weights = np.array([known[name].weight for name in ids], np.float64)
    if not weights.any():
        raise InvalidData(f"{key}={path!r} gives all {len(ids)} samples the weight 0.")
    return weights


def _read(path: pathlib.Path, key: str) -> list[SampleWeight]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidData(f"{key}={str(path)!r} cannot be read ({error}).") from error
    return [_row(line, f"{key}: {path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _row(line: bytes, place: str) -> SampleWeight:
    try:
        values: dict[str, Any] = json.loads(line)
        weight = values["weight"]
        valid = type(weight) in (int, float) and math.isfinite(weight) and weight >= 0
        if not valid:
            raise ValueError(f"weight={weight!r} is no finite number of at least 0")
        return SampleWeight(str(values["id"]), str(values["digest"]), float(weight))
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{place} is no weight ({type(error).__name__}: {error}).") from error


def epoch_order(size: int, weights: np.ndarray | None, *, seed: int, epoch: int) -> np.ndarray:
    """Returns the samples of an epoch in their order, int64 [n].

    An epoch has n samples. Without weights, it has each once. With weights w it is drawn by
    systematic resampling (Kitagawa, 1996): sample i occurs n * w_i / sum(w) times, rounded down or
    up, so that equal weights change nothing. The order depends on the arguments alone, so that the
    number of an update is the whole position of a run.

    Args:
      size: Number of samples n.
      weights: Weight of each sample, float64 [n], above 0; None for equal ones.
      seed: Seed of the order.
      epoch: Number of the epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(size)
    if weights is None:
        return order
    ends = np.cumsum(weights * (size / weights.sum()))
    ends[-1] = size  # Rounding must not leave a gap at the end.
    drawn = np.searchsorted(ends, np.arange(size) + rng.random(), side="right")
    return drawn[order]
