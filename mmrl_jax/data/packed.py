"""Episodes as memory-mapped arrays, which are made once from a data set of any format.

    <cache>/demonstrations/<digest>/index.json          fields, texts, counts, statistics
    <cache>/demonstrations/<digest>/pixels.bin, ...     a row for each step, of all episodes

The digest is of the files of the data set and of the mapping. Any row can then be read at once
without decoding, so that the order of training is any order, and a data set may be larger than the
memory. The directory can be deleted; it is made again when it is needed.
"""

from collections.abc import Mapping, Sequence
import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.data import files
from mmrl_jax.data.mapping import FeatureMapping
from mmrl_jax.data.records import Episode, EpisodeSource, Invalid, InvalidData, Quarantine

VERSION = 1  # Of the files.
INDEX = "index.json"
PROGRESS_S = 10.0  # Seconds between two messages of progress.
# Quantiles of each dimension of the actions, by name.
QUANTILES = {"low": 0.01, "high": 0.99}


class Packed(NamedTuple):
    """Steps of episodes as arrays of R rows, memory-mapped.

    Attributes:
      arrays: Arrays [R, ...] by name: 'pixels' uint8 [R, H, W, 3], 'proprio' float32 [R, P],
        'action', 'reward' float32 [R], 'is_terminal' bool [R], 'has_action' bool [R], False for
        final observations, 'text' int32 [R], indices into `texts`, and 'privileged/<name>'.
      starts: First row of each of E episodes, and R, int64 [E + 1].
      numbers: Index of each episode in its data set, int64 [E].
      texts: Different instructions.
      has_reward: Whether the data set has rewards.
      statistics: 'minimum', 'maximum', 'mean', 'std', 'low' and 'high' (the quantiles 0.01 and
        0.99) of each dimension of the actions, float32 [A] each.
      quarantine: Episodes that were set aside.
      directory: Directory of the files.
    """

    arrays: dict[str, np.ndarray]
    starts: np.ndarray
    numbers: np.ndarray
    texts: tuple[str, ...]
    has_reward: bool
    statistics: dict[str, np.ndarray]
    quarantine: Quarantine
    directory: pathlib.Path


def pack(
    source: EpisodeSource,
    mapping: FeatureMapping,
    *,
    episodes: int | None,
    fingerprint: str,
    cache: pathlib.Path,
) -> Packed:
    """Returns the episodes of a data set as arrays, and makes them unless they are cached.

    Args:
      source: Data set.
      mapping: Mapping of its fields.
      episodes: Number of episodes from the front of the data set; None for all.
      fingerprint: Digest of the data set and its split.
      cache: Directory of the cache.

    Raises:
      InvalidData: If the data set has fewer episodes than `episodes`, no episode can be used, or
        the disk of the cache is full.
    """
    count = len(source) if episodes is None else episodes
    if count > len(source):
        raise InvalidData(f"{count} episodes are to be used, but the data set has {len(source)}.")
    key = files.digest(VERSION, fingerprint, json.dumps(mapping.describe()), count)
    directory = cache / key
    if not (directory / INDEX).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix=".new-"))
        try:
            _make(source, mapping, count, temporary)
            # Another process may have made the same files meanwhile, which are then used.
            with contextlib.suppress(OSError):
                temporary.rename(directory)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InvalidData(
                f"The disk of {cache} is full, where demonstrations are kept as arrays. Free some "
                "space, set $XDG_CACHE_HOME to a larger disk, or use smaller images."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read(directory)


def read(directory: pathlib.Path) -> Packed:
    """Opens the arrays that `pack` made.

    Raises:
      InvalidData: If no episode could be used.
    """
    index = json.loads((directory / INDEX).read_bytes())
    quarantine = Quarantine(**index["quarantine"])
    if not index["rows"]:
        raise InvalidData(f"No episode can be used. {quarantine.summary()}")
    arrays = {
        name: _mapped(directory, name, index["rows"], field)
        for name, field in index["fields"].items()
    }
    return Packed(
        arrays=arrays,
        starts=np.array(index["starts"], np.int64),
        numbers=np.array(index["numbers"], np.int64),
        texts=tuple(index["texts"]),
        has_reward=index["has_reward"],
        statistics={name: np.array(x, np.float32) for name, x in index["statistics"].items()},
        quarantine=quarantine,
        directory=directory,
    )


def _file(name: str) -> str:
    return f"{name.replace('/', '.')}.bin"


def _mapped(
    directory: pathlib.Path, name: str, rows: int, field: tuple[str, Sequence[int]]
) -> np.ndarray:
    """Returns an array of R rows, of a given dtype and shape of a row, memory-mapped."""
    dtype, shape = field
    return np.asarray(np.memmap(directory / _file(name), dtype, "r", shape=(rows, *shape)))


def _make(
    source: EpisodeSource, mapping: FeatureMapping, count: int, directory: pathlib.Path
) -> None:
    """Reads the episodes of a data set and writes the files of `Packed`."""
    quarantine, texts = Quarantine(), {}
    starts, numbers, fields = [0], [], {}
    told = time.monotonic()
    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}
        for number in range(count):
            try:
                episode = mapping(source.read(number, mapping.wanted))
            except Invalid as error:
                quarantine.add(source.name(number), error)
                continue
            rows = _rows(episode, texts)
            for name, x in rows.items():
                if name not in writers:
                    writers[name] = stack.enter_context((directory / _file(name)).open("wb"))
                    fields[name] = (x.dtype.str, x.shape[1:])
                writers[name].write(np.ascontiguousarray(x).data)
            starts.append(starts[-1] + len(episode.action))
            numbers.append(number)
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                print(f"Read {number + 1} of {count} episodes of demonstrations.", flush=True)
    index = {
        "rows": starts[-1],
        "fields": fields,
        "starts": starts,
        "numbers": numbers,
        "texts": list(texts),
        "has_reward": mapping.has_reward,
        "quarantine": quarantine.to_json(),
        "statistics": _action_statistics(directory, fields, starts[-1]) if starts[-1] else {},
    }
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _rows(episode: Episode, texts: dict[str, int]) -> dict[str, np.ndarray]:
    """Returns the rows of an episode by the names of the arrays; adds its texts to `texts`."""
    steps = len(episode.action)
    has_action = np.arange(steps) < episode.actions
    rows = episode.observation | {f"privileged/{name}": x for name, x in episode.privileged.items()}
    # What a final observation has as action and reward may be NaN, and is never learned from.
    for name in ("action", "reward"):
        x = getattr(episode, name)
        rows[name] = np.where(has_action.reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype)
    numbers = [texts.setdefault(text, len(texts)) for text in episode.language_instruction]
    return rows | {
        "is_terminal": np.asarray(episode.is_terminal, bool),
        "has_action": has_action,
        "text": np.array(numbers, np.int32),
    }


def _action_statistics(
    directory: pathlib.Path, fields: Mapping[str, tuple], rows: int
) -> dict[str, list]:
    arrays = {
        name: _mapped(directory, name, rows, fields[name]) for name in ("action", "has_action")
    }
    actions = np.asarray(arrays["action"][arrays["has_action"]], np.float64)
    actions = actions.reshape(len(actions), -1)
    statistics = {
        "minimum": actions.min(0),
        "maximum": actions.max(0),
        "mean": actions.mean(0),
        "std": actions.std(0),
    }
    statistics |= {name: np.quantile(actions, q, axis=0) for name, q in QUANTILES.items()}
    return {name: x.tolist() for name, x in statistics.items()}
