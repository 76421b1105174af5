"""Selection and reading of the safetensors files of a local directory.

The precedence is that of `from_pretrained` of transformers 5:

| The directory has                                     | What is read                          |
|-------------------------------------------------------|---------------------------------------|
| model.safetensors                                     | that file only                        |
| no model.safetensors, model.safetensors.index.json    | the files in the index                |
| neither                                               | nothing: an error lists the files     |
| a model, and adapter_config.json with adapter_model.* | nothing: transformers would add it    |

With `tie_word_embeddings=True` in the config:

| The files have                                        | The model                             |
|-------------------------------------------------------|---------------------------------------|
| the embeddings only                                   | ties its output layer to them         |
| the output layer only                                 | ties its embeddings to it             |
| both, with equal values                               | is tied                               |
| both, with different values                           | is not tied, contrary to the config   |

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
LISTED = 10  # Maximum number of names in an error message.
# safetensors' names of the dtypes of parameters. All others belong to buffers or to quantized
# checkpoints, whose values are meaningless without their scales.
FLOATS = ("F64", "F32", "F16", "BF16")
INCOMPLETE = "It may be an incomplete download or a Git LFS pointer: download it again."


def tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the file of each tensor, by the tensor's name.

    Args:
      directory: Local directory in the hub's format.

    Raises:
      ValueError: There is no file to read, see the table above; an index is damaged, has a file
        that is absent or in another directory, or contradicts its files; or a file is damaged.
    """
    _refuse_adapter(directory)
    if (directory / WEIGHTS).is_file():
        with open_file(directory / WEIGHTS) as file:
            return dict.fromkeys(file.keys(), directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if files:
        raise ValueError(
            f"{directory} has neither {WEIGHTS} nor {INDEX}, so that the model could be any of "
            f"{', '.join(files[:LISTED])}: rename the file of the model to {WEIGHTS}, or "
            f"download the index of its shards."
        )
    pickles = [p.name for pattern in PICKLES for p in sorted(directory.glob(pattern))]
    hint = ""
    if pickles:
        hint = (
            f" It has {', '.join(pickles[:LISTED])}: pickles can run arbitrary code and are never "
            f"read; save them with safetensors first."
        )
    raise ValueError(f"{directory} has no *.safetensors file.{hint}")


def open_file(path: pathlib.Path) -> Any:
    """Opens a file with `safe_open` for NumPy.

    Raises:
      ValueError: The file cannot be read.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). {INCOMPLETE}"
        ) from error


def tensor_slice(file: Any, path: pathlib.Path, name: str) -> Any:
    """Returns a tensor of an open file that is read lazily.

    Raises:
      ValueError: The dtype is not that of a parameter.
    """
    tensor = file.get_slice(name)
    if tensor.get_dtype() not in FLOATS:
        raise ValueError(
            f"{path}: {name} has dtype {tensor.get_dtype()}, which only quantized checkpoints have "
            f"for a parameter: give the model in one of {FLOATS}, e.g. the original before "
            "quantization."
        )
    return tensor


def refuse_nonfinite(x: np.ndarray, read: np.ndarray, name: str) -> None:
    """Checks that an array is finite.

    Args:
      x: Array in the dtype in which it is used.
      read: The same values in the dtype in which they were read.
      name: Name of the array with its file, for the error message.

    Raises:
      ValueError: A value is NaN or infinite, or became so when it was cast.
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
        f"{name}: {count} of {finite.size} values are NaN or infinite; give a checkpoint from "
        "before the training diverged, or download the file again."
    )


def tensors_equal(files: Mapping[str, pathlib.Path], first: str, second: str) -> bool:
    """Returns whether two tensors have equal shape, dtype and values; NaN equals nothing."""
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
            f"{index} is not an index of safetensors, an object with the object 'weight_map' "
            f"({type(error).__name__}: {error}). {INCOMPLETE}"
        ) from error
    outside = [x for x in names if not isinstance(x, str) or pathlib.PurePath(x).name != x]
    if outside:
        raise ValueError(
            f"{index} has {outside[:LISTED]}: an index may only have files of its own directory; "
            "move them there, and correct it."
        )
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise ValueError(
            f"{index} has files that do not exist: {', '.join(absent[:LISTED])} "
            f"({len(absent)} of {len(names)}). Download them too; the download may be incomplete."
        )
    file_of: dict[str, pathlib.Path] = {}
    for name in names:
        with open_file(directory / name) as file:
            duplicates = sorted(file_of.keys() & set(file.keys()))
            if duplicates:
                raise ValueError(
                    f"{directory}: {duplicates[:LISTED]} are both in {file_of[duplicates[0]].name} "
                    f"and in {name}, one of which may be left over from another model: download "
                    "the directory again."
                )
            file_of |= dict.fromkeys(file.keys(), directory / name)
    missing = sorted(weight_map.keys() - file_of.keys())
    if missing:
        raise ValueError(
            f"{index} has {missing[:LISTED]}, which none of its files has: the index or the files "
            "may be left over from another model; download the directory again."
        )
    # The order is that of the index; transformers also reads tensors of its files that it omits.
    return {name: file_of[name] for name in (*weight_map, *(file_of.keys() - weight_map.keys()))}


def _refuse_adapter(directory: pathlib.Path) -> None:
    adapters = sorted(path.name for path in directory.glob("adapter_model.*"))
    if adapters and (directory / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{directory} has {', '.join(adapters)} in addition to a model, and transformers would "
            f"add the adapter to it: move it with its {ADAPTER_CONFIG} to a separate directory and "
            "give that as the adapter, or delete it."
        )
