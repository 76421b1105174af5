"""Reads the samples of one or more splits: demonstrations or image-text records."""

from collections.abc import Mapping, Sequence
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from mmrl_jax.auditing import images as images_lib
from mmrl_jax.auditing.samples import Episodes, Frames, ImageTexts, Unreadable, concatenated
from mmrl_jax.data import files, formats, packed, tfds_files
from mmrl_jax.data.images import STRETCH
from mmrl_jax.data.mapping import FeatureMapping, Target, parse_part, part_size
from mmrl_jax.data.records import EpisodeSource, InvalidData, nearest
from mmrl_jax.tasks.folder import Records, open_folder
from mmrl_jax.tasks.samples import NAMES as COLUMNS

MIN_EDGE, MAX_EDGE = 32, 64  # Of the images that are audited, in pixels.
RESIZE = STRETCH  # Padding would give structure to images of one color, and edges to all others.
MAX_REJECTED = 1.0  # The audit counts rejected records and never fails because of their number.
SIZED = ("pixels", "proprio", "action")  # Arrays whose rows have the same size in all splits.
FEATURES, NAMES = "--features", ("pixels", "proprio", "instruction", "action")


class Part(NamedTuple):
    """A split of a data set.

    Attributes:
      directory: Directory of the data set.
      choice: Name of the split of demonstrations, or pattern of the tables of records; None for the
        only one.
    """

    directory: pathlib.Path
    choice: str | None


def parts(
    directories: Sequence[str], splits: Sequence[str], tables: Sequence[str]
) -> tuple[list[Part], bool]:
    """Returns the splits that a command line names, and whether they are demonstrations.

    Args:
      directories: Directories of data sets of one kind.
      splits: Names of splits of demonstrations; () for all of each directory.
      tables: Patterns of the tables of records, each of one split; () for the only one.

    Raises:
      ValueError: If a directory does not exist or only has versions of a data set in it, the
        directories are of both kinds, or splits are given for records, or tables for
        demonstrations.
    """
    roots = [pathlib.Path(directory) for directory in directories]
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"--data={root} does not exist; give the directory of a data set.")
    names = {root: formats.split_names(root) for root in roots}
    for root in roots:
        versions = [] if names[root] else tfds_files.versions(root)
        if versions:
            raise ValueError(
                f"--data={root} has data sets of RLDS in it; give the directory of a version, for "
                f"example {versions[0]}."
            )
    demonstrations = any(names.values())
    if demonstrations and not all(names.values()):
        raise ValueError(f"--data={directories}: give demonstrations or records, not both.")
    if tables and demonstrations:
        raise ValueError(f"--files={tables} is for records; choose demonstrations by --split.")
    if splits and not demonstrations:
        raise ValueError(f"--split={splits} is for demonstrations; choose records by --files.")
    if demonstrations:
        return [Part(root, x) for root in roots for x in splits or names[root]], True
    return [Part(root, x) for root in roots for x in tables or (None,)], False


def split_labels(chosen: Sequence[Part]) -> tuple[str, ...]:
    """Returns a name for each part: its split or directory, with a number if that is not unique."""
    alone = len({part.directory for part in chosen}) == 1
    names = []
    for part in chosen:
        name = part.choice if part.choice is not None and alone else part.directory.resolve().name
        name = "".join(x if x.isalnum() or x in "-_." else "_" for x in name).strip("_.") or "data"
        names.append(name)
    labels = list(names)
    for i, name in enumerate(names):
        if names.count(name) > 1:
            numbered = (f"{name}-{k}" for k in itertools.count(i))
            labels[i] = next(x for x in numbered if x not in (*names, *labels))
    return tuple(labels)


# -- Records ---------------------------------------------------------------------------------------


def read_records(chosen: Sequence[Part], columns: Mapping[str, str]) -> ImageTexts:
    """Reads image-text records into memory.

    Args:
      chosen: Splits.
      columns: Names of the columns of 'image', 'prompt' and 'answer', where they differ.

    Raises:
      ValueError: If a column is none of these, a directory cannot be opened, see
        `tasks.folder.open_folder`, or no record of a split can be used.
    """
    for name, column in columns.items():
        if name not in COLUMNS:
            raise ValueError(f"--columns={name}={column} is unknown; name one of {COLUMNS}.")

    def opened_at(edge: int) -> list[Records]:
        return [
            open_folder(
                part.directory,
                files=part.choice,
                names=columns,
                size=(edge, edge),
                resize=RESIZE,
                batch_size=1,
                seed=0,
                max_rejected=MAX_REJECTED,
                files_option="--files",
            )
            for part in chosen
        ]

    opened = opened_at(MAX_EDGE)
    edges = [min(info.width, info.height) for records in opened for info in records.images]
    edge = int(np.clip(np.median(edges), MIN_EDGE, MAX_EDGE))
    # Enlarged images would be smooth, also where they are noise. The second opening is a fast one.
    opened = opened if edge == MAX_EDGE else opened_at(edge)
    batches = [
        records.read(range(start, min(start + images_lib.CHUNK, len(records))))
        for records in opened
        for start in range(0, len(records), images_lib.CHUNK)
    ]
    return ImageTexts(
        splits=split_labels(chosen),
        split=np.repeat(np.arange(len(opened)), [len(records) for records in opened]),
        ids=tuple(name for records in opened for name in records.names),
        digests=tuple(x for records in opened for x in records.digests),
        unreadable=tuple(
            Unreadable(i, name, "", reason)
            for i, records in enumerate(opened)
            for name, reason in records.rejected
        ),
        images=concatenated([batch.images for batch in batches]),
        image_digests=tuple(info.digest for records in opened for info in records.images),
        prompts=tuple(x for batch in batches for x in batch.prompts),
        answers=tuple(x for batch in batches for x in batch.answers),
    )


# -- Demonstrations --------------------------------------------------------------------------------


def infer_features(
    source: EpisodeSource, given: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Returns the fields of images, readings, instruction and action by our names.

    Those that we record, and the fields with the usual names of other data sets, are found: the
    first field of images, the state, or else all numbers of the observation, the first text whose
    name has 'instruction' or 'task', and the fields whose names begin with 'action'.

    Args:
      source: Data set.
      given: Fields that the user names.

    Raises:
      InvalidData: If there are no readings, or no actions, or a field that the user names does not
        exist.
    """
    known, found = source.features, dict(given)
    for name, fields in given.items():
        if name not in NAMES:
            raise InvalidData(f"{FEATURES}={name}=... is unknown; name one of {NAMES}.")
        for field in fields:
            if parse_part(field).name not in known:
                raise InvalidData(
                    f"{FEATURES}={name}={field}: the data set has no such field. "
                    f"{nearest(parse_part(field).name, list(known))}"
                )
    numbers = [x for x, f in known.items() if f.dtype not in ("image", "str") and not f.is_image]
    seen = [x for x in numbers if x.startswith("observation") and len(known[x].shape) <= 1]
    states = [x for x in seen if x in ("observation.state", "observation/state")]
    texts = [x for x, f in known.items() if f.dtype == "str"]
    candidates = {
        "pixels": [x for x, f in known.items() if f.dtype == "image" or f.is_image][:1],
        "proprio": states or seen,
        "instruction": [x for x in texts if "instruction" in x or "task" in x][:1],
        "action": [x for x in numbers if x.startswith("action") and len(known[x].shape) <= 1],
    }
    for name, fields in candidates.items():
        default = source.defaults.get(name)
        if default is not None and default in known:
            fields = [default]
        if name not in found and fields:
            found[name] = tuple(fields)
    for name in ("proprio", "action"):
        if name not in found:
            raise InvalidData(
                f"No field for {name!r} is found; name it by {FEATURES}={name}=FIELD. The fields "
                f"are {sorted(known)}."
            )
    return found


def target_of(source: EpisodeSource, features: Mapping[str, Sequence[str]]) -> Target:
    """Returns the sizes in which episodes are read, from the declared sizes of their fields.

    A single action of an integer type is discrete.
    """

    def size(name: str) -> int:
        fields = [parse_part(text) for text in features[name]]
        return sum(part_size(source.features[field.name], field) for field in fields)

    pixels = None
    if "pixels" in features:
        shape = source.features[parse_part(features["pixels"][0]).name].shape
        edges = [x for x in shape[:2] if x is not None] or [MAX_EDGE]
        pixels = (int(np.clip(min(edges), MIN_EDGE, MAX_EDGE)),) * 2
    action = source.features[parse_part(features["action"][0]).name]
    discrete = np.dtype(action.dtype).kind in "iu" and size("action") == 1
    return Target(
        pixels=pixels,
        proprio=size("proprio"),
        action_size=np.iinfo(np.int32).max if discrete else size("action"),
        discrete=discrete,
        encode=(lambda text: np.zeros(0, np.int32)) if "instruction" in features else None,
        vocabulary="any",
        privileged={},
    )


def read_episodes(chosen: Sequence[Part], features: Mapping[str, tuple[str, ...]]) -> Episodes:
    """Reads demonstrations; their images are read once, and are kept as arrays on the disk.

    Args:
      chosen: Splits, with a `choice` each.
      features: Fields of the data by 'pixels', 'proprio', 'instruction' and 'action', where they
        are not found, see `infer_features`.

    Raises:
      ImportError: If a package that the format needs is not installed.
      InvalidData: If the data cannot be read, no episode of a split can be used, or the splits have
        fields of different sizes.
    """
    read, ids, digests, unreadable, frames = [], [], [], [], []
    for i, part in enumerate(chosen):
        assert part.choice is not None
        source = formats.open_directory(part.directory, part.choice)
        fields = infer_features(source, features)
        mapping = FeatureMapping(
            source, fields, target_of(source, fields), resize=RESIZE, key=FEATURES
        )
        digest = files.digest(files.fingerprint(part.directory), part.choice)
        cache = files.cache_directory() / "demonstrations"
        data = packed.pack(source, mapping, episodes=None, fingerprint=digest, cache=cache)
        read.append(data)
        ids += [source.name(int(number)) for number in data.numbers]
        digests += [digest] * len(data.numbers)
        reasons = dict(data.quarantine.examples)
        for number in sorted({*range(len(source))} - {*data.numbers.tolist()}):
            name = source.name(number)
            reason = reasons.get(name, "not listed: only the first reasons are kept")
            unreadable.append(Unreadable(i, name, digest, reason))
        if "pixels" in data.arrays:
            frames.append(frames_of(data.arrays["pixels"], data.starts))
    sizes = [{name: x.arrays[name].shape[1:] for name in SIZED if name in x.arrays} for x in read]
    if any(size != sizes[0] for size in sizes):
        raise InvalidData(
            f"The splits have images, readings or actions of different sizes: {sizes}. Audit them "
            "one by one."
        )
    return _episodes(chosen, read, ids, digests, unreadable, frames)


def _episodes(
    chosen: Sequence[Part],
    read: Sequence[packed.Packed],
    ids: Sequence[str],
    digests: Sequence[str],
    unreadable: Sequence[Unreadable],
    frames: Sequence[Frames],
) -> Episodes:
    """Returns the episodes of several splits together."""
    arrays = {
        name: concatenated([x.arrays[name] for x in read])
        for name in ("proprio", "action", "has_action")
    }
    rows = np.cumsum([0, *(len(x.arrays["action"]) for x in read)])
    action = arrays["action"]
    if action.ndim == 1:
        action = (action[:, None] == np.unique(action[arrays["has_action"]])).astype(np.float32)
    return Episodes(
        splits=split_labels(chosen),
        split=np.repeat(np.arange(len(read)), [len(x.numbers) for x in read]),
        ids=tuple(ids),
        digests=tuple(digests),
        unreadable=tuple(unreadable),
        starts=np.concatenate(
            [*(x.starts[:-1] + row for x, row in zip(read, rows, strict=False)), rows[-1:]]
        ),
        proprio=arrays["proprio"],
        action=action,
        has_action=np.asarray(arrays["has_action"]),
        instructions=tuple(
            x.texts[x.arrays["text"][start]] for x in read for start in x.starts[:-1]
        ),
        frames=_joined(frames) if frames else None,
    )


def frames_of(pixels: np.ndarray, starts: np.ndarray) -> Frames:
    """Returns what is kept of the images of N episodes, of which a chunk is in memory at a time.

    Args:
      pixels: Images of all steps, uint8 [R, S, S, 3], which may be memory-mapped.
      starts: First step of each episode, and R, int64 [N + 1].
    """
    kept: dict[str, list[np.ndarray]] = {x: [] for x in ("means", "deviation", "roughness")}
    repeated = np.zeros(len(pixels), bool)
    for part in images_lib.in_chunks(len(pixels)):
        x = np.asarray(pixels[part])
        kept["means"].append(np.round(images_lib.shrink(x, 8)).astype(np.uint8))
        kept["deviation"].append(images_lib.deviation(x))
        kept["roughness"].append(images_lib.roughness(x))
        before = np.asarray(pixels[max(part.start - 1, 0) : part.stop - 1])
        same = (x[len(x) - len(before) :] == before).all(axis=(1, 2, 3))
        repeated[part.stop - len(before) : part.stop] = same
    repeated[starts[:-1]] = False
    arrays = {name: np.concatenate(x) for name, x in kept.items()}
    # An image without structure, or else the noisiest one, shows what may be wrong.
    badness = np.where(arrays["deviation"] < images_lib.MIN_DEVIATION, 2, arrays["roughness"])
    worst = [int(a + badness[a:b].argmax()) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return Frames(
        first=np.asarray(pixels[starts[:-1]]),
        last=np.asarray(pixels[starts[1:] - 1]),
        worst=np.asarray(pixels[worst]),
        repeated=repeated,
        **arrays,
    )


def _joined(frames: Sequence[Frames]) -> Frames:
    names = list(Frames.__dataclass_fields__)
    return Frames(**{x: concatenated([getattr(f, x) for f in frames]) for x in names})
