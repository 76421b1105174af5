"""Low-rank adapters in the format of Hugging Face PEFT: adapter_config.json and safetensors."""

from collections import Counter
from collections.abc import Callable, Mapping
import json
import pathlib
import re
import sys
from typing import Any

from flax.traverse_util import unflatten_dict
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mmrl_jax.models.lora import Adapter, adapters, dense_kernels
from mmrl_jax.pretrained import safetensors_files
from mmrl_jax.pretrained.safetensors_files import INCOMPLETE, LISTED
from mmrl_jax.pretrained.weights import WeightMismatch, counterparts

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Config keys that the loader supports, and keys that do not affect a trained adapter.
FOLLOWED = ("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
FOLLOWED += ("use_rslora", "bias", "init_lora_weights")
IDLE = ("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
IDLE += ("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
IDLE += ("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config")
# Other initializations also change the base, so that the adapter would not fit the original base.
DRAWS = (None, True, False, "gaussian", "orthogonal", "eva")
# PEFT names adapters after the modules of vision-language models, whose names differ from those of
# the hub's tensors since transformers 4.52; older adapters have the names of the tensors.
RENAMED = (
    (r"language_model\.lm_head", "lm_head"),
    (r"language_model\.model\.", "model.language_model."),
    (r"vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"(visual|multi_modal_projector)\.", r"model.\1."),
)
QWEN_RENAMED = ((r"model\.(?!language_model\.|visual\.)", "model.language_model."),)


def save_adapter(
    directory: str | pathlib.Path,
    lora: Any,
    keys: Mapping[str, str],
    *,
    base: str,
    task_type: str,
) -> None:
    """Writes adapters that `peft.PeftModel.from_pretrained` can load.

    Args:
      directory: Target directory, created if absent.
      lora: Adapters, the collection 'lora'.
      keys: Key map of the model's family, see `weights.counterparts`.
      base: Name or path of the base model, which is recorded in the config.
      task_type: Task type of PEFT, e.g. 'CAUSAL_LM' or 'FEATURE_EXTRACTION'.

    Raises:
      ValueError: There is no adapter, the dropout rates differ, or a layer corresponds to a part of
        a fused layer or to a convolution in the hub's model.
    """
    by_path = adapters(lora)
    dropouts = {adapter.dropout for adapter in by_path.values()}
    if len(dropouts) != 1:
        raise ValueError(
            f"The adapters have dropouts {sorted(dropouts)}, but PEFT's format has one for all; "
            "make them equal with `Adapter.replace`."
        )
    names = {path: module for path, (module, _) in _hub_names(by_path, keys).items()}
    unnamed = [path for path in by_path if path not in names]
    if unnamed:
        raise ValueError(
            f"PEFT's format cannot hold adapters of {unnamed[:LISTED]}: in the hub's model these "
            "are parts of a fused layer, or convolutions."
        )
    r = Counter(adapter.rank for adapter in by_path.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in by_path.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "target_modules": sorted(names.values()),
        # PEFT interprets the names in these two as regular expressions.
        "rank_pattern": {re.escape(names[p]): x.rank for p, x in by_path.items() if x.rank != r},
        "alpha_pattern": {
            re.escape(names[p]): x.alpha for p, x in by_path.items() if x.alpha != alpha
        },
    }
    tensors = {}
    for path, adapter in by_path.items():
        for letter, x in (("A", adapter.a), ("B", adapter.b)):
            # safetensors writes the buffer in memory order, which a transposed view would not
            # match.
            tensor = np.ascontiguousarray(np.asarray(x, np.float32).T)
            tensors[f"{PREFIX}{names[path]}.lora_{letter}.weight"] = tensor
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def load_adapter(
    directory: str | pathlib.Path,
    params: Any,
    keys: Mapping[str, str],
    *,
    ignored: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Reads adapters that PEFT or `save_adapter` wrote.

    Adapters of layers that the model does not use, such as the last layers of LLaVA's tower, have
    no effect; they are skipped with a message.

    Args:
      directory: Directory with adapter_config.json and adapter_model.safetensors.
      params: Parameters of the base, or their shapes.
      keys: Key map of the model's family, see `weights.counterparts`.
      ignored: Patterns of the hub's tensors that the model does not use. Without them, unused
        layers are recognized by an adapter that is zero, its initial value in PEFT.

    Returns:
      The collection 'lora', float32.

    Raises:
      WeightMismatch: Tensors fit no layer, lack their counterpart A or B, or have a shape that
        contradicts the base and the config; the message lists them.
      ValueError: A file is missing or damaged, a value is NaN or infinite, or the config has an
        unsupported option.
    """
    folder = pathlib.Path(directory)
    config = _read_config(folder)
    rename = _module_names(keys)
    tensors = {
        PREFIX + rename(name.removeprefix(PREFIX)): x
        for name, x in _read_tensors(folder / TENSORS).items()
    }
    kernels, flat, problems = dense_kernels(params), {}, []
    for path, (name, tensor) in _hub_names(kernels, keys).items():
        a, b = (tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight", None) for letter in "AB")
        if a is None and b is None:
            continue
        rank = _of_pattern(config.get("rank_pattern"), (name, tensor), config["r"])
        alpha = _of_pattern(config.get("alpha_pattern"), (name, tensor), config["lora_alpha"])
        inputs, features = kernels[path].shape
        expected = ((rank, inputs), (features, rank))
        if a is None or b is None or (a.shape, b.shape) != expected:
            shapes = tuple(x if x is None else x.shape for x in (a, b))
            problems.append(f"shapes of {name}'s lora_A and lora_B: {shapes}, expected {expected}")
            continue
        # Rank-stabilized adapters (Kalajdzievski, 2023) are scaled by alpha / sqrt(rank).
        alpha *= rank**0.5 if config.get("use_rslora") else 1
        a, b = (jnp.asarray(x.T, jnp.float32) for x in (a, b))
        flat[f"{path}/adapter"] = Adapter(a, b, alpha, config.get("lora_dropout", 0.0))
    unused = _unused(tensors, keys, ignored)
    problems += [f"unexpected: {name}" for name in tensors if _module(name) not in unused]
    if problems or not flat:
        listed = "\n  ".join(problems[:LISTED] or ["it has no tensors of layers that are used"])
        more = len(problems) - LISTED
        raise WeightMismatch(
            f"{folder} does not fit this model:\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    if unused:
        print(
            f"Skipped {len(unused)} adapters in {folder} of layers that the model does not use: "
            f"{', '.join(sorted(unused)[:LISTED])}",
            file=sys.stderr,
            flush=True,
        )
    return unflatten_dict(flat, sep="/")


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads and checks the config of a folder, which must have both files."""
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder} has no {file}. An adapter_model.bin is a pickle, which can run any "
                "code, and is never read: save it with safetensors first."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(isinstance(x, int) and x > 0 for x in ranks):
            raise ValueError(f"ranks must be positive integers, not {ranks}")
        if not all(isinstance(x, int | float) for x in alphas):
            raise ValueError(f"alphas must be numbers, not {alphas}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is no config of an adapter ({type(error).__name__}: {error}). "
            f"{INCOMPLETE}"
        ) from error
    _check(config, folder)
    return config


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = {}
    with safetensors_files.open_file(path) as file:
        for name in file.keys():
            x = safetensors_files.tensor_slice(file, path, name)[...]
            safetensors_files.refuse_nonfinite(x, x, f"{path}: {name}")
            tensors[name] = x
    return tensors


def _unused(
    tensors: Mapping[str, np.ndarray], keys: Mapping[str, str], ignored: tuple[str, ...]
) -> set[str]:
    """Returns the modules of adapters without a layer that exist in the hub's model but are unused.

    Args:
      tensors: Tensors of these adapters by PEFT's names.
      keys: Key map of the model's family, see `weights.counterparts`.
      ignored: Patterns of the hub's tensors that the model does not use.
    """
    rename = _module_names(keys)
    templates, unused = {rename(name): name for name in keys}, set()
    for name, x in tensors.items():
        module = _module(name)
        number = re.search(r"\.(\d+)\.", module)
        if number is None or not name.endswith(".lora_B.weight"):
            continue
        template = templates.get(module.replace(number[0], ".{i}.", 1))
        if template is None:
            continue
        tensor = template.replace("{i}", number[1]) + ".weight"
        if any(re.fullmatch(pattern, tensor) for pattern in ignored) or not np.any(x):
            unused.add(module)
    return unused


def _module(tensor: str) -> str:
    """Returns the module of a tensor of an adapter."""
    return re.sub(r"\.lora_[AB]\.weight$", "", tensor.removeprefix(PREFIX))


def _hub_names(paths: Any, keys: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns the hub's module and tensor names of layers, by path, that are complete matrices."""
    sources, rename = counterparts((f"{path}/kernel" for path in paths), keys), _module_names(keys)
    tensors = {
        path.removesuffix("/kernel"): source.name.removesuffix(".weight")
        for path, source in sources.items()
        if source.parts == 1 and not path.endswith("patch_embedding/kernel")
    }
    return {path: (rename(name), name) for path, name in tensors.items()}


def _module_names(keys: Mapping[str, str]) -> Callable[[str], str]:
    """Returns a function from the hub's tensor names, or old module names, to module names."""
    qwen = any(name.startswith(("visual.", "model.visual.")) for name in keys)
    rules = RENAMED + (QWEN_RENAMED if qwen else ())

    def rename(name: str) -> str:
        for pattern, module in rules:
            renamed, count = re.subn(f"^{pattern}", module, name)
            if count:
                return renamed
        return name

    return rename


def _check(config: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Raises ValueError for unsupported options that would change the numbers.

    Unknown keys with a value count as such options, since new versions of PEFT add options.
    """
    problems = {
        name: value for name, value in config.items() if value and name not in FOLLOWED + IDLE
    }
    initialization = config.get("init_lora_weights")
    for name, known in (("peft_type", ("LORA",)), ("bias", (None, "none"))):
        if config.get(name) not in known:
            problems[name] = config.get(name)
    if initialization not in DRAWS:
        problems["init_lora_weights"] = initialization
    if problems:
        raise ValueError(
            f"{folder / CONFIG} has options that are not supported: {problems}. Merge the adapter "
            "into its base with PEFT's merge_and_unload and load the merged model."
        )


def _of_pattern(patterns: Mapping[str, Any] | None, names: tuple[str, ...], otherwise: Any) -> Any:
    """Returns the value of the first pattern that matches a name or its end, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return otherwise
