"""The hub's safetensors and our parameters, by name: each tensor has exactly one counterpart."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mmrl_jax.pretrained import safetensors_files
from mmrl_jax.pretrained.safetensors_files import INDEX, LISTED, WEIGHTS

SHARD_BYTES = 5 * 10**9  # Of a file, as the hub has it.


class WeightMismatch(ValueError):
    """Tensors that are missing, unexpected, or of another shape; the message names them."""


def fingerprint(directory: str | pathlib.Path) -> str:
    """Hash of the names, shapes, dtypes and values of all tensors that are read from a directory.

    The config does not count, nor how the tensors are spread over files. A file is hashed once in
    a process unless its size or time of modification changes.

    Raises:
      ValueError: see `safetensors_files.tensor_files`.
    """
    files, whole = (
        safetensors_files.tensor_files(pathlib.Path(directory)),
        hashlib.blake2b(digest_size=16),
    )
    for name, path in sorted(files.items()):
        status = path.stat()
        digests = _tensor_digests(path, status.st_size, status.st_mtime_ns)
        whole.update(digests[name])
    return whole.hexdigest()


@functools.lru_cache(maxsize=256)
def _tensor_digests(path: pathlib.Path, size: int, mtime_ns: int) -> dict[str, bytes]:
    """The digest of each tensor of a file; the last two arguments are the key of the cache."""
    del size, mtime_ns
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data, digests = np.memmap(path, np.uint8, "r", offset=8 + length), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        digest = hashlib.blake2b(f"{name} {entry['dtype']} {entry['shape']} ".encode())
        begin, end = entry["data_offsets"]
        digest.update(data[begin:end].data)
        digests[name] = digest.digest()
    return digests


class Source(NamedTuple):
    """Where a parameter of ours comes from.

    Attributes:
      name: of the hub's tensor.
      part: which of `parts` equal blocks of its rows; fused layers hold several of ours.
      parts: 1 for the whole tensor.
    """

    name: str
    part: int = 0
    parts: int = 1


def counterparts(paths: Iterable[str], keys: Mapping[str, str]) -> dict[str, Source]:
    """Our parameter paths -> where they come from.

    Args:
      paths: ours, e.g. 'stack/block_3/attention/query/kernel'.
      keys: the hub's module names -> our module paths, or its tensor names -> our parameter paths.
        '{i}' stands for a number; '[k/n]' after a name of the hub's is block k of n of its rows.

    Raises:
      ValueError: a path that no key leads to.
    """
    theirs = {ours: name for name, ours in keys.items()}

    def lookup(path: str) -> str | None:
        number = re.search(r"_(\d+)/", path)
        template = path if number is None else path.replace(f"_{number[1]}/", "_{i}/", 1)
        name = theirs.get(template)
        return name if name is None or number is None else name.replace("{i}", number[1])

    found = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        name, suffix = lookup(path), ""
        if name is None:
            name, suffix = lookup(module), ".bias" if leaf == "bias" else ".weight"
        if name is None:
            raise ValueError(f"The key map has no counterpart of our parameter {path!r}.")
        block = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", name)
        if block is None:
            found[path] = Source(name + suffix)
        else:
            found[path] = Source(block[1] + suffix, int(block[2]), int(block[3]))
    return found


def to_ours(path: str, tensor: Any) -> Any:
    """A hub tensor laid out as ours: matrices map rows, convolutions are matrices over patches."""
    if not _transposed(path):
        return tensor
    if tensor.ndim > 2:  # [D, C, h, w] -> [h * w * C, D]; with frames, [D, C, t, h, w]
        return tensor.transpose(*range(2, tensor.ndim), 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T


def to_theirs(path: str, array: Any, shape: tuple[int, ...]) -> Any:
    """Undoes `to_ours` for a hub tensor, or a block of its rows, of this shape."""
    if not _transposed(path):
        return array
    if len(shape) > 2:  # [h * w * C, D] -> [D, C, h, w]; with frames, [D, C, t, h, w]
        x = array.reshape(*shape[2:], shape[1], shape[0])
        return x.transpose(-1, -2, *range(len(shape) - 2))
    return array.T


def load(
    directory: pathlib.Path,
    like: Any,
    keys: Mapping[str, str],
    *,
    ignored: tuple[str, ...] = (),
    shardings: Any = None,
) -> Any:
    """Reads parameters, one tensor at a time, and of it what this process's devices hold.

    Of the rows of a convolution's matrix, which no slice of the hub's tensor is, more is read.

    Args:
      directory: a local one in the hub's format.
      like: pytree of dicts of our parameters' shapes and dtypes.
      keys: see `counterparts`.
      ignored: patterns of the hub's tensors that we have no use for.
      shardings: pytree like `like`, where the arrays go; None: uncommitted, to the default device.

    Returns:
      Parameters like `like`.

    Raises:
      WeightMismatch: names all tensors that are missing, unexpected or of another shape.
      ValueError: see `safetensors_files`.
    """
    flat, where = _by_path(like), safetensors_files.tensor_files(directory)
    places = {} if shardings is None else _by_path(shardings)
    sources = counterparts(flat, keys)
    names = {source.name for source in sources.values()}
    unexpected = [
        name
        for name in where
        if name not in names and not any(re.fullmatch(p, name) for p in ignored)
    ]
    problems = [f"missing: {name}" for name in sorted(names) if name not in where]
    problems += [f"unexpected: {name}" for name in unexpected]
    loaded: dict[str, Any] = {}
    by_file: dict[pathlib.Path, list[str]] = {}
    for path, source in sources.items():
        if source.name in where:
            by_file.setdefault(where[source.name], []).append(path)
    for file_path, paths in by_file.items():
        with safetensors_files.open_file(file_path) as file:
            for path in paths:
                source, want = sources[path], flat[path]
                tensor = safetensors_files.tensor_slice(file, file_path, source.name)
                block = _block(tuple(tensor.get_shape()), source.parts)
                if _our_shape(path, block) != want.shape:
                    problems.append(f"shape of {source.name}: {block}, for our {path} {want.shape}")
                elif not problems:
                    first = source.part * block[0] if block else 0
                    read = _reader(tensor, path, first)
                    name = f"{file_path}: {source.name}"
                    loaded[path] = _placed(read, want, places.get(path), name)
    _raise_if_any(problems, f"{directory} does not hold this model")
    return jax.tree_util.tree_map_with_path(lambda path, _: loaded[_name(path)], like)


def save(
    directory: pathlib.Path,
    params: Any,
    keys: Mapping[str, str],
    *,
    source: pathlib.Path,
    ignored: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes parameters as the hub has them: the inverse of `load`.

    Names, shapes and order are those of `source`. The host holds the tensors of one file at a time,
    and nothing has its name before all of it is written.

    Args:
      directory: absent or empty.
      params: pytree of dicts of our parameters; every process that calls this sees all of them.
      keys: see `counterparts`.
      source: directory in the hub's format that the parameters were once loaded from.
      ignored: patterns of the hub's tensors that we have no use for: copied from `source`.
      dropped: patterns of those that are a parameter of ours once more (tied): not written.
      shard_bytes: the most that a file holds, except that it holds at least one tensor.

    Raises:
      WeightMismatch: names all tensors that only one of the two has, or with another shape.
      ValueError: a kernel is int8, `directory` is not empty, or see `safetensors_files`.
    """
    flat, where = _by_path(params), safetensors_files.tensor_files(source)
    refuse_int8(params)
    parts: dict[str, dict[int, str]] = {}  # Our paths, by the hub's name and the block.
    counts: dict[str, int] = {}
    for path, counterpart in counterparts(flat, keys).items():
        parts.setdefault(counterpart.name, {})[counterpart.part] = path
        counts[counterpart.name] = counterpart.parts
    problems = [f"not in {source}: {name}" for name in parts if name not in where]
    for name in where:
        if name not in parts and not any(re.fullmatch(p, name) for p in (*ignored, *dropped)):
            problems.append(f"not in the parameters: {name}")
    written = [n for n in where if n in parts or not any(re.fullmatch(p, n) for p in dropped)]
    shapes = _hub_shapes(where)
    blocks = {n: _block(shapes[n], counts[n]) for n in written if n in parts}
    for name, block in blocks.items():
        absent = set(range(counts[name])) - parts[name].keys()
        problems += [f"not in the parameters: block {part} of {name}" for part in sorted(absent)]
        problems += [
            f"shape of our {path}: {flat[path].shape}, for {name} {block}"
            for path in parts[name].values()
            if flat[path].shape != _our_shape(path, block)
        ]
    _raise_if_any(problems, f"The parameters are not of the model of {source}")

    def theirs(name: str) -> np.ndarray:
        if name not in parts:
            with safetensors_files.open_file(where[name]) as file:
                return file.get_tensor(name)
        rows = [
            to_theirs(path, np.asarray(flat[path]), blocks[name])
            for _, path in sorted(parts[name].items())
        ]
        # safetensors writes the buffer as it lies, and a transposed view lies the wrong way.
        return np.asarray(rows[0] if len(rows) == 1 else np.concatenate(rows), order="C")

    with whole_directory(directory) as folder:
        _write(folder, ((name, theirs(name)) for name in written), shard_bytes)


def refuse_int8(params: Any) -> None:
    """Raises ValueError, which names them, where there are int8 kernels."""
    rounded = [path for path, x in _by_path(params).items() if x.dtype == jnp.int8]
    if rounded:
        raise ValueError(
            f"{rounded[:LISTED]} are int8, and what they were rounded from is lost: give the "
            "parameters that `lora.quantize` was given, and the adapters beside them."
        )


def refuse_taken(directory: pathlib.Path) -> None:
    """Raises ValueError where there is something in a directory that is to be written."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"{directory} is not an empty directory: give one that is not there yet.")


@contextlib.contextmanager
def whole_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write to, which gets its name when the block ends without an error.

    Raises:
      ValueError: there is something in `directory` already.
    """
    refuse_taken(directory)
    directory = directory.absolute()
    unfinished = directory.with_name(f"{directory.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _hub_shapes(where: Mapping[str, pathlib.Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; of the files only the headers are read."""
    shapes = {}
    for path in set(where.values()):
        with safetensors_files.open_file(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def _write(
    folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Files of at most `shard_bytes`, and their index where there are several."""
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    held, total = 0, 0

    def flush() -> None:
        # transformers wants to know that the layouts are torch's.
        save_file(shard, folder / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, x in tensors:
        if shard and held + x.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = x
        held, total = held + x.nbytes, total + x.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.shard").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.shard").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _placed(
    read: Callable[[tuple[slice, ...]], np.ndarray], want: Any, sharding: Any, name: str
) -> jax.Array:
    """The array of `want`'s shape and dtype, finite, of which `read` gives any part."""

    def checked(index: tuple[slice, ...]) -> np.ndarray:
        part = read(index)
        with np.errstate(over="ignore"):  # Which is an error below, that names the tensor.
            cast = part.astype(want.dtype, copy=False)
        safetensors_files.refuse_nonfinite(cast, part, name)
        return cast

    if sharding is None:
        return jnp.asarray(checked(tuple(slice(0, n) for n in want.shape)))
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Devices that hold the same share one read.
        key = tuple(s.indices(n)[:2] for s, n in zip(index, want.shape, strict=True))
        if key not in parts:
            parts[key] = checked(tuple(slice(*bounds) for bounds in key))
        return parts[key]

    return jax.make_array_from_callback(want.shape, sharding, part)


def _reader(tensor: Any, path: str, first: int) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Maps a slice of our array to that slice of the hub's, from row `first` on, and reads it."""

    def rows(s: slice) -> slice:
        return slice(first + s.start, first + s.stop)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not index:
            return tensor[...]
        if not _transposed(path):
            return tensor[(rows(index[0]), *index[1:])]
        columns = rows(index[-1])
        if len(tensor.get_shape()) > 2:
            return to_ours(path, tensor[columns])[index[0]]
        return to_ours(path, tensor[(columns, *index[:-1])])

    return read


def _transposed(path: str) -> bool:
    return path.rpartition("/")[2] in ("kernel", "head")


def _block(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Of one of the equal blocks of rows of a hub tensor."""
    return (shape[0] // parts, *shape[1:]) if parts > 1 else shape


def _our_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What `to_ours` makes of a shape."""
    if not _transposed(path):
        return shape
    return (math.prod(shape[1:]), shape[0]) if len(shape) > 2 else shape[::-1]


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _raise_if_any(problems: list[str], summary: str) -> None:
    if problems:
        more = len(problems) - LISTED
        raise WeightMismatch(
            f"{summary}:\n  "
            + "\n  ".join(problems[:LISTED])
            + (f"\n  and {more} more" if more > 0 else "")
        )
