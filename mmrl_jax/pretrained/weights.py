"""Correspondence of the hub's tensors to parameters: each tensor has exactly one counterpart."""

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

SHARD_BYTES = 5 * 10**9  # Default maximum size of a file in bytes, as on the hub.


class WeightMismatch(ValueError):
    """Tensors are missing, unexpected, or of a different shape; the message lists them."""


def fingerprint(directory: str | pathlib.Path) -> str:
    """Returns a hash of names, shapes, dtypes and values of all tensors of a directory.

    It does not depend on the config, nor on how tensors are distributed over files. A process
    hashes a file once, unless its size or modification time changes.

    Args:
      directory: Local directory in the hub's format.

    Raises:
      ValueError: The files are missing or damaged, see `safetensors_files.tensor_files`.
    """
    files = safetensors_files.tensor_files(pathlib.Path(directory))
    total = hashlib.blake2b(digest_size=16)
    for name, path in sorted(files.items()):
        status = path.stat()
        digests = _tensor_digests(path, status.st_size, status.st_mtime_ns)
        total.update(digests[name])
    return total.hexdigest()


@functools.lru_cache(maxsize=256)
def _tensor_digests(path: pathlib.Path, size: int, mtime_ns: int) -> dict[str, bytes]:
    """Returns the digest of each tensor of a file; size and time are keys of the cache."""
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
    """The tensor of the hub that corresponds to a parameter.

    Attributes:
      name: Name of the hub's tensor.
      part: Index of the block of rows, among `parts` equal blocks, for fused layers.
      parts: Number of blocks of rows; 1 for a tensor that is not fused.
    """

    name: str
    part: int = 0
    parts: int = 1


def counterparts(paths: Iterable[str], keys: Mapping[str, str]) -> dict[str, Source]:
    """Returns the source of each parameter, by the path of the parameter.

    Args:
      paths: Parameter paths, e.g. 'stack/block_3/attention/query/kernel'.
      keys: Key map from the hub's module names to module paths, or from tensor names to parameter
        paths. '{i}' represents a number; '[k/n]' after a hub name is block k of n of its rows.

    Raises:
      ValueError: The key map has no entry for a path.
    """
    hub_names = {path: name for name, path in keys.items()}

    def lookup(path: str) -> str | None:
        number = re.search(r"_(\d+)/", path)
        template = path if number is None else path.replace(f"_{number[1]}/", "_{i}/", 1)
        name = hub_names.get(template)
        return name if name is None or number is None else name.replace("{i}", number[1])

    sources = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        name, suffix = lookup(path), ""
        if name is None:
            name, suffix = lookup(module), ".bias" if leaf == "bias" else ".weight"
        if name is None:
            raise ValueError(f"The key map has no counterpart of the parameter {path!r}.")
        block = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", name)
        if block is None:
            sources[path] = Source(name + suffix)
        else:
            sources[path] = Source(block[1] + suffix, int(block[2]), int(block[3]))
    return sources


def to_ours(path: str, tensor: Any) -> Any:
    """Converts a tensor of the hub to a parameter: transposes matrices, flattens convolutions."""
    if not _transposed(path):
        return tensor
    if tensor.ndim > 2:  # [D, C, h, w] -> [h * w * C, D]; with frames, [D, C, t, h, w]
        return tensor.transpose(*range(2, tensor.ndim), 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T


def to_theirs(path: str, array: Any, shape: tuple[int, ...]) -> Any:
    """Undoes `to_ours` for a tensor of the hub, or a block of its rows, of this shape."""
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
    """Reads parameters, one tensor at a time, and only what this process's devices hold.

    For a sharded convolution, whose rows are not contiguous in the hub's tensor, it reads more.

    Args:
      directory: Local directory in the hub's format.
      like: Pytree of dicts with the shapes and dtypes of the parameters.
      keys: Key map of the model's family, see `counterparts`.
      ignored: Patterns of the hub's tensors that the model does not use.
      shardings: Pytree like `like` with the sharding of each parameter; None for uncommitted arrays
        on the default device.

    Returns:
      Parameters, with the structure, shapes and dtypes of `like`.

    Raises:
      WeightMismatch: Tensors are missing, unexpected or of a different shape; the message lists
        them.
      ValueError: A file is missing or damaged, or a value is not finite, see `safetensors_files`.
    """
    flat, file_of = _by_path(like), safetensors_files.tensor_files(directory)
    sharding_of = {} if shardings is None else _by_path(shardings)
    sources = counterparts(flat, keys)
    names = {source.name for source in sources.values()}
    unexpected = [
        name
        for name in file_of
        if name not in names and not any(re.fullmatch(p, name) for p in ignored)
    ]
    problems = [f"missing: {name}" for name in sorted(names) if name not in file_of]
    problems += [f"unexpected: {name}" for name in unexpected]
    loaded: dict[str, Any] = {}
    by_file: dict[pathlib.Path, list[str]] = {}
    for path, source in sources.items():
        if source.name in file_of:
            by_file.setdefault(file_of[source.name], []).append(path)
    for file_path, paths in by_file.items():
        with safetensors_files.open_file(file_path) as file:
            for path in paths:
                source, spec = sources[path], flat[path]
                tensor = safetensors_files.tensor_slice(file, file_path, source.name)
                block = _block(tuple(tensor.get_shape()), source.parts)
                if _param_shape(path, block) != spec.shape:
                    problems.append(
                        f"shape of {source.name}: {block}, for the parameter {path} {spec.shape}"
                    )
                elif not problems:
                    first = source.part * block[0] if block else 0
                    read = _reader(tensor, path, first)
                    name = f"{file_path}: {source.name}"
                    loaded[path] = _to_array(read, spec, sharding_of.get(path), name)
    _raise_if_any(problems, f"{directory} does not have this model")
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
    """Writes parameters in the hub's format: the inverse of `load`.

    Names, shapes and order are those of `source`. The host holds the tensors of one file at a time,
    and the directory is renamed to its final name after all files are written.

    Args:
      directory: Target directory, absent or empty.
      params: Pytree of dicts of parameters; every process that calls this must hold all of them.
      keys: Key map of the model's family, see `counterparts`.
      source: Directory in the hub's format from which the model was loaded.
      ignored: Patterns of the hub's tensors that the model does not use; they are copied from
        `source`.
      dropped: Patterns of the hub's tensors that duplicate another parameter (tied); they are not
        written.
      shard_bytes: Maximum size of a file in bytes; a file has at least one tensor of any size.

    Raises:
      WeightMismatch: Tensors exist only in the parameters or only in `source`, or the shapes
        differ; the message lists them.
      ValueError: A kernel is int8, `directory` is not empty, or files of `source` are damaged, see
        `safetensors_files`.
    """
    flat, file_of = _by_path(params), safetensors_files.tensor_files(source)
    refuse_int8(params)
    parts: dict[str, dict[int, str]] = {}  # Parameter paths, by the hub's name and the block.
    counts: dict[str, int] = {}
    for path, counterpart in counterparts(flat, keys).items():
        parts.setdefault(counterpart.name, {})[counterpart.part] = path
        counts[counterpart.name] = counterpart.parts
    problems = [f"not in {source}: {name}" for name in parts if name not in file_of]
    for name in file_of:
        if name not in parts and not any(re.fullmatch(p, name) for p in (*ignored, *dropped)):
            problems.append(f"not in the parameters: {name}")
    written = [n for n in file_of if n in parts or not any(re.fullmatch(p, n) for p in dropped)]
    shapes = _hub_shapes(file_of)
    blocks = {n: _block(shapes[n], counts[n]) for n in written if n in parts}
    for name, block in blocks.items():
        missing = set(range(counts[name])) - parts[name].keys()
        problems += [f"not in the parameters: block {part} of {name}" for part in sorted(missing)]
        problems += [
            f"shape of the parameter {path}: {flat[path].shape}, for {name} {block}"
            for path in parts[name].values()
            if flat[path].shape != _param_shape(path, block)
        ]
    _raise_if_any(problems, f"The parameters do not belong to the model of {source}")

    def hub_tensor(name: str) -> np.ndarray:
        if name not in parts:
            with safetensors_files.open_file(file_of[name]) as file:
                return file.get_tensor(name)
        rows = [
            to_theirs(path, np.asarray(flat[path]), blocks[name])
            for _, path in sorted(parts[name].items())
        ]
        # safetensors writes the buffer in memory order, which a transposed view would not match.
        return np.asarray(rows[0] if len(rows) == 1 else np.concatenate(rows), order="C")

    with whole_directory(directory) as folder:
        _write(folder, ((name, hub_tensor(name)) for name in written), shard_bytes)


def refuse_int8(params: Any) -> None:
    """Raises ValueError if kernels are int8; the message lists them."""
    quantized = [path for path, x in _by_path(params).items() if x.dtype == jnp.int8]
    if quantized:
        raise ValueError(
            f"{quantized[:LISTED]} are int8, and their original values are lost: give the "
            "parameters before `lora.quantize`, together with the adapters."
        )


def refuse_taken(directory: pathlib.Path) -> None:
    """Raises ValueError if a directory that is to be written is not empty."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"{directory} is not an empty directory: give one that does not exist.")


@contextlib.contextmanager
def whole_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to write to, which is renamed to its final name at the end of the block.

    If the block raises an error, the directory is removed.

    Raises:
      ValueError: `directory` exists and is not empty.
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


def _hub_shapes(file_of: Mapping[str, pathlib.Path]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor; only the headers of the files are read."""
    shapes = {}
    for path in set(file_of.values()):
        with safetensors_files.open_file(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def _write(
    folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes files of at most `shard_bytes`, with an index if there are several."""
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size, total = 0, 0

    def flush() -> None:
        # transformers requires the metadata that the layouts are those of torch.
        save_file(shard, folder / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, x in tensors:
        if shard and size + x.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = x
        size, total = size + x.nbytes, total + x.nbytes
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


def _to_array(
    read: Callable[[tuple[slice, ...]], np.ndarray], like: Any, sharding: Any, name: str
) -> jax.Array:
    """Returns a finite array with the shape and dtype of `like`, whose slices `read` returns."""

    def checked(index: tuple[slice, ...]) -> np.ndarray:
        part = read(index)
        with np.errstate(over="ignore"):  # `refuse_nonfinite` raises an error with the name.
            cast = part.astype(like.dtype, copy=False)
        safetensors_files.refuse_nonfinite(cast, part, name)
        return cast

    if sharding is None:
        return jnp.asarray(checked(tuple(slice(0, n) for n in like.shape)))
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Devices that hold the same part share one read.
        key = tuple(s.indices(n)[:2] for s, n in zip(index, like.shape, strict=True))
        if key not in parts:
            parts[key] = checked(tuple(slice(*bounds) for bounds in key))
        return parts[key]

    return jax.make_array_from_callback(like.shape, sharding, part)


def _reader(tensor: Any, path: str, first: int) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Returns a function that reads a slice of a parameter from a tensor, from row `first` on."""

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
    """Returns the shape of one of the equal blocks of rows of a tensor of the hub."""
    return (shape[0] // parts, *shape[1:]) if parts > 1 else shape


def _param_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of `to_ours` for a tensor of this shape."""
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
