"""The metadata of a data set that TFDS has prepared, read without TFDS.

    dataset_info.json                              name, file format, splits with their shards
    features.json                                  structure of an example, see `rlds`
    <name>-<split>.<format>-00000-of-00010         the shards

The directory is that of one version, for example bridge/1.0.0.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

from mmrl_jax.data.records import InvalidData, nearest

INFO, FEATURES = "dataset_info.json", "features.json"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class Split(NamedTuple):
    """A split of a data set.

    Attributes:
      paths: Paths of the shards.
      lengths: Number of records of each shard that the metadata declare.
    """

    paths: tuple[pathlib.Path, ...]
    lengths: tuple[int, ...]


def read_info(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the contents of dataset_info.json, with a 'fileFormat'.

    Raises:
      InvalidData: If the file is missing or damaged.
    """
    path = pathlib.Path(directory) / INFO
    if not path.is_file():
        found = versions(directory)
        hint = f" Give one of {found[:5]}." if found else ""
        raise InvalidData(f"{path} does not exist; a data set of TFDS has one.{hint}")
    try:
        info = json.loads(path.read_bytes())
        info.setdefault("fileFormat", "tfrecord")  # Older versions of TFDS do not write it.
        for split in info["splits"]:
            split["name"] = str(split["name"])
            split["shardLengths"] = [int(x) for x in split["shardLengths"]]
        return info
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidData(
            f"{path} cannot be read ({type(error).__name__}: {error}); write the data set again."
        ) from error


def versions(directory: str | os.PathLike) -> list[str]:
    """Returns the directories of versions of data sets in a directory, sorted."""
    return sorted(str(path.parent) for path in pathlib.Path(directory).glob(f"**/{INFO}"))


def shards(
    directory: str | os.PathLike, info: dict[str, Any], name: str, file_format: str
) -> Split:
    """Returns the shards of a split, which may not exist.

    Args:
      directory: Directory of the data set.
      info: Contents of dataset_info.json.
      name: Name of the split.
      file_format: Format of the files, for example 'tfrecord'.

    Raises:
      InvalidData: If there is no such split.
    """
    splits = {split["name"]: split for split in info["splits"]}
    if name not in splits:
        raise InvalidData(f"split={name!r} is not in {directory}. {nearest(name, [*splits])}")
    lengths = tuple(splits[name]["shardLengths"])
    template = splits[name].get("filepathTemplate") or TEMPLATE
    paths = []
    for number in range(len(lengths)):
        index, count = f"{number:05d}", f"{len(lengths):05d}"
        file = template.format(
            DATASET=info["name"],
            SPLIT=name,
            FILEFORMAT=file_format,
            SHARD_X_OF_Y=f"{index}-of-{count}",
            SHARD_INDEX=index,
            NUM_SHARDS=count,
        )
        paths.append(pathlib.Path(directory) / file)
    return Split(tuple(paths), lengths)


def import_tfds(directory: object) -> Any:
    """Returns the module tensorflow_datasets, which is imported without TensorFlow.

    Raises:
      ImportError: If it is not installed; the message names the extra.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise missing_package(directory, "tensorflow-datasets and array-record", error) from error
    return tensorflow_datasets


def import_array_record(directory: object) -> Any:
    """Returns the module with the reader and the writer of array_record files.

    Raises:
      ImportError: If array-record is not installed; the message names the extra.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise missing_package(directory, "array-record", error) from error
    return array_record_module


def missing_package(directory: object, package: str, error: ImportError) -> ImportError:
    """Returns the error to raise if a package of the extra `data` is not installed."""
    return ImportError(
        f"{directory} is read and written with {package} ({error}): run `make setup-dev`, or "
        "install mmrl_jax with its extra: pip install -e '.[data]'."
    )
