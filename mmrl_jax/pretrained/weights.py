"""The hub's safetensors and our parameters, by name: each tensor has exactly one counterpart."""

from collections.abc import Callable, Iterable, Mapping
import functools
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
LISTED = 10  # Names that an error lists.


class WeightMismatch(ValueError):
    """Tensors that are missing, unexpected, or of another shape; the message names them."""


def files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> the safetensors file that holds it.

    Raises:
      ValueError: there is no safetensors file; pickles are never read.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {name: directory / file for name, file in weight_map.items()}
        absent = sorted({str(path) for path in found.values() if not path.is_file()})
        if absent:
            raise ValueError(f"{index} names files that are not there: {', '.join(absent)}.")
        return found
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        others = [p.name for pattern in PICKLES for p in sorted(directory.glob(pattern))]
        hint = ""
        if others:
            hint = (
                f" It has {', '.join(others[:LISTED])}: pickles can run any code and are never "
                f"read; save them with safetensors first."
            )
        raise ValueError(f"{directory} has no *.safetensors file.{hint}")
    return found


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
    leaf = path.rpartition("/")[2]
    if leaf not in ("kernel", "head"):
        return tensor
    if tensor.ndim > 2:  # [D, C, h, w] -> [h * w * C, D]; with frames, [D, C, t, h, w]
        return tensor.transpose(*range(2, tensor.ndim), 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T


def load(
    directory: pathlib.Path,
    like: Any,
    keys: Mapping[str, str],
    *,
    ignored: tuple[str, ...] = (),
    place: Callable[[str, Any], jax.Array] = lambda path, x: jnp.asarray(x),
) -> Any:
    """Reads parameters, one tensor at a time.

    Args:
      directory: a local one in the hub's format.
      like: pytree of dicts of our parameters' shapes and dtypes.
      keys: see `counterparts`.
      ignored: patterns of the hub's tensors that we have no use for.
      place: (our path, tensor) -> array on its devices.

    Returns:
      Parameters like `like`.

    Raises:
      WeightMismatch: names all tensors that are missing, unexpected or of another shape.
      ValueError: see `files`.
    """
    flat = {
        "/".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(like)
    }
    sources, where = counterparts(flat, keys), files(directory)
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
        with safe_open(file_path, framework="flax") as file:
            for path in paths:
                source, want = sources[path], flat[path]
                rows = file.get_slice(source.name)
                shape = tuple(rows.get_shape())
                if source.parts > 1:
                    shape = (shape[0] // source.parts, *shape[1:])
                if (
                    jax.eval_shape(
                        functools.partial(to_ours, path), jax.ShapeDtypeStruct(shape, want.dtype)
                    ).shape
                    != want.shape
                ):
                    problems.append(f"shape of {source.name}: {shape}, for our {path} {want.shape}")
                elif not problems:
                    first = source.part * shape[0] if shape else 0
                    x = rows[first : first + shape[0]] if shape else file.get_tensor(source.name)
                    loaded[path] = place(path, to_ours(path, np.asarray(x)).astype(want.dtype))
    if problems:
        more = len(problems) - LISTED
        listed = "\n  ".join(problems[:LISTED])
        raise WeightMismatch(
            f"{directory} does not hold this model:\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: loaded["/".join(k.key for k in path)], like
    )
