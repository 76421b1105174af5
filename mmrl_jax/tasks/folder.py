"""Image, prompt and answer from files: a folder, or a data set of TFDS, in batches by number.

    pictures/metadata.jsonl   {"file_name": "a/0.png", "prompt": "How many?", "answer": "two"}
    pictures/a/0.png          a further key of a line is a column, which reward functions are given

Everything here runs on the host. All records are read once when the data is opened: what cannot be
used is set aside with its reason, so that the batch of an update depends on nothing but the
update's number, and a resumed run goes on with the records that it would have seen.
"""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import copy
import functools
import hashlib
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.tasks import images as images_lib
from mmrl_jax.tasks.image_index import ImageIndex
from mmrl_jax.tasks.images import ImageInfo

METADATA = "metadata.jsonl"
NAMED = 5  # Records that an error names.
SHOWN = 80  # Characters of a value that an error shows.


class Record(NamedTuple):
    """One sample.

    Attributes:
      image: uint8 [H, W, 3].
      prompt: text, not empty.
      answer: text, not empty.
      columns: whatever else is known of it.
    """

    image: np.ndarray
    prompt: str
    answer: str
    columns: dict[str, Any]


class Reader(NamedTuple):
    """How one record is read; both functions raise if it cannot be used.

    Attributes:
      inspect: all checks, without the image where what is known of it is stored.
      read: the record.
    """

    inspect: Callable[[], ImageInfo]
    read: Callable[[], Record]


class Rejected(NamedTuple):
    """A record that cannot be used: where it stands, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """B samples.

    Attributes:
      images: uint8 [B, H, W, 3].
      prompts: B texts.
      answers: B texts.
      columns: what else is known of each of the B samples.
      records: int64 [B], the samples' numbers among the good records.
    """

    images: np.ndarray
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    columns: tuple[dict[str, Any], ...]
    records: np.ndarray

    def take(self, places: Sequence[int]) -> "Batch":
        """The samples at these places of the batch."""
        return Batch(
            images=self.images[places],
            prompts=tuple(self.prompts[i] for i in places),
            answers=tuple(self.answers[i] for i in places),
            columns=tuple(self.columns[i] for i in places),
            records=self.records[places],
        )


class Records:
    """The good records of a source, shuffled anew in each epoch.

    Attributes:
      names: of the good records.
      images: what is known of the image of each of them.
      rejected: the others.

    Args:
      readers: name of a record -> how it is read.
      batch_size: B.
      seed: of the orders.
      max_rejected: the share of records, in [0, 1), that may be rejected.

    Raises:
      ValueError: there are no records, or more of them than `max_rejected` were rejected.
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
        if not 0 <= max_rejected < 1:
            raise ValueError(f"max_rejected={max_rejected} must be a share in [0, 1).")
        if not readers:
            raise ValueError("There are no records; check the directory and the split.")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = dict(zip(readers, pool.map(_inspected, readers.values()), strict=True))
        good = {name: info for name, info in found.items() if isinstance(info, ImageInfo)}
        self.names, self.images = tuple(good), tuple(good.values())
        self.rejected = tuple(
            Rejected(name, reason) for name, reason in found.items() if isinstance(reason, str)
        )
        if len(self.rejected) > max_rejected * len(found):
            named = "\n".join(f"  {name}: {why}" for name, why in self.rejected[:NAMED])
            raise ValueError(
                f"{len(self.rejected)} of {len(found)} records cannot be used, more than "
                f"max_rejected={max_rejected} of them. Mend them, or raise it. The first:\n{named}"
            )
        self._readers = [readers[name] for name in self.names]
        self._batch_size, self._seed = batch_size, seed
        # A batch may lie across two epochs.
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return len(self.names)

    def divided(self, sizes: Mapping[str, int], *, seed: int) -> dict[str, "Records"]:
        """Parts by name that share no image, each as one batch, and the rest as 'train'.

        Images are put in order by a hash of their content and the seed. The first part takes the
        records of one image after the other until it has as many as it should, then the next part.
        So all records of an image are in one part, and a part may have a few records more than
        asked for. Neither names, lines nor the seed of the batches matter, and the first part does
        not depend on the sizes of the others. Where images are added or removed, the order of the
        others stays: only those at the ends of the parts change sides.

        Args:
          sizes: name of a part -> least number of its records.
          seed: of the order of images.

        Raises:
          ValueError: no record is left to train on.
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
        return {name: self._of(np.array(x), len(x)) for name, x in parts.items()} | {
            "train": self._of(np.array(rest), self._batch_size)
        }

    def batched(self, size: int) -> "Records":
        """The same records in batches of another size."""
        return self._of(np.arange(len(self)), size)

    def _of(self, numbers: np.ndarray, batch_size: int) -> "Records":
        """These records alone."""
        part = copy.copy(self)
        part.names = tuple(self.names[i] for i in numbers)
        part.images = tuple(self.images[i] for i in numbers)
        part._readers = [self._readers[i] for i in numbers]
        part._batch_size = batch_size
        part._order = functools.lru_cache(maxsize=2)(part._shuffle)
        return part

    def batch(self, update: int) -> Batch:
        """The batch of an update, counted from 0; epochs follow each other without a gap.

        Raises:
          ValueError: `update` is negative, or see `read`.
        """
        if update < 0:
            raise ValueError(f"update={update} must be at least 0.")
        places = range(update * self._batch_size, (update + 1) * self._batch_size)
        return self.read([int(self._order(p // len(self))[p % len(self)]) for p in places])

    def read(self, numbers: Sequence[int]) -> Batch:
        """The good records of these numbers.

        Raises:
          ValueError: a record has changed since it was checked.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            records = list(pool.map(self._read, numbers))
        return Batch(
            images=np.stack([r.image for r in records]),
            prompts=tuple(r.prompt for r in records),
            answers=tuple(r.answer for r in records),
            columns=tuple(r.columns for r in records),
            records=np.array(numbers, np.int64),
        )

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))

    def _read(self, number: int) -> Record:
        try:
            return self._readers[number].read()
        except Exception as error:
            raise ValueError(
                f"{self.names[number]} could be read when the data was opened, but no longer: "
                f"{error}. Leave the files alone while they are used."
            ) from error


def _inspected(reader: Reader) -> ImageInfo | str:
    """What is known of a record's image, or why the record cannot be used."""
    try:
        return reader.inspect()
    except Exception as error:  # Decoders raise whatever they like.
        return f"{type(error).__name__}: {error}"


# (prompt, answer, columns) of a record; raises if they cannot be used.
Check = Callable[[str, str, Mapping[str, Any]], object]


def open_folder(
    directory: str | pathlib.Path,
    *,
    size: tuple[int, int],
    resize: str = images_lib.LETTERBOX,
    batch_size: int,
    seed: int,
    max_rejected: float,
    check: Check = lambda prompt, answer, columns: None,
) -> Records:
    """Opens a folder in the layout of Hugging Face's 'imagefolder'.

    What is found out about its images is kept, see `image_index`: another process, and another
    opening, decodes those only that have changed.

    Args:
      directory: holds metadata.jsonl, a line of JSON for each record: 'file_name' of its image,
        relative to the directory, 'prompt', 'answer', and any columns besides.
      size: height and width of the images of a batch, pixels.
      resize: how images come to that size, see `images.fit`.
      batch_size: see `Records`.
      seed: see `Records`.
      max_rejected: see `Records`.
      check: raises for a record that cannot be used for a reason of the caller's.

    Raises:
      ValueError: there is no metadata.jsonl; or see `Records`.
    """
    root = pathlib.Path(directory).resolve()
    metadata = root / METADATA
    if not metadata.is_file():
        raise ValueError(
            f"{metadata} is not there; write a line of JSON with file_name, prompt and answer for "
            "each image."
        )
    index = ImageIndex(root, lambda data: images_lib.read_rgb(data)[1])
    readers: dict[str, Reader] = {}
    # Not as text: its splitlines() also cuts at U+2028, which may stand within a line of JSON, and
    # a byte that is no UTF-8 would cost the whole file instead of one record.
    for number, line in enumerate(metadata.read_bytes().split(b"\n"), start=1):
        if line.strip():
            readers[f"{metadata.name}:{number}"] = Reader(
                functools.partial(_inspect_line, root, line, check, index),
                functools.partial(_read_line, root, line, size, resize),
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
    """Opens a data set that TFDS has prepared, in a format of random access (array_record).

    Every example is a record; of an RLDS data set, whose examples are episodes, every step is.

    Args:
      directory: of one version of the data set, with dataset_info.json.
      split: e.g. 'train'.
      fields: where 'image' (encoded, or uint8 [H, W, 3]), 'prompt' and 'answer' lie, with slashes
        between levels, e.g. {'image': 'observation/image', ...}; of RLDS, in a step. Further names
        are columns.
      size: height and width of the images of a batch, pixels.
      resize: how images come to that size, see `images.fit`.
      batch_size: see `Records`.
      seed: see `Records`.
      max_rejected: see `Records`.

    Raises:
      ImportError: the extra `data` (tensorflow-datasets and array-record) is not installed.
      ValueError: `fields` lacks one of the three; or see `Records`.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{directory} is read with tensorflow-datasets and array-record: run `make setup-dev`, "
            "or install mmrl_jax with its extra: pip install -e '.[data]'."
        ) from error

    lacking = [name for name in ("image", "prompt", "answer") if name not in fields]
    if lacking:
        raise ValueError(f"fields={dict(fields)} lacks {lacking}; say where they lie.")
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


def _parsed(root: pathlib.Path, line: bytes) -> tuple[pathlib.Path, dict[str, Any]]:
    """The image's file of a line of the metadata, and all that the line has."""
    columns = json.loads(line)
    if not isinstance(columns, dict):
        raise ValueError(f"{shown(columns)} is not an object; write {{...}}.")
    path = (root / _text(columns, "file_name")).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"file_name={shown(columns['file_name'])} lies outside the folder.")
    return path, columns


def _inspect_line(root: pathlib.Path, line: bytes, check: Check, index: ImageIndex) -> ImageInfo:
    path, columns = _parsed(root, line)
    check(*_texts(columns))
    return index.look_up(path)


def _read_line(root: pathlib.Path, line: bytes, size: tuple[int, int], resize: str) -> Record:
    path, columns = _parsed(root, line)
    image, _ = images_lib.read_rgb(path.read_bytes())
    return Record(images_lib.fit(image, size, resize=resize), *_texts(columns))


def _inspect_example(
    example: Callable[[], Mapping[str, Any]], fields: Mapping[str, str]
) -> ImageInfo:
    columns = _fields(example(), fields)
    _texts(columns)
    return images_lib.read_rgb(columns["image"])[1]


def _read_example(
    example: Callable[[], Mapping[str, Any]],
    fields: Mapping[str, str],
    size: tuple[int, int],
    resize: str,
) -> Record:
    columns = _fields(example(), fields)
    image, _ = images_lib.read_rgb(columns["image"])
    return Record(images_lib.fit(image, size, resize=resize), *_texts(columns))


def _step(source: Any, i: int, step: int) -> Mapping[str, Any]:
    # There is no way to a step but past the ones before it.
    return next(itertools.islice(iter(source[i]["steps"]), step, None))


def _fields(example: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    return {name: _at(example, path) for name, path in fields.items()}


def _texts(columns: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Prompt, answer and further columns of a record."""
    named = ("file_name", "image", "prompt", "answer")
    further = {name: value for name, value in columns.items() if name not in named}
    return _text(columns, "prompt"), _text(columns, "answer"), further


def _at(example: Any, path: str) -> Any:
    for key in path.split("/"):
        if key not in example:
            raise ValueError(f"{path!r} is not in the example; at {key!r} it has {list(example)}.")
        example = example[key]
    return example


def _text(columns: Mapping[str, Any], name: str) -> str:
    """A text or a number as text; TFDS gives texts as bytes."""
    value = columns.get(name)
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    # JSON as Python reads it has NaN, which is how tables write what is not there.
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, (float, np.floating)) and np.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        there = "" if name in columns else f" The record has only {shown(list(columns))}."
        raise ValueError(f"{name}={shown(value)} is no text; write one.{there}")
    return value.strip()


def shown(value: Any) -> str:
    """A value as an error shows it: of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
