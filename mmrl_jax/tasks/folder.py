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
import io
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

METADATA = "metadata.jsonl"
NAMED = 5  # Records that an error names.


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


class Records:
    """The good records of a source, shuffled anew in each epoch.

    Attributes:
      names: of the good records.
      rejected: the others.

    Args:
      readers: name of a record -> a function that reads it, and raises if it cannot be used.
      batch_size: B.
      seed: of the orders.
      max_rejected: the share of records, in [0, 1), that may be rejected.

    Raises:
      ValueError: there are no records, or more of them than `max_rejected` were rejected.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], Record]],
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
            reasons = list(pool.map(_reason, readers.values()))
        found = list(zip(readers, reasons, strict=True))
        self.names = tuple(name for name, reason in found if reason is None)
        self.rejected = tuple(Rejected(name, reason) for name, reason in found if reason)
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

    def divided(self, count: int) -> tuple["Records", "Records"]:
        """The records but for `count` of them, which the seed draws, and these, as one batch.

        Raises:
          ValueError: there are no more records than that.
        """
        if not 1 <= count < len(self):
            raise ValueError(f"{count} of {len(self)} records cannot be held out; hold out fewer.")
        drawn = np.random.default_rng(self._seed).permutation(len(self))
        rest, held_out = np.sort(drawn[count:]), np.sort(drawn[:count])
        return self._of(rest, self._batch_size), self._of(held_out, count)

    def _of(self, numbers: np.ndarray, batch_size: int) -> "Records":
        """These records alone."""
        part = copy.copy(self)
        part.names = tuple(self.names[i] for i in numbers)
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
            return self._readers[number]()
        except Exception as error:
            raise ValueError(
                f"{self.names[number]} could be read when the data was opened, but no longer: "
                f"{error}. Leave the files alone while they are used."
            ) from error


def _reason(read: Callable[[], Record]) -> str | None:
    """Why a record cannot be used; decoders raise whatever they like."""
    try:
        read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def open_folder(
    directory: str | pathlib.Path,
    *,
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    max_rejected: float,
    check: Callable[[Record], object] = lambda record: None,
) -> Records:
    """Opens a folder in the layout of Hugging Face's 'imagefolder'.

    Args:
      directory: holds metadata.jsonl, a line of JSON for each record: 'file_name' of its image,
        relative to the directory, 'prompt', 'answer', and any columns besides.
      size: height and width that images are resized to, pixels.
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
    readers: dict[str, Callable[[], Record]] = {}
    # Not as text: its splitlines() also cuts at U+2028, which may stand within a line of JSON, and
    # a byte that is no UTF-8 would cost the whole file instead of one record.
    for number, line in enumerate(metadata.read_bytes().split(b"\n"), start=1):
        if line.strip():
            readers[f"{metadata.name}:{number}"] = functools.partial(
                _from_line, root, line, size, check
            )
    return Records(readers, batch_size=batch_size, seed=seed, max_rejected=max_rejected)


def open_tfds(
    directory: str | pathlib.Path,
    *,
    split: str,
    fields: Mapping[str, str],
    size: tuple[int, int],
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
      size: height and width that images are resized to, pixels.
      batch_size: see `Records`.
      seed: see `Records`.
      max_rejected: see `Records`.

    Raises:
      ValueError: `fields` lacks one of the three; or see `Records`.
    """
    import tensorflow_datasets as tfds

    lacking = [name for name in ("image", "prompt", "answer") if name not in fields]
    if lacking:
        raise ValueError(f"fields={dict(fields)} lacks {lacking}; say where they lie.")
    builder = tfds.builder_from_directory(str(directory))
    source = builder.as_data_source(split=split)
    readers: dict[str, Callable[[], Record]] = {}
    for i in range(len(source)):
        if "steps" not in builder.info.features:
            readers[f"{split}:{i}"] = functools.partial(_from_example, source, i, fields, size)
            continue
        for step in range(len(list(source[i]["steps"]))):
            readers[f"{split}:{i}:{step}"] = functools.partial(
                _from_step, source, i, step, fields, size
            )
    return Records(readers, batch_size=batch_size, seed=seed, max_rejected=max_rejected)


def _from_line(
    root: pathlib.Path, line: bytes, size: tuple[int, int], check: Callable[[Record], object]
) -> Record:
    columns = json.loads(line)
    if not isinstance(columns, dict):
        raise ValueError(f"{columns!r} is not an object; write {{...}}.")
    path = (root / _text(columns, "file_name")).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"file_name={columns['file_name']!r} lies outside the folder.")
    record = _record(path.read_bytes(), columns, size)
    check(record)
    return record


def _from_example(source: Any, i: int, fields: Mapping[str, str], size: tuple[int, int]) -> Record:
    columns = {name: _at(source[i], path) for name, path in fields.items()}
    return _record(columns["image"], columns, size)


def _from_step(
    source: Any, i: int, step: int, fields: Mapping[str, str], size: tuple[int, int]
) -> Record:
    # There is no way to a step but past the ones before it.
    example = next(itertools.islice(iter(source[i]["steps"]), step, None))
    columns = {name: _at(example, path) for name, path in fields.items()}
    return _record(columns["image"], columns, size)


def _record(image: Any, columns: Mapping[str, Any], size: tuple[int, int]) -> Record:
    named = ("file_name", "image", "prompt", "answer")
    return Record(
        image=_pixels(image, size),
        prompt=_text(columns, "prompt"),
        answer=_text(columns, "answer"),
        columns={name: value for name, value in columns.items() if name not in named},
    )


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
        raise ValueError(f"{name}={value!r} is no text; write one.")
    return value.strip()


def _pixels(image: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An encoded image, or uint8 [H, W, 3], as uint8 [*size, 3]."""
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, bytes):
        # Cameras store a picture as the sensor lay, and how to turn it beside.
        picture = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(image))).convert("RGB")
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ValueError(f"image is {array.dtype} {array.shape}; give uint8 [H, W, 3].")
        picture = PIL.Image.fromarray(array)
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.asarray(picture)
