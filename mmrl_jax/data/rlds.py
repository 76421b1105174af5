"""RLDS data sets of TFDS, read and written without TensorFlow.

An example is an episode: 'steps', a nested data set, and 'episode_metadata'. We write array_record,
which `tfds.builder_from_directory` and `tfds.data_source` read. We read array_record and TFRecord,
the format of Open X-Embodiment (2023, "Open X-Embodiment: Robotic Learning Datasets and RT-X
Models"). tensorflow-datasets and array-record are imported where they are needed.
"""

from collections.abc import Collection, Mapping, Sequence
import functools
import os
import pathlib
from typing import Any

import numpy as np

from mmrl_jax.data import files, tfds_files
from mmrl_jax.data.images import encode_png
from mmrl_jax.data.records import (
    Episode,
    Feature,
    Invalid,
    InvalidData,
    Provenance,
    RawEpisode,
    Schema,
    feature_of,
)
from mmrl_jax.data.tfrecord import Shard

# Fields of a step by our names.
DEFAULTS = {
    "pixels": "observation/pixels",
    "proprio": "observation/proprio",
    "instruction": "language_instruction",
    "action": "action",
    "reward": "reward",
    "is_terminal": "is_terminal",
}
FLAGS = ("is_first", "is_last", "is_terminal")
VERSION = "1.0.0"


class Rlds:
    """Random access to the episodes of a split of an RLDS data set, see `records.EpisodeSource`.

    Attributes:
      features: Fields of a step by their paths, for example 'observation/image'.
      defaults: Fields of a step by our names.

    Args:
      directory: Directory of one version of the data set, with a dataset_info.json.
      split: Name of the split.

    Raises:
      ImportError: If tensorflow-datasets or array-record is not installed.
      InvalidData: If the metadata cannot be read, there is no such split, the files have another
        format, or an example has no steps.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        tfds = tfds_files.import_tfds(directory)
        info = tfds_files.read_info(directory)
        self._format = info["fileFormat"]
        if self._format not in ("tfrecord", "array_record"):
            raise InvalidData(
                f"{directory} has files of the format {self._format}; only tfrecord and "
                "array_record can be read."
            )
        self._split = tfds_files.shards(directory, info, split, self._format)
        self._ends = np.cumsum(self._split.lengths)
        try:
            self._features = tfds.features.FeaturesDict.from_config(str(directory))
        except Exception as error:  # TFDS raises exceptions of many types.
            raise InvalidData(
                f"{pathlib.Path(directory) / tfds_files.FEATURES} cannot be read "
                f"({type(error).__name__}: {error})."
            ) from error
        fields = dict(self._features.items())
        steps = fields.get("steps")
        if not isinstance(steps, tfds.features.Dataset):
            raise InvalidData(
                f"{directory} has examples with {sorted(fields)}; those of RLDS have 'steps', a "
                "nested data set."
            )
        self.features: dict[str, Feature] = dict(_flat_features(tfds, steps.feature))
        self.defaults: dict[str, str] = DEFAULTS | {
            name: name for name in self.features if name.startswith("privileged/")
        }
        # Images stay encoded, so that only those that are used are decoded.
        self._decoders = {"steps": _skip_images(tfds, steps.feature)}
        self._open = functools.lru_cache(maxsize=8)(self._open_shard)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the shard of an episode, and its number there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self._split.lengths[shard])

    def name(self, index: int) -> str:
        shard, number = self._place(index)
        return f"{self._split.paths[shard].name}:{number}"

    def read(self, index: int, fields: Collection[str]) -> RawEpisode:
        shard, number = self._place(index)
        data = self._open(shard).read(number)
        try:
            example = self._features.deserialize_example_np(data, decoders=self._decoders)
            steps = list(example["steps"])
        except Exception as error:  # An example of another structure fails in many ways.
            raise Invalid(
                "wrong schema",
                f"the record is not as {tfds_files.FEATURES} says ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}).",
            ) from error
        wanted = {*fields, *FLAGS} & self.features.keys()
        columns = {name: [_at(step, name) for step in steps] for name in wanted}
        values = {name: self._column(name, x) for name, x in columns.items()}
        metadata = example.get("episode_metadata")
        provenance = _provenance(metadata if isinstance(metadata, Mapping) else {})
        return RawEpisode(values, True, provenance)

    def _column(self, name: str, values: list[Any]) -> Any:
        """Returns the values of a field at all steps as an array, images or texts."""
        kind = self.features[name].dtype
        if kind == "image":
            return values
        if kind == "str":
            try:
                return [x.decode("utf-8") if isinstance(x, bytes) else str(x) for x in values]
            except UnicodeDecodeError as error:
                raise Invalid("invalid text", f"{name!r} is not UTF-8 ({error}).") from error
        try:
            return np.stack(values) if values else np.zeros((0,))
        except ValueError as error:
            shapes = {np.shape(x) for x in values}
            raise Invalid("wrong schema", f"{name!r} has the shapes {shapes}.") from error

    def _open_shard(self, shard: int) -> Any:
        path, declared = self._split.paths[shard], self._split.lengths[shard]
        if not path.is_file():
            raise Invalid("damaged shard", f"{path.name} does not exist.")
        return Shard(path) if self._format == "tfrecord" else _ArrayRecordShard(path, declared)


class _ArrayRecordShard:
    """Random access to the records of an array_record file, which verifies its own hashes."""

    def __init__(self, path: pathlib.Path, declared: int):
        module = tfds_files.import_array_record(path.parent)
        self._path = path
        try:
            self._reader = module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
            count = self._reader.num_records()
        except Exception as error:
            raise _damaged(path, error) from error
        if count < declared:
            # The index is at the end of the file, so that nothing can be read without it.
            raise Invalid("truncated shard", f"{path.name} has {count} of {declared} records.")

    def read(self, number: int) -> bytes:
        """Returns the data of a record.

        Raises:
          Invalid: If the record is damaged.
        """
        try:
            return self._reader.read([number])[0]
        except Exception as error:
            raise _damaged(self._path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> Invalid:
    return Invalid("damaged shard", f"{path.name}: {' '.join(str(error).split())[:200]}.")


def _flat_features(tfds: Any, features: Any, prefix: str = "") -> Any:
    """Yields the fields of a step with their paths; those of other kinds cannot be mapped."""
    for name, feature in features.items():
        path = f"{prefix}{name}"
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _flat_features(tfds, feature, f"{path}/")
        elif isinstance(feature, tfds.features.Image):
            yield path, Feature(tuple(feature.shape), "image")
        elif isinstance(feature, tfds.features.Text):
            yield path, Feature((), "str")
        elif isinstance(feature, tfds.features.Tensor):
            text = feature.np_dtype in (np.str_, np.object_, str, bytes)
            yield (
                path,
                Feature(tuple(feature.shape), "str" if text else np.dtype(feature.np_dtype).name),
            )


def _skip_images(tfds: Any, features: Any) -> dict[str, Any]:
    """Returns the decoders with which images stay encoded."""
    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            decoders[name] = _skip_images(tfds, feature)
        elif isinstance(feature, tfds.features.Image):
            decoders[name] = tfds.decode.SkipDecoding()
    return decoders


def _at(step: Any, path: str) -> Any:
    for key in path.split("/"):
        step = step[key]
    return step


def _provenance(metadata: Mapping[str, Any]) -> Provenance:
    """Returns the provenance in our own metadata of an episode; that of others is unknown."""
    if not set(Provenance._fields) <= metadata.keys():
        return Provenance()
    values = {name: metadata[name] for name in Provenance._fields}
    for name in ("policy", "split"):
        values[name] = values[name].decode("utf-8", "replace")
    for name in ("seed", "number"):
        values[name] = int(values[name])
    for name in ("episode_return", "success"):
        values[name] = float(values[name])
    return Provenance(**values)


# -- Writing ---------------------------------------------------------------------------------------


class RldsWriter:
    """Writes episodes as an RLDS data set in array_record, see `formats.EpisodeWriter`.

    Args:
      directory: Directory of the data set, for example language_reach/1.0.0.
      name: Name of the data set in the names of its files.
      split: Name of the split.
      schema: Fields of an episode, see `records.schema_of`.
      shards: Number of shards.

    Raises:
      ImportError: If tensorflow-datasets or array-record is not installed.
    """

    def __init__(
        self, directory: pathlib.Path, *, name: str, split: str, schema: Schema, shards: int
    ):
        self._tfds = tfds_files.import_tfds(directory)
        self._directory, self._schema = directory, schema
        self._info: dict[str, Any] = {
            "name": name,
            "splits": [{"name": split, "shardLengths": [0] * shards}],
        }
        self._name, self._split = name, split
        self._paths = tfds_files.shards(directory, self._info, split, "array_record").paths
        self._features = _features(self._tfds, schema)

    def write_shard(
        self, number: int, episodes: Sequence[Episode], before: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Writes a shard atomically, see `formats.EpisodeWriter`."""
        del before
        module = tfds_files.import_array_record(self._directory)
        size = 0
        with files.atomic(self._paths[number]) as temporary:
            writer = module.ArrayRecordWriter(str(temporary), "group_size:1")
            for episode in episodes:
                example = self._features.encode_example(_example(episode))
                data = self._features.serialize_example(example)
                writer.write(data)
                size += len(data)
            writer.close()
        return {"episodes": len(episodes), "bytes": size}

    def finish(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Writes the metadata, without which no reader accepts the directory."""
        from etils import epath

        core = self._tfds.core
        identity = core.dataset_info.DatasetIdentity(
            name=self._name,
            version=core.Version(VERSION),
            data_dir=str(self._directory),
            module_name="mmrl_jax.data.rlds",
        )
        info = core.DatasetInfo(
            builder=identity,
            features=self._features,
            description="Episodes in the format RLDS, recorded with mmrl_jax.",
        )
        template = core.naming.ShardedFileTemplate(
            data_dir=epath.Path(self._directory),
            dataset_name=self._name,
            split=self._split,
            filetype_suffix="array_record",
        )
        split = core.SplitInfo(
            name=self._split,
            shard_lengths=[shard["episodes"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards),
            filename_template=template,
        )
        info.set_file_format("array_record")
        info.set_splits(core.splits.SplitDict([split]))
        info.write_to_directory(self._directory)


def _features(tfds: Any, schema: Schema) -> Any:
    """Returns the structure of an example in TFDS."""
    tensor, scalar = tfds.features.Tensor, tfds.features.Scalar
    steps: dict[str, Any] = {"language_instruction": tfds.features.Text()}
    for path, feature in schema.items():
        *groups, name = path.split("/")
        group = steps
        for key in groups:
            group = group.setdefault(key, {})
        if feature.is_image:
            group[name] = tfds.features.Image(shape=feature.shape, encoding_format="png")
        else:
            group[name] = tensor(shape=feature.shape, dtype=np.dtype(feature.dtype))
    metadata = {name: tfds.features.Text() for name in ("policy", "split")}
    metadata |= {name: scalar(np.int64) for name in ("seed", "number")}
    metadata |= {name: scalar(np.float32) for name in ("episode_return", "success")}
    return tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(steps), "episode_metadata": metadata}
    )


def _example(episode: Episode) -> dict[str, Any]:
    """Returns an episode in the structure of `_features`."""
    steps = []
    fields = {
        name: [encode_png(image) for image in x] if feature_of(x).is_image else x
        for name, x in episode.fields().items()
    }
    for t, text in enumerate(episode.language_instruction):
        step: dict[str, Any] = {"language_instruction": text}
        for path, x in fields.items():
            *groups, name = path.split("/")
            group = step
            for key in groups:
                group = group.setdefault(key, {})
            group[name] = x[t]
        steps.append(step)
    return {"steps": steps, "episode_metadata": episode.provenance._asdict()}
