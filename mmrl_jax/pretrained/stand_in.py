"""Stand-ins for files that a directory of the hub lacks, to plan runs from a config.json alone.

A directory with stand-ins has the shapes of the model, and makes nothing that is learned from: it
has no weights; its tokenizer has a token for each byte; its chat template is a plain one; and its
image processor has the sizes of config.json, and transformers' defaults otherwise.
"""

from collections.abc import Callable, Mapping
import json
import pathlib
import shutil
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mmrl_jax.pretrained import hub, safetensors_files

QWEN_IMAGE, IMAGE = "<|image_pad|>", "<image>"
_END, _START = "</s>", "<s>"
# Text around images of Idefics3 and SmolVLM.
_SPLIT_MARKS = (
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def complete(source: str | pathlib.Path, target: str | pathlib.Path) -> pathlib.Path:
    """Makes a directory of a model that has stand-ins for what is missing.

    Args:
      source: A config.json in the hub's format, under any name, or a directory that has one.
      target: Directory to create. The existing files of a source directory are linked.

    Returns:
      The target.

    Raises:
      ValueError: The config is missing or is of an unsupported model, see `hub.read_config`.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise ValueError(f"{source} is neither a config.json nor a directory that has one.")
    target.mkdir(parents=True)
    if source.is_dir():
        for path in source.iterdir():
            (target / path.name).symlink_to(path.resolve())
    else:
        shutil.copyfile(file, target / "config.json")
    config = hub.read_config(target)
    names = {path.name for path in target.iterdir()}
    if not any(name.endswith(".safetensors") or name == safetensors_files.INDEX for name in names):
        save_file({"stand_in": np.zeros(1, np.float32)}, target / safetensors_files.WEIGHTS)
    if (
        "vision_config" in config
        and not {"preprocessor_config.json", "processor_config.json"} & names
    ):
        image, prompts = _PROCESSORS[config["model_type"]](config)
        _write(target / "preprocessor_config.json", image)
        _write(target / "processor_config.json", prompts)
    if not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & names:
        _tokenizer(config).save_pretrained(target)
    return target


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _tokenizer(config: Mapping[str, Any]) -> Any:
    """Returns a tokenizer with a token for each byte, and the image token of the config."""
    import tokenizers
    import transformers

    is_qwen = str(config["model_type"]).startswith("qwen") and "vision_config" in config
    mark = QWEN_IMAGE if is_qwen else IMAGE
    token = config.get("image_token_id", config.get("image_token_index"))
    special = [_START, _END, *([] if token is None else [mark])]
    if config["model_type"] in ("idefics3", "smolvlm"):
        special += _SPLIT_MARKS
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    free = (i for i in range(len(letters) + len(special) + 1) if i != token)
    vocabulary = {
        text: token if text == mark and token is not None else next(free)
        for text in (*special, *letters)
    }
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=_START, eos_token=_END, pad_token=_END
    )
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", mark)
    return tokenizer


Processor = tuple[dict[str, Any], dict[str, Any]]  # Configs of an image processor and of prompts.


def _square(edge: int) -> dict[str, int]:
    return {"height": edge, "width": edge}


def _edge(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the edge of the images of a tower in pixels, and their number of patches."""
    vision = config["vision_config"]
    return vision["image_size"], (vision["image_size"] // vision["patch_size"]) ** 2


def _idefics3(config: Mapping[str, Any]) -> Processor:
    edge, patches = _edge(config)
    sizes = {"max_image_size": {"longest_edge": edge}, "size": {"longest_edge": 4 * edge}}
    return sizes, {"image_seq_len": patches // config["scale_factor"] ** 2}


def _paligemma(config: Mapping[str, Any]) -> Processor:
    edge, patches = _edge(config)
    return {"size": _square(edge), "image_seq_length": patches}, {}


def _llava(config: Mapping[str, Any]) -> Processor:
    edge, _ = _edge(config)
    return {"size": {"shortest_edge": edge}, "crop_size": _square(edge)}, {
        "patch_size": config["vision_config"]["patch_size"],
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }


def _llava_onevision(config: Mapping[str, Any]) -> Processor:
    edge, patches = _edge(config)
    image = {"size": _square(edge), "image_grid_pinpoints": config["image_grid_pinpoints"]}
    return image, {
        "num_image_tokens": patches,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "vision_aspect_ratio": config["vision_aspect_ratio"],
    }


def _qwen(config: Mapping[str, Any]) -> Processor:
    vision = config["vision_config"]
    return {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }, {}


_PROCESSORS: dict[str, Callable[[Mapping[str, Any]], Processor]] = {
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "paligemma": _paligemma,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
}
