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
# What of a config we follow, and what says nothing about the numbers of a trained adapter.
FOLLOWED = ("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
FOLLOWED += ("use_rslora", "bias", "init_lora_weights")
IDLE = ("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
IDLE += ("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
IDLE += ("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config")
# Other ways to draw an adapter change the base too, so that it fits no other base.
DRAWS = (None, True, False, "gaussian", "orthogonal", "eva")
# The modules of vision-language models, by which PEFT names adapters, are called otherwise than the
# hub's tensors since transformers 4.52; older adapters have the tensors' names.
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
    """Writes adapters such that `peft.PeftModel.from_pretrained` loads them.

    Args:
      directory: made if absent.
      lora: the collection 'lora'.
      keys: of the model's family, see `weights.counterparts`.
      base: name or path of the base model, for the record.
      task_type: PEFT's, e.g. 'CAUSAL_LM' or 'FEATURE_EXTRACTION'.

    Raises:
      ValueError: there is no adapter, the dropouts differ, or a layer is, in the hub's model, a
        part of another one or a convolution.
    """
    ours = adapters(lora)
    dropouts = {adapter.dropout for adapter in ours.values()}
    if len(dropouts) != 1:
        raise ValueError(
            f"The adapters have dropouts {sorted(dropouts)}, but PEFT's format has one for all; "
            "give them the same with `Adapter.replace`."
        )
    names = {path: module for path, (module, _) in _hub_names(ours, keys).items()}
    lost = [path for path in ours if path not in names]
    if lost:
        raise ValueError(
            f"PEFT's format cannot hold adapters of {lost[:LISTED]}: in the hub's model these are "
            "parts of a fused layer, or convolutions."
        )
    r = Counter(adapter.rank for adapter in ours.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in ours.values()).most_common(1)[0][0]
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
        # PEFT reads the names in these two as regular expressions.
        "rank_pattern": {re.escape(names[p]): x.rank for p, x in ours.items() if x.rank != r},
        "alpha_pattern": {
            re.escape(names[p]): x.alpha for p, x in ours.items() if x.alpha != alpha
        },
    }
    tensors = {}
    for path, adapter in ours.items():
        for letter, x in (("A", adapter.a), ("B", adapter.b)):
            # safetensors writes the buffer as it lies, and a transposed view lies the wrong way.
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
    """Reads adapters that PEFT, or `save_adapter`, wrote.

    Adapters of layers that the model never reads, such as the last ones of LLaVA's tower, are left
    out with a message: they change nothing.

    Args:
      directory: of adapter_config.json and adapter_model.safetensors.
      params: the base's parameters, or their shapes.
      keys: of the model's family, see `weights.counterparts`.
      ignored: patterns of the hub's tensors that the model has no use for. Without them, layers
        that are never read are recognized by an adapter that is zero, as PEFT leaves it there.

    Returns:
      The collection 'lora', float32.

    Raises:
      WeightMismatch: names all tensors that fit no layer, lack their other half, or have another
        shape than the base and the config say.
      ValueError: a file is not there or is damaged, a value is NaN or infinite, or the config has
        an option that we do not have.
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
        want = ((rank, inputs), (features, rank))
        if a is None or b is None or (a.shape, b.shape) != want:
            shapes = tuple(x if x is None else x.shape for x in (a, b))
            problems.append(f"shapes of {name}'s lora_A and lora_B: {shapes}, expected {want}")
            continue
        # Rank-stabilized adapters (Kalajdzievski, 2023) are scaled by alpha / sqrt(rank).
        alpha *= rank**0.5 if config.get("use_rslora") else 1
        a, b = (jnp.asarray(x.T, jnp.float32) for x in (a, b))
        flat[f"{path}/adapter"] = Adapter(a, b, alpha, config.get("lora_dropout", 0.0))
    unread = _unread(tensors, keys, ignored)
    problems += [f"unexpected: {name}" for name in tensors if _module(name) not in unread]
    if problems or not flat:
        listed = "\n  ".join(problems[:LISTED] or ["there are no tensors of layers that are read"])
        more = len(problems) - LISTED
        raise WeightMismatch(
            f"{folder} does not fit this model:\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    if unread:
        print(
            f"Left out: {len(unread)} adapters in {folder} of layers that the model never reads: "
            f"{', '.join(sorted(unread)[:LISTED])}",
            file=sys.stderr,
            flush=True,
        )
    return unflatten_dict(flat, sep="/")


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config, whose options are followed, of a folder that has both files."""
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


def _unread(
    tensors: Mapping[str, np.ndarray], keys: Mapping[str, str], ignored: tuple[str, ...]
) -> set[str]:
    """Of adapters without a layer of ours, the modules that the model has and never reads.

    Args:
      tensors: of these adapters alone, by PEFT's names.
      keys: see `load_adapter`.
      ignored: see `load_adapter`.
    """
    rename = _module_names(keys)
    templates, unread = {rename(name): name for name in keys}, set()
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
            unread.add(module)
    return unread


def _module(tensor: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    return re.sub(r"\.lora_[AB]\.weight$", "", tensor.removeprefix(PREFIX))


def _hub_names(paths: Any, keys: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Our layers that are a matrix of the hub's model by themselves -> its module and tensor."""
    sources, rename = counterparts((f"{path}/kernel" for path in paths), keys), _module_names(keys)
    tensors = {
        path.removesuffix("/kernel"): source.name.removesuffix(".weight")
        for path, source in sources.items()
        if source.parts == 1 and not path.endswith("patch_embedding/kernel")
    }
    return {path: (rename(name), name) for path, name in tensors.items()}


def _module_names(keys: Mapping[str, str]) -> Callable[[str], str]:
    """The hub's name of a tensor, or a module's older one, to that of transformers' module."""
    qwen = any(name.startswith(("visual.", "model.visual.")) for name in keys)
    rules = RENAMED + (QWEN_RENAMED if qwen else ())

    def rename(name: str) -> str:
        for pattern, module in rules:
            renamed, found = re.subn(f"^{pattern}", module, name)
            if found:
                return renamed
        return name

    return rename


def _check(config: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Refuses what would change the numbers and is not followed; new options come with PEFT's."""
    problems = {
        name: value for name, value in config.items() if value and name not in FOLLOWED + IDLE
    }
    draw = config.get("init_lora_weights")
    for name, known in (("peft_type", ("LORA",)), ("bias", (None, "none"))):
        if config.get(name) not in known:
            problems[name] = config.get(name)
    if draw not in DRAWS:
        problems["init_lora_weights"] = draw
    if problems:
        raise ValueError(
            f"{folder / CONFIG} has options that are not supported: {problems}. Merge the adapter "
            "into its base with PEFT's merge_and_unload and load the merged model."
        )


def _of_pattern(patterns: Mapping[str, Any] | None, names: tuple[str, ...], otherwise: Any) -> Any:
    """The value of the first pattern that matches a name, or the end of one (PEFT's rule)."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return otherwise
