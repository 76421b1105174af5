"""Which safetensors files of a local directory are read, and reading them.

The precedence is that of `from_pretrained` of transformers 5:

| The directory holds                                   | What is read                          |
|-------------------------------------------------------|---------------------------------------|
| model.safetensors                                     | that file, and no other               |
| no model.safetensors, model.safetensors.index.json    | the files that the index names        |
| neither                                               | nothing: an error names what is there |
| a model, and adapter_config.json with adapter_model.* | nothing: transformers adds it         |

With `tie_word_embeddings=True` in the config:

| The files hold                                        | The model                             |
|-------------------------------------------------------|---------------------------------------|
| the embeddings alone                                  | ties its output layer to them         |
| the output layer alone                                | ties its embeddings to it             |
| both, and they are equal                              | is tied                               |
| both, and they differ                                 | is not tied, whatever the config says |

With `tie_word_embeddings=False` both are required. Pickles are never read.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
ADAPTER_CONFIG = "adapter_config.json"
LISTED = 10  # Names that an error lists.
# safetensors' names of the dtypes of parameters. All others are those of quantized checkpoints,
# whose values mean nothing without their scales, or of buffers.
FLOATS = ("F64", "F32", "F16", "BF16")
INCOMPLETE = "It may be an incomplete download or a Git LFS pointer: fetch it again."


def tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Maps the name of every tensor to the file that it is read from.

    Args:
      directory: a local directory in the hub's format.

    Raises:
      ValueError: no file is read, see the table above; an index is damaged, names a file elsewhere
        or one that is absent, or disagrees with its files; or a file is damaged.
    """
    _refuse_adapter(directory)
    if (directory / WEIGHTS).is_file():
        with open_file(directory / WEIGHTS) as file:
            return dict.fromkeys(file.keys(), directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if found:
        raise ValueError(
            f"{directory} has neither {WEIGHTS} nor {INDEX}, so that it is not said which of "
            f"{', '.join(found[:LISTED])} are the model: name the file of the model {WEIGHTS}, or "
            f"fetch the index of its shards."
        )
    pickles = [p.name for pattern in PICKLES for p in sorted(directory.glob(pattern))]
    hint = ""
    if pickles:
        hint = (
            f" It has {', '.join(pickles[:LISTED])}: pickles can run any code and are never "
            f"read; save them with safetensors first."
        )
    raise ValueError(f"{directory} has no *.safetensors file.{hint}")


def open_file(path: pathlib.Path) -> Any:
    """`safe_open` of a file for NumPy.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no readable safetensors file ({error}). {INCOMPLETE}"
        ) from error


def tensor_slice(file: Any, path: pathlib.Path, name: str) -> Any:
    """The lazily read tensor of an open file.

    Raises:
      ValueError: its dtype is not that of a parameter.
    """
    tensor = file.get_slice(name)
    if tensor.get_dtype() not in FLOATS:
        raise ValueError(
            f"{path}: {name} has dtype {tensor.get_dtype()}, which only quantized checkpoints have "
            f"for a parameter: give the model in one of {FLOATS}, e.g. as it was before it was "
            "quantized."
        )
    return tensor


def refuse_nonfinite(x: np.ndarray, read: np.ndarray, name: str) -> None:
    """Makes sure that an array is finite.

    Args:
      x: the array, in the dtype that it is used in.
      read: the same values in the dtype that they were read in.
      name: of the array, with its file.

    Raises:
      ValueError: a value is NaN or infinite, or became so when it was cast.
    """
    finite = np.isfinite(x)
    if finite.all():
        return
    count = finite.size - int(np.count_nonzero(finite))
    if np.isfinite(read).all():
        raise ValueError(
            f"{name}: {count} values are beyond the range of {x.dtype}; load them in bfloat16 or "
            "float32."
        )
    raise ValueError(
        f"{name}: {count} of {finite.size} values are NaN or infinite; give a checkpoint that was "
        "written before the training diverged, or fetch the file again."
    )


def tensors_equal(files: Mapping[str, pathlib.Path], first: str, second: str) -> bool:
    """Whether two tensors have the same shape, dtype and values, NaN being equal to nothing."""
    with open_file(files[first]) as file_1, open_file(files[second]) as file_2:
        a, b = (
            tensor_slice(file_1, files[first], first),
            tensor_slice(file_2, files[second], second),
        )
        same = (a.get_shape(), a.get_dtype()) == (b.get_shape(), b.get_dtype())
        return same and np.array_equal(a[...], b[...])


def _indexed_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of safetensors, an object with the object 'weight_map' "
            f"({type(error).__name__}: {error}). {INCOMPLETE}"
        ) from error
    outside = [x for x in names if not isinstance(x, str) or pathlib.PurePath(x).name != x]
    if outside:
        raise ValueError(
            f"{index} names {outside[:LISTED]}: an index may name files of its own directory only; "
            "move them there, and correct it."
        )
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise ValueError(
            f"{index} names files that are not there: {', '.join(absent[:LISTED])} "
            f"({len(absent)} of {len(names)}). Fetch them too, the download may be incomplete."
        )
    held: dict[str, pathlib.Path] = {}
    for name in names:
        with open_file(directory / name) as file:
            twice = sorted(held.keys() & set(file.keys()))
            if twice:
                raise ValueError(
                    f"{directory}: {twice[:LISTED]} are both in {held[twice[0]].name} and in "
                    f"{name}, one of which may be left over from another model: fetch the "
                    "directory again."
                )
            held |= dict.fromkeys(file.keys(), directory / name)
    lost = sorted(weight_map.keys() - held.keys())
    if lost:
        raise ValueError(
            f"{index} names {lost[:LISTED]}, which none of its files holds: the one or the others "
            "may be left over from another model; fetch the directory again."
        )
    # The order is the index's; what it leaves out and its files hold, transformers reads too.
    return {name: held[name] for name in (*weight_map, *(held.keys() - weight_map.keys()))}


def _refuse_adapter(directory: pathlib.Path) -> None:
    adapters = sorted(path.name for path in directory.glob("adapter_model.*"))
    if adapters and (directory / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{directory} holds {', '.join(adapters)} beside a model, and transformers would add "
            f"the adapter to it: move it with its {ADAPTER_CONFIG} to a directory of its own, and "
            "name that as the adapter, or delete it."
        )
