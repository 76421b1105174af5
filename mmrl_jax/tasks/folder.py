"""Records of image, prompt and answer from a folder or a TFDS data set, in deterministic batches.

    images/metadata.jsonl   {"file_name": "a/0.png", "prompt": "How many?", "answer": "two"}
    images/a/0.png

`tables` has the other layouts of a folder, and `samples` the columns of a record, of which further
ones are passed to reward functions. This module runs on the host. All records are read once when
the data is opened, and those that cannot be used are rejected with a reason. The batch of an update
then depends on the number of the update alone, so that a resumed run continues with the records
that an uninterrupted run would have read.
"""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import copy
import functools
import hashlib
import itertools
import pathlib
import types
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.data import images as images_lib
from mmrl_jax.data import tfds_files
from mmrl_jax.data.weights import epoch_order
from mmrl_jax.tasks import tables
from mmrl_jax.tasks.image_index import ImageIndex
from mmrl_jax.tasks.reward_workers import printable
from mmrl_jax.tasks.samples import Inspected, Message, Sample, inspected, read_sample, short_repr

MAX_LISTED = 5  # Maximum number of records that an error message lists.
MAX_PATH = 4096  # Maximum number of characters of the path of an image, Linux's PATH_MAX.


class Record(NamedTuple):
    """One sample.

    Attributes:
      image: Image, uint8 [H, W, 3].
      prompt: Text of the prompt, not empty.
      answer: Text of the reference answer, not empty.
      columns: Further values of the record by the names of their columns.
      messages: The prompt as messages, if the record has it so; None otherwise.
    """

    image: np.ndarray
    prompt: str
    answer: str
    columns: dict[str, Any]
    messages: tuple[Message, ...] | None


class Reader(NamedTuple):
    """Functions that check and read one record, and raise if it cannot be used.

    Attributes:
      inspect: Checks the record and returns its properties; it does not decode the image if those
        of the image are cached.
      read: Reads the record.
    """

    inspect: Callable[[], Inspected]
    read: Callable[[], Record]


class Rejected(NamedTuple):
    """A record that cannot be used.

    Attributes:
      name: Name of the record, for example 'metadata.jsonl:3' for line 3.
      reason: Reason why it cannot be used.
    """

    name: str
    reason: str


class Batch(NamedTuple):
    """A batch of B samples.

    Attributes:
      images: Images, uint8 [B, H, W, 3].
      prompts: Texts of the B prompts.
      answers: Texts of the B reference answers.
      columns: Further columns of each of the B samples.
      messages: Prompts of the B samples as messages, each None if it is a text.
      records: Indices of the samples among the valid records, int64 [B].
    """

    images: np.ndarray
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    columns: tuple[dict[str, Any], ...]
    messages: tuple[tuple[Message, ...] | None, ...]
    records: np.ndarray

    def take(self, indices: Sequence[int] | np.ndarray) -> "Batch":
        """Returns the samples at the given indices of the batch."""
        return Batch(
            images=self.images[indices],
            prompts=tuple(self.prompts[i] for i in indices),
            answers=tuple(self.answers[i] for i in indices),
            columns=tuple(self.columns[i] for i in indices),
            messages=tuple(self.messages[i] for i in indices),
            records=self.records[indices],
        )


class Records:
    """The valid records of a data source, which are shuffled again in each epoch.

    Attributes:
      names: Names of the valid records.
      images: Properties of the image of each valid record.
      digests: Digest of image, prompt and answer of each valid record.
      rejected: Records that cannot be used.

    Args:
      readers: Reader of each record by the name of the record.
      batch_size: Number of samples B in a batch.
      seed: Seed of the order of records in each epoch.
      max_rejected: Maximum fraction of records, in [0, 1], that may be rejected.

    Raises:
      ValueError: If there are no records, all are rejected, or a larger fraction than
        `max_rejected` is.
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        *,
        batch_size: int,
        seed: int,
        max_rejected: float,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if not 0 <= max_rejected <= 1:
            raise ValueError(f"max_rejected={max_rejected} must be a fraction in [0, 1].")
        if not readers:
            raise ValueError("There are no records; check the directory and the split.")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            results = dict(zip(readers, pool.map(_inspected, readers.values()), strict=True))
        valid = {name: found for name, found in results.items() if isinstance(found, Inspected)}
        self.names = tuple(valid)
        self.images = tuple(found.image for found in valid.values())
        self.digests = tuple(found.digest for found in valid.values())
        self.rejected = tuple(
            Rejected(name, reason) for name, reason in results.items() if isinstance(reason, str)
        )
        if not valid or len(self.rejected) > max_rejected * len(results):
            allowed = f"more than the fraction max_rejected={max_rejected}. Fix them, or raise it"
            remedy = allowed if valid else "so that none is left. Fix them"
            listed = "\n".join(
                f"  {name}: {printable(why)}" for name, why in self.rejected[:MAX_LISTED]
            )
            raise ValueError(
                f"{len(self.rejected)} of {len(results)} records cannot be used, {remedy}. The "
                f"first:\n{listed}"
            )
        self._readers = [readers[name] for name in self.names]
        self._batch_size, self._seed = batch_size, seed
        self._weights: np.ndarray | None = None
        # A batch may contain records of two epochs.
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return len(self.names)

    def split(self, sizes: Mapping[str, int], *, seed: int) -> dict[str, "Records"]:
        """Splits the records into held-out parts and 'train', which have no image in common.

        Images are ordered by a hash of their content and the seed. The first part receives the
        records of one image after the other until it has at least the given number, then the next
        part. All records of an image are therefore in one part, and a part may have a few more
        records than requested. The split does not depend on file names, the order of lines or the
        seed of the batches, and the first part does not depend on the sizes of the others. If
        images are added or removed, only those next to the boundaries change their part.

        Args:
          sizes: Minimum number of records of each held-out part by its name.
          seed: Seed of the order of images.

        Returns:
          The parts by their names, each with a batch that holds the whole part, and the remaining
          records as 'train'.

        Raises:
          ValueError: If no record remains for 'train'.
        """
        by_image: dict[str, list[int]] = {}
        for number, info in enumerate(self.images):
            by_image.setdefault(info.digest, []).append(number)
        key = str(seed).encode()
        order = sorted(by_image, key=lambda x: hashlib.blake2b(x.encode(), key=key).digest())
        parts: dict[str, list[int]] = {name: [] for name in sizes}
        for name, size in sizes.items():
            while len(parts[name]) < size and order:
                parts[name] += by_image[order.pop(0)]
        if not order:
            raise ValueError(
                f"{dict(sizes)} of {len(self)} records of {len(by_image)} images leave none to "
                "train on; hold out fewer."
            )
        rest = sorted(number for image in order for number in by_image[image])
        return {name: self._subset(np.array(x), len(x)) for name, x in parts.items()} | {
            "train": self._subset(np.array(rest), self._batch_size)
        }

    def with_weights(self, weights: np.ndarray) -> "Records":
        """Returns the records of weights above 0, of which epochs have some more often.

        Args:
          weights: Weight of each record, float64 [N], see `weights.epoch_order`.
        """
        numbers = np.flatnonzero(weights)
        part = self._subset(numbers, self._batch_size)
        part._weights = weights[numbers]
        return part

    def with_batch_size(self, size: int) -> "Records":
        """Returns the same records in batches of another size."""
        return self._subset(np.arange(len(self)), size)

    def _subset(self, numbers: np.ndarray, batch_size: int) -> "Records":
        """Returns the records with the given indices."""
        part = copy.copy(self)
        part.names = tuple(self.names[i] for i in numbers)
        part.images = tuple(self.images[i] for i in numbers)
        part.digests = tuple(self.digests[i] for i in numbers)
        part._readers = [self._readers[i] for i in numbers]
        part._weights = None if self._weights is None else self._weights[numbers]
        part._batch_size = batch_size
        part._order = functools.lru_cache(maxsize=2)(part._shuffle)
        return part

    def batch(self, update: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Returns the batch of an update, or some of its samples.

        Epochs follow each other without a gap, so that a batch may contain records of two epochs.

        Args:
          update: Number of the update, counted from 0.
          rows: Indices in the batch of the samples to read; None for all of them.

        Raises:
          ValueError: If `update` is negative, or a record has changed since it was checked.
        """
        if update < 0:
            raise ValueError(f"update={update} must be at least 0.")
        first = update * self._batch_size
        positions = [first + int(i) for i in (range(self._batch_size) if rows is None else rows)]
        return self.read([int(self._order(p // len(self))[p % len(self)]) for p in positions])

    def read(self, numbers: Sequence[int]) -> Batch:
        """Returns the valid records with the given indices as a batch.

        Raises:
          ValueError: If a record has changed since it was checked.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            records = list(pool.map(self._read, numbers))
        return Batch(
            images=np.stack([r.image for r in records]),
            prompts=tuple(r.prompt for r in records),
            answers=tuple(r.answer for r in records),
            columns=tuple(r.columns for r in records),
            messages=tuple(r.messages for r in records),
            records=np.array(numbers, np.int64),
        )

    def _shuffle(self, epoch: int) -> np.ndarray:
        return epoch_order(len(self), self._weights, seed=self._seed, epoch=epoch)

    def _read(self, number: int) -> Record:
        try:
            return self._readers[number].read()
        except Exception as error:
            raise ValueError(
                f"{self.names[number]} could be read when the data was opened, but not any more: "
                f"{error}. Do not change the files while they are used."
            ) from error


def _inspected(reader: Reader) -> Inspected | str:
    """Returns the properties of a record, or the reason why it cannot be used."""
    try:
        return reader.inspect()
    except Exception as error:  # Image decoders raise exceptions of many types.
        return f"{type(error).__name__}: {error}"


# (prompt, answer, columns) of a record -> None; raises if the record cannot be used.
Check = Callable[[str, str, Mapping[str, Any]], object]


def open_folder(
    directory: str | pathlib.Path,
    *,
    files: str | None = None,
    names: Mapping[str, str] = types.MappingProxyType({}),
    size: tuple[int, int],
    resize: str = images_lib.LETTERBOX,
    batch_size: int,
    seed: int,
    max_rejected: float,
    files_option: str = tables.FILES_OPTION,
    check: Check = lambda prompt, answer, columns: None,
) -> Records:
    """Opens a folder with images and tables of records, see `tables` and `samples`.

    The properties of its images are cached on disk, see `image_index`. When the folder is opened
    again, also by another process, only images that have changed are decoded.

    Args:
      directory: Directory of the folder. Paths of images are relative to it.
      files: Pattern of the tables in the directory; None for the usual names, see
        `tables.find_tables`.
      names: Names of the columns of 'image', 'prompt' and 'answer', where they differ, see
        `samples.read_sample`.
      size: Height and width in pixels to which images are resized.
      resize: Method of resizing, see `images.fit`.
      batch_size: Number of samples in a batch.
      seed: Seed of the order of records in each epoch.
      max_rejected: Maximum fraction of records, in [0, 1], that may be rejected.
      files_option: Name of the option that has `files`, for messages.
      check: Additional check of a record, which raises if the record cannot be used.

    Raises:
      ValueError: If there is no table, one cannot be read, see `tables.read_rows`, or too many
        records are rejected, see `Records`.
    """
    root = pathlib.Path(directory).resolve()
    index = ImageIndex(root, lambda data: images_lib.read_rgb(data)[1])
    readers: dict[str, Reader] = {}
    groups = tables.RowGroups()
    for path in tables.find_tables(root, files, option=files_option):
        for number, row in tables.read_rows(path, groups).items():
            source = _Source(root, row, names)
            readers[f"{path.relative_to(root)}:{number}"] = Reader(
                functools.partial(_inspect, source, check, index),
                functools.partial(_read, source, size, resize),
            )
    try:
        return Records(readers, batch_size=batch_size, seed=seed, max_rejected=max_rejected)
    finally:
        index.save()


def open_tfds(
    directory: str | pathlib.Path,
    *,
    split: str,
    fields: Mapping[str, str],
    size: tuple[int, int],
    resize: str = images_lib.LETTERBOX,
    batch_size: int,
    seed: int,
    max_rejected: float,
) -> Records:
    """Opens a data set that was prepared with TFDS in a random-access format (array_record).

    Each example becomes a record. In an RLDS data set, whose examples are episodes, each step
    becomes a record.

    Args:
      directory: Directory of one version of the data set, with a dataset_info.json.
      split: Name of the split, for example 'train'.
      fields: Paths in an example, or in a step of RLDS, of 'image' (encoded, or uint8 [H, W, 3]),
        'prompt' and 'answer', with slashes between levels, for example {'image':
        'observation/image', ...}. Further names become columns.
      size: Height and width in pixels to which images are resized.
      resize: Method of resizing, see `images.fit`.
      batch_size: Number of samples in a batch.
      seed: Seed of the order of records in each epoch.
      max_rejected: Maximum fraction of records, in [0, 1], that may be rejected.

    Raises:
      ImportError: If the extra `data` (tensorflow-datasets and array-record) is not installed.
      ValueError: If `fields` lacks 'image', 'prompt' or 'answer', or too many records are rejected,
        see `Records`.
    """
    tfds = tfds_files.import_tfds(directory)
    missing = [name for name in ("image", "prompt", "answer") if name not in fields]
    if missing:
        raise ValueError(f"fields={dict(fields)} lacks {missing}; give their paths in an example.")
    builder = tfds.builder_from_directory(str(directory))
    source = builder.as_data_source(split=split)
    readers: dict[str, Reader] = {}

    def add(name: str, example: Callable[[], Mapping[str, Any]]) -> None:
        readers[name] = Reader(
            functools.partial(_inspect_example, example, fields),
            functools.partial(_read_example, example, fields, size, resize),
        )

    for i in range(len(source)):
        if "steps" not in builder.info.features:
            add(f"{split}:{i}", functools.partial(source.__getitem__, i))
            continue
        for step in range(len(list(source[i]["steps"]))):
            add(f"{split}:{i}:{step}", functools.partial(_step, source, i, step))
    return Records(readers, batch_size=batch_size, seed=seed, max_rejected=max_rejected)


class _Source(NamedTuple):
    """A row of a table of a folder."""

    root: pathlib.Path
    row: tables.Row
    names: Mapping[str, str]

    def sample(self) -> Sample:
        return read_sample(self.row(), self.names)

    def path(self, image: str) -> pathlib.Path:
        if len(image) > MAX_PATH:
            raise ValueError(
                f"The image {short_repr(image)} has {len(image)} characters, so that it looks like "
                "encoded data; give a path."
            )
        path = (self.root / image).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"The path {short_repr(image)} of the image is outside the folder.")
        return path


def _inspect(source: _Source, check: Check, index: ImageIndex) -> Inspected:
    sample = source.sample()
    check(sample.prompt, sample.answer, sample.columns)
    if isinstance(sample.image, bytes):
        return inspected(index.look_up_data(sample.image), sample)
    return inspected(index.look_up(source.path(_path_of(sample))), sample)


def _read(source: _Source, size: tuple[int, int], resize: str) -> Record:
    sample = source.sample()
    data = sample.image
    if not isinstance(data, bytes):
        data = source.path(_path_of(sample)).read_bytes()
    return _record(sample, data, size, resize)


def _path_of(sample: Sample) -> str:
    if not isinstance(sample.image, str):
        raise ValueError(f"The image is {short_repr(sample.image)}, not a path or encoded.")
    return sample.image


def _record(sample: Sample, data: bytes | np.ndarray, size: tuple[int, int], resize: str) -> Record:
    image, _ = images_lib.read_rgb(data)
    return Record(images_lib.fit(image, size, resize=resize), *sample[1:])


def _inspect_example(
    example: Callable[[], Mapping[str, Any]], fields: Mapping[str, str]
) -> Inspected:
    sample = read_sample(_fields(example(), fields), {})
    return inspected(images_lib.read_rgb(_pixels(sample))[1], sample)


def _read_example(
    example: Callable[[], Mapping[str, Any]],
    fields: Mapping[str, str],
    size: tuple[int, int],
    resize: str,
) -> Record:
    sample = read_sample(_fields(example(), fields), {})
    return _record(sample, _pixels(sample), size, resize)


def _pixels(sample: Sample) -> bytes | np.ndarray:
    if isinstance(sample.image, str):
        raise ValueError(f"image={short_repr(sample.image)} is a text; give the path of an image.")
    return sample.image


def _step(source: Any, i: int, step: int) -> Mapping[str, Any]:
    # The steps of an episode can only be read in order.
    return next(itertools.islice(iter(source[i]["steps"]), step, None))


def _fields(example: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    return {name: _at(example, path) for name, path in fields.items()}


def _at(example: Any, path: str) -> Any:
    for key in path.split("/"):
        if key not in example:
            raise ValueError(f"{path!r} is not in the example; at {key!r} it has {list(example)}.")
        example = example[key]
    return example
