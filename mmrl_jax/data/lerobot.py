"""Data sets of LeRobot v3.0 and v2.1, read without the packages `lerobot` and `datasets`.

    v3.0   meta/info.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet
           data/chunk-000/file-000.parquet, with the frames of several episodes
           videos/<key>/chunk-000/file-000.mp4, with the frames of several episodes
    v2.1   meta/info.json, meta/tasks.jsonl, meta/episodes.jsonl
           data/chunk-000/episode_000000.parquet, videos/chunk-000/<key>/episode_000000.mp4

Paths are made from the templates in info.json. Images are in the parquet files, as bytes and path,
or in videos. Every frame has an action; no observation follows the last one. pyarrow is imported
where it is needed.
"""

from collections.abc import Collection, Mapping, Sequence
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from mmrl_jax.data import files, tfds_files
from mmrl_jax.data.records import Feature, Invalid, InvalidData, Provenance, RawEpisode, nearest
from mmrl_jax.data.video import VideoFrames

INFO = "meta/info.json"
# Digests of the parquet files that we write, by their paths. Parquet may have checksums of its
# pages, but has none of its footer: a damaged footer gives wrong values, or ends the process.
CHECKSUMS = "meta/checksums.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
# Fields by our names. 'task' and 'is_terminal' are derived from 'task_index', 'next.done' and
# 'next.truncated'.
DEFAULTS = {
    "pixels": "observation.images.pixels",
    "proprio": "observation.state",
    "instruction": "task",
    "action": "action",
    "reward": "next.reward",
    "is_terminal": "is_terminal",
}
PRIVILEGED = "privileged."
PROVENANCE = "provenance/"  # Prefix of our columns in the table of episodes.
TASK, TERMINAL, DONE, TRUNCATED = "task", "is_terminal", "next.done", "next.truncated"


def import_pyarrow(directory: object) -> tuple[Any, Any]:
    """Returns the modules pyarrow and pyarrow.parquet.

    Raises:
      ImportError: If pyarrow is not installed; the message names the extra.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise tfds_files.missing_package(directory, "pyarrow", error) from error
    return pyarrow, pyarrow.parquet


class LeRobot:
    """Random access to the episodes of a LeRobot data set, see `records.EpisodeSource`.

    Attributes:
      features: Fields of a frame by their names, for example 'observation.state'.
      defaults: Fields of a frame by our names.

    Args:
      directory: Directory of the data set, with meta/info.json.
      split: Name of the split, a range of episodes in info.json.

    Raises:
      ImportError: If pyarrow is not installed.
      InvalidData: If the metadata cannot be read, are of another version, or have no such split.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        self._arrow, self._parquet = import_pyarrow(directory)
        self._root = pathlib.Path(directory)
        self._info = _read_json(self._root / INFO)
        sums = self._root / CHECKSUMS
        self._checksums = _read_json(sums) if sums.is_file() else {}
        self._verified: set[pathlib.Path] = set()
        self._version = str(self._info.get("codebase_version"))
        if self._version not in VERSIONS:
            raise InvalidData(
                f"{self._root / INFO} has codebase_version={self._version!r}; "
                f"{', '.join(VERSIONS)} can be read. Convert it with LeRobot's own script."
            )
        try:
            declared = {name: _feature(x) for name, x in self._info["features"].items()}
            self._fps = float(self._info["fps"])
            episodes, self._tasks = self._read_episodes()
            self._episodes = _of_split(episodes, self._info, split, self._root)
        except InvalidData:
            raise
        except Exception as error:  # Damaged metadata fail in many ways.
            raise InvalidData(
                f"The metadata of {self._root} cannot be read ({type(error).__name__}: {error})."
            ) from error
        self.features: dict[str, Feature] = declared | {TASK: Feature((), "str")}
        if DONE in declared:
            self.features[TERMINAL] = Feature((), "bool")
        self.defaults: dict[str, str] = DEFAULTS | {
            f"privileged/{name.removeprefix(PRIVILEGED)}": name
            for name in declared
            if name.startswith(PRIVILEGED)
        }
        self._videos: dict[str, VideoFrames] = {}
        self._cached: tuple[Any, Any] = (None, None)

    def __len__(self) -> int:
        return len(self._episodes)

    def name(self, index: int) -> str:
        return f"episode {self._episodes[index]['episode_index']}"

    def read(self, index: int, fields: Collection[str]) -> RawEpisode:
        episode = self._episodes[index]
        length = int(episode["length"])
        if length == 0:
            raise Invalid("empty episode", f"{self.name(index)} has no frames.")
        videos = {name for name in fields if self._kind(name) == "video"}
        sources = {TASK: ("task_index",), TERMINAL: (DONE, TRUNCATED)}
        columns = {c for name in {*fields} - videos for c in sources.get(name, (name,))}
        columns &= {*self._info["features"], "task_index"}
        table = self._rows(episode, columns | {"episode_index"})
        if table.num_rows != length:
            raise Invalid(
                "truncated shard" if table.num_rows < length else "wrong schema",
                f"{self.name(index)} has {table.num_rows} frames, but {length} are declared.",
            )
        values = {}
        for name in columns & {*table.column_names}:
            values[name] = self._column(table, name, length)
        for name in videos:
            values[name] = self._video(episode, name, length)
        if TASK in fields and "task_index" in values:
            values[TASK] = [self._task(int(number)) for number in values["task_index"]]
        if TERMINAL in fields and DONE in values:
            truncated = values.get(TRUNCATED, np.zeros(length, bool))
            done = np.asarray(values[DONE], bool).reshape(-1) & ~truncated.reshape(-1)
            values[TERMINAL] = done & (np.arange(length) == length - 1)
        wanted = {name: x for name, x in values.items() if name in fields}
        return RawEpisode(wanted, False, _provenance(episode))

    def _kind(self, name: str) -> str:
        return self._info["features"].get(name, {}).get("dtype", "")

    def _task(self, number: int) -> str:
        if number not in self._tasks:
            raise Invalid("invalid text", f"task_index {number} is in no table of tasks.")
        return self._tasks[number]

    def _read_episodes(self) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """Returns the rows of the table of episodes, and the texts of the tasks."""
        meta = self._root / "meta"
        if self._version != "v3.0":
            tasks = {x["task_index"]: x["task"] for x in _read_lines(meta / "tasks.jsonl")}
            return _read_lines(meta / "episodes.jsonl"), tasks
        rows: list[dict[str, Any]] = []
        for path in sorted((meta / "episodes").glob("*/*.parquet")):
            self._verify(path)
            file = self._parquet.ParquetFile(path)
            names = [x for x in file.schema_arrow.names if not x.startswith("stats/")]
            rows += file.read(columns=names).to_pylist()
        self._verify(meta / "tasks.parquet")
        table = self._parquet.read_table(meta / "tasks.parquet").to_pydict()
        # The texts are the index of a pandas table, whose column had no name at first.
        (texts,) = (name for name in table if name != "task_index")
        return rows, dict(zip(table["task_index"], table[texts], strict=True))

    def _place(self, episode: Mapping[str, Any], template: str, **names: Any) -> pathlib.Path:
        """Returns the path of a file of an episode, from a template of info.json."""
        number = int(episode["episode_index"])
        names |= {
            "episode_index": number,
            "episode_chunk": number // int(self._info.get("chunks_size", 1000)),
        }
        return self._root / template.format(**names)

    def _rows(self, episode: Mapping[str, Any], columns: Collection[str]) -> Any:
        """Returns the frames of an episode as a table of pyarrow."""
        names = {}
        if self._version == "v3.0":
            names = {
                "chunk_index": episode["data/chunk_index"],
                "file_index": episode["data/file_index"],
            }
        path = self._place(episode, self._info["data_path"], **names)
        if not path.is_file():
            raise Invalid("damaged shard", f"{path} does not exist.")
        self._verify(path)
        try:
            file = self._parquet.ParquetFile(path, page_checksum_verification=True)
            number = int(episode["episode_index"])
            groups = [i for i in range(file.num_row_groups) if _may_have(file, i, number)]
            key = (path, tuple(groups), frozenset(columns))
            if self._cached[0] != key:  # Several episodes may share a group of rows.
                self._cached = (key, file.read_row_groups(groups, columns=sorted(columns)))
            table = self._cached[1]
            mask = np.asarray(table.column("episode_index").to_numpy()) == number
            return table.filter(self._arrow.array(mask))
        except Exception as error:  # Damaged files fail in many ways.
            raise Invalid(
                "damaged shard", f"{path} ({type(error).__name__}: {str(error)[:200]})."
            ) from error

    def _verify(self, path: pathlib.Path) -> None:
        """Raises Invalid if a file differs from what was written; unknown files are accepted."""
        if path in self._verified:
            return
        written = self._checksums.get(path.relative_to(self._root).as_posix())
        if written is not None and files.file_digest(path) != written:
            raise Invalid(
                "damaged shard",
                f"{path} is not what was written, by its digest in {CHECKSUMS}; if it was changed "
                "on purpose, delete that file.",
            )
        self._verified.add(path)

    def _column(self, table: Any, name: str, length: int) -> Any:
        """Returns a column as an array [N, ...], encoded images, or texts."""
        values = table.column(name)
        kind = self._kind(name)
        if kind == "image":
            return [self._image(name, x) for x in values.to_pylist()]
        if kind == "string":
            return [str(x) for x in values.to_pylist()]
        try:
            if self._arrow.types.is_nested(values.type):
                return np.array(values.to_pylist()).reshape(length, -1)
            return values.to_numpy()
        except ValueError as error:
            raise Invalid("wrong schema", f"{name!r} ({error}).") from error

    def _image(self, name: str, value: Any) -> bytes:
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return value["bytes"]
            path = value.get("path")
            if path and (self._root / path).is_file():
                return (self._root / path).read_bytes()
        raise Invalid("missing image", f"{name!r} has neither bytes nor a file.")

    def _video(self, episode: Mapping[str, Any], name: str, length: int) -> np.ndarray:
        names, start = {"video_key": name}, 0
        if self._version == "v3.0":
            prefix = f"videos/{name}/"
            names["chunk_index"] = episode[f"{prefix}chunk_index"]
            names["file_index"] = episode[f"{prefix}file_index"]
            start = round(float(episode[f"{prefix}from_timestamp"]) * self._fps)
        path = self._place(episode, self._info["video_path"], **names)
        return self._videos.setdefault(name, VideoFrames()).read(path, start, length)


def _may_have(file: Any, group: int, episode: int) -> bool:
    """Returns whether a group of rows may have frames of an episode, by its statistics."""
    metadata = file.metadata.row_group(group)
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema == "episode_index":
            bounds = column.statistics
            if bounds is not None and bounds.has_min_max:
                return bounds.min <= episode <= bounds.max
    return True


def _feature(declared: Mapping[str, Any]) -> Feature:
    """Returns the shape and type of a field from its entry in info.json."""
    kind, shape = declared["dtype"], tuple(declared.get("shape") or ())
    if kind in ("image", "video"):
        names = declared.get("names")
        # Some data sets declare channels first, although their images are not stored so.
        if isinstance(names, Sequence) and "height" in names and "width" in names:
            sizes = dict(zip(names, shape, strict=True))
            return Feature((sizes["height"], sizes["width"], 3), "image")
        return Feature((None, None, 3), "image")
    return Feature(shape, "str" if kind == "string" else kind)


def _of_split(
    episodes: Sequence[dict[str, Any]], info: Mapping[str, Any], split: str, root: pathlib.Path
) -> list[dict[str, Any]]:
    """Returns the episodes of a split, in their order."""
    ordered = sorted(episodes, key=lambda x: x["episode_index"])
    declared = int(info["total_episodes"])
    if len(ordered) != declared:
        raise InvalidData(
            f"{root} lists {len(ordered)} episodes, but {INFO} declares {declared}; some of the "
            "metadata are missing."
        )
    splits = _splits(info)
    if split not in splits:
        raise InvalidData(f"split={split!r} is not in {root / INFO}. {nearest(split, [*splits])}")
    start, _, stop = str(splits[split]).partition(":")
    return ordered[int(start or 0) : int(stop) if stop else None]


def _splits(info: Mapping[str, Any]) -> dict[str, str]:
    """Returns the ranges of episodes, for example '0:10', by the names of the splits."""
    return info.get("splits") or {"train": f"0:{int(info['total_episodes'])}"}


def split_names(root: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the splits of a data set.

    Raises:
      InvalidData: If its metadata cannot be read.
    """
    info = _read_json(root / INFO)
    try:
        return tuple(_splits(info))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidData(
            f"{root / INFO} has no splits, and total_episodes={info.get('total_episodes')!r} is no "
            "number of episodes; write the data set again."
        ) from error


def _provenance(episode: Mapping[str, Any]) -> Provenance:
    """Returns the provenance in our own columns of an episode; that of others is unknown."""
    values: dict[str, Any] = {
        name: episode.get(f"{PROVENANCE}{name}") for name in Provenance._fields
    }
    if values["policy"] is None:
        return Provenance()
    for name in ("episode_return", "success"):
        values[name] = math.nan if values[name] is None else values[name]
    return Provenance(**values)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
        reason = "it is not a JSON object"
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InvalidData(f"{path} cannot be read ({reason}).")


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    # Lines are split as bytes: str.splitlines() would also split at U+2028 within a text.
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
