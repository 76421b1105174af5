"""The formats of demonstrations: which one a directory has, and the writer of each."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any, Protocol

from mmrl_jax.data import lerobot, tfds_files
from mmrl_jax.data.lerobot import LeRobot
from mmrl_jax.data.lerobot_writer import LeRobotWriter
from mmrl_jax.data.records import Episode, EpisodeSource, InvalidData, Schema
from mmrl_jax.data.rlds import Rlds, RldsWriter

FORMATS = ("rlds", "lerobot")


class EpisodeWriter(Protocol):
    """Writes a data set in shards.

    A process that is killed leaves whole shards only, and no data set that a reader accepts until
    `finish` has returned.
    """

    def write_shard(
        self, number: int, episodes: Sequence[Episode], before: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Writes a shard, or replaces it.

        Args:
          number: Number of the shard.
          episodes: Episodes, which fulfil the schema.
          before: Results of this function for all shards before this one.

        Returns:
          Values that JSON supports, which later calls need: 'episodes', the number of episodes, and
          more.
        """

    def finish(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Writes the metadata.

        Args:
          shards: Results of `write_shard` for all shards.
        """


def make_writer(
    kind: str,
    directory: pathlib.Path,
    *,
    name: str,
    split: str,
    schema: Schema,
    shards: int,
    fps: float,
) -> EpisodeWriter:
    """Returns the writer of a format.

    Args:
      kind: One of FORMATS.
      directory: Directory of the data set.
      name: Name of the data set.
      split: Name of the split.
      schema: Fields of an episode.
      shards: Number of shards.
      fps: Number of steps per second, which only LeRobot stores.

    Raises:
      ImportError: If a package that the format needs is not installed.
      ValueError: If the format is unknown.
    """
    arguments: dict[str, Any] = {"name": name, "split": split, "schema": schema, "shards": shards}
    if kind == "rlds":
        return RldsWriter(directory, **arguments)
    if kind == "lerobot":
        return LeRobotWriter(directory, **arguments, fps=fps)
    raise ValueError(f"format={kind!r} is unknown; choose one of {FORMATS}.")


def split_names(directory: str | os.PathLike) -> tuple[str, ...]:
    """Returns the names of the splits of a data set; () if the directory is none.

    Raises:
      InvalidData: If its metadata cannot be read.
    """
    root = pathlib.Path(directory)
    if (root / lerobot.INFO).is_file():
        return lerobot.split_names(root)
    if (root / tfds_files.INFO).is_file():
        return tuple(split["name"] for split in tfds_files.read_info(root)["splits"])
    return ()


def open_directory(directory: str | os.PathLike, split: str) -> EpisodeSource:
    """Opens a data set, whose format is found by its files.

    Args:
      directory: Directory with a dataset_info.json of TFDS, or with a meta/info.json of LeRobot.
      split: Name of the split.

    Raises:
      ImportError: If a package that the format needs is not installed.
      InvalidData: If the directory does not exist, or has neither format.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise InvalidData(f"{root} does not exist; give the directory of a data set.")
    if (root / lerobot.INFO).is_file():
        return LeRobot(root, split)
    if (root / tfds_files.INFO).is_file():
        return Rlds(root, split)
    versions = tfds_files.versions(root)
    hint = f"Give the directory of a version, for example {versions[0]}. " if versions else ""
    raise InvalidData(
        f"{root} is no data set: it has neither {tfds_files.INFO} (RLDS) nor {lerobot.INFO} "
        f"(LeRobot). {hint}A recording that was interrupted is finished by the same command."
    )
