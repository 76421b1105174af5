"""Episodes written as a data set of LeRobot v3.0, with the images in the parquet files.

Every shard is a file of frames with a row group for each episode, and a file of the table of
episodes. A LeRobot episode has an action at every frame, so that the final observation of an
episode is left out.
"""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import Any

import numpy as np

from mmrl_jax.data import files, lerobot
from mmrl_jax.data.images import encode_png
from mmrl_jax.data.records import Episode, Feature, Schema

CHUNK = 1000  # Number of files in a directory.
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS = "meta/tasks.parquet"
# Names of the fields of an episode, see `Episode.fields`.
NAMES = {
    "observation/pixels": "observation.images.pixels",
    "observation/proprio": "observation.state",
    "action": "action",
    "reward": "next.reward",
}
# Columns that every data set of LeRobot has.
INDEX = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


class LeRobotWriter:
    """Writes episodes in the format LeRobot v3.0, see `formats.EpisodeWriter`.

    Args:
      directory: Directory of the data set.
      name: Name of the data set, stored as the type of the robot.
      split: Name of the split.
      schema: Fields of an episode, see `records.schema_of`.
      shards: Number of shards.
      fps: Number of frames per second.

    Raises:
      ImportError: If pyarrow is not installed.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        name: str,
        split: str,
        schema: Schema,
        shards: int,
        fps: float,
    ):
        self._arrow, self._parquet = lerobot.import_pyarrow(directory)
        del shards
        self._directory, self._name, self._split = directory, name, split
        self._fields = {path: x for path, x in schema.items() if _name(path) is not None}
        self._fps = int(fps) if float(fps).is_integer() else fps

    def write_shard(
        self, number: int, episodes: Sequence[Episode], before: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Writes a shard atomically, see `formats.EpisodeWriter`."""
        place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
        first = sum(shard["episodes"] for shard in before)
        index = sum(shard["frames"] for shard in before)
        tasks = [text for shard in before for text in shard["tasks"]]
        known = len(tasks)
        tables, rows = [], []
        for offset, episode in enumerate(episodes):
            texts = list(episode.language_instruction)[: episode.actions]
            tasks += [text for text in dict.fromkeys(texts) if text not in tasks]
            columns = self._columns(episode)
            stats = {name: _statistics(x) for name, x in columns.items()}
            columns |= self._index_columns(
                first + offset, index, [tasks.index(text) for text in texts]
            )
            tables.append(self._table(columns))
            rows.append(
                {
                    "episode_index": first + offset,
                    "tasks": list(dict.fromkeys(texts)),
                    "length": episode.actions,
                    "data/chunk_index": place["chunk_index"],
                    "data/file_index": place["file_index"],
                    "dataset_from_index": index,
                    "dataset_to_index": index + episode.actions,
                    "meta/episodes/chunk_index": place["chunk_index"],
                    "meta/episodes/file_index": place["file_index"],
                }
                | {f"stats/{n}/{kind}": x for n, stat in stats.items() for kind, x in stat.items()}
                | _provenance(episode)
            )
            index += episode.actions
        names = (DATA.format(**place), EPISODES.format(**place))
        if rows:
            self._write(names[0], tables)
            self._write(names[1], [self._arrow.Table.from_pylist(rows)])
        return {
            "episodes": len(episodes),
            "checksums": {name: self._digest(name) for name in names if rows},
            "frames": sum(row["length"] for row in rows),
            "tasks": tasks[known:],
            "statistics": _merged([_stats_of(row) for row in rows]),
        }

    def finish(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Writes the metadata; info.json, without which no reader accepts the directory, last."""
        meta = self._directory / "meta"
        tasks = [text for shard in shards for text in shard["tasks"]]
        self._write_tasks(tasks)
        checksums = {TASKS: self._digest(TASKS)}
        for shard in shards:
            checksums |= shard["checksums"]
        files.write_text(self._directory / lerobot.CHECKSUMS, json.dumps(checksums, indent=1))
        statistics = _merged([shard["statistics"] for shard in shards if shard["episodes"]])
        files.write_text(meta / "stats.json", json.dumps(statistics, indent=2))
        episodes = sum(shard["episodes"] for shard in shards)
        flags = {name: Feature((), "bool") for name in statistics if name.startswith("next.")}
        fields = flags | {str(_name(path)): x for path, x in self._fields.items()}
        features = {name: _declared(x) for name, x in fields.items()}
        features |= {
            name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDEX.items()
        }
        info = {
            "codebase_version": "v3.0",
            "robot_type": self._name,
            "total_episodes": episodes,
            "total_frames": sum(shard["frames"] for shard in shards),
            "total_tasks": len(tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {self._split: f"0:{episodes}"},
            "data_path": DATA,
            "video_path": None,
            "features": features,
        }
        files.write_text(self._directory / lerobot.INFO, json.dumps(info, indent=2))

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """Returns the frames of an episode by the names of the columns, [N, ...] each."""
        count, arrays = episode.actions, episode.fields()
        last = np.arange(count) == count - 1
        columns = {str(_name(path)): arrays[path][:count] for path in self._fields}
        columns |= {"next.done": last, "next.truncated": last & ~episode.is_terminal.any()}
        success = episode.provenance.success
        return columns if math.isnan(success) else columns | {"next.success": last & (success == 1)}

    def _index_columns(
        self, episode: int, index: int, tasks: Sequence[int]
    ) -> dict[str, np.ndarray]:
        frames = np.arange(len(tasks), dtype=np.int64)
        return {
            "timestamp": (frames / self._fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(len(tasks), episode, np.int64),
            "index": index + frames,
            "task_index": np.asarray(tasks, np.int64),
        }

    def _table(self, columns: Mapping[str, np.ndarray]) -> Any:
        arrow, arrays = self._arrow, {}
        for name, x in columns.items():
            if x.ndim == 4:
                images = [
                    {"bytes": encode_png(image), "path": lerobot_image_name(i)}
                    for i, image in enumerate(x)
                ]
                kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
                arrays[name] = arrow.array(images, kind)
            elif x.ndim == 1 or x.shape[1] == 1:
                arrays[name] = arrow.array(np.ascontiguousarray(x.reshape(len(x))))
            else:
                flat = arrow.array(np.ascontiguousarray(x).reshape(-1))
                arrays[name] = arrow.FixedSizeListArray.from_arrays(flat, x[0].size)
        return arrow.table(arrays)

    def _write(self, name: str, tables: Sequence[Any]) -> None:
        """Writes tables as the row groups of a file."""
        with (
            files.atomic(self._directory / name) as temporary,
            self._parquet.ParquetWriter(
                temporary, tables[0].schema, compression="snappy", write_page_checksum=True
            ) as writer,
        ):
            for table in tables:
                writer.write_table(table)

    def _write_tasks(self, tasks: Sequence[str]) -> None:
        """Writes the table of tasks, whose index in pandas is the text."""
        arrow = self._arrow
        table = arrow.table({"task_index": arrow.array(range(len(tasks)), arrow.int64())})
        table = table.append_column("task", arrow.array(list(tasks), arrow.string()))
        kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
        pandas = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                {
                    "name": name,
                    "field_name": name,
                    "pandas_type": kind,
                    "numpy_type": dtype,
                    "metadata": None,
                }
                for name, (kind, dtype) in kinds.items()
            ],
            "pandas_version": "2.0.0",
        }
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
        self._write(TASKS, [table])

    def _digest(self, name: str) -> str:
        return files.file_digest(self._directory / name)


def lerobot_image_name(frame: int) -> str:
    """Returns the file name that LeRobot gives to the image of a frame."""
    return f"frame-{frame:06d}.png"


def _name(path: str) -> str | None:
    """Returns the name of the column of a field; None if the format derives the field."""
    if path.startswith("privileged/"):
        return f"{lerobot.PRIVILEGED}{path.removeprefix('privileged/')}"
    return NAMES.get(path)


def _declared(feature: Feature) -> dict[str, Any]:
    """Returns the entry of a column in info.json."""
    if feature.is_image:
        names = ["height", "width", "channels"]
        return {"dtype": "image", "shape": list(feature.shape), "names": names}
    return {"dtype": feature.dtype, "shape": list(feature.shape) or [1], "names": None}


def _statistics(x: np.ndarray) -> dict[str, list]:
    """Returns minimum, maximum, mean and standard deviation of a column, and its length.

    Those of images are of each channel, in [0, 1], with the shape [3, 1, 1].
    """
    count = [len(x)]
    if x.ndim == 4:
        x = np.moveaxis(x.reshape(-1, 3), 1, 0).reshape(3, 1, 1, -1) / 255
    else:
        x = np.moveaxis(x.reshape(len(x), -1).astype(np.float64), 0, 1)
    stats = {"min": x.min(-1), "max": x.max(-1), "mean": x.mean(-1), "std": x.std(-1)}
    return {name: value.tolist() for name, value in stats.items()} | {"count": count}


def _stats_of(row: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    """Returns the statistics in a row of the table of episodes, by column."""
    stats: dict[str, dict[str, list]] = {}
    for key, value in row.items():
        if key.startswith("stats/"):
            name, _, kind = key.removeprefix("stats/").rpartition("/")
            stats.setdefault(name, {})[kind] = value
    return stats


def _merged(parts: Sequence[Mapping[str, Mapping[str, list]]]) -> dict[str, dict[str, list]]:
    """Merges the statistics of parts of a data set, by column (Chan et al., 1979)."""
    merged = {}
    for name in parts[0] if parts else ():
        stack = {kind: np.array([part[name][kind] for part in parts]) for kind in parts[0][name]}
        count = stack["count"].reshape(-1, *[1] * (stack["mean"].ndim - 1))
        total = count.sum()
        mean = (stack["mean"] * count).sum(0) / total
        square = ((stack["std"] ** 2 + (stack["mean"] - mean) ** 2) * count).sum(0) / total
        merged[name] = {
            "min": stack["min"].min(0).tolist(),
            "max": stack["max"].max(0).tolist(),
            "mean": mean.tolist(),
            "std": np.sqrt(square).tolist(),
            "count": [int(total)],
        }
    return merged


def _provenance(episode: Episode) -> dict[str, Any]:
    values = episode.provenance._asdict()
    for name in ("episode_return", "success"):
        values[name] = None if math.isnan(values[name]) else float(values[name])
    return {f"{lerobot.PROVENANCE}{name}": value for name, value in values.items()}
