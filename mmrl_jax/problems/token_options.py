"""Options of the group `model` of token policies, and their checks."""

import dataclasses
from typing import Any, Literal

import ml_collections

from mmrl_jax.config.options import POSITIVE, Group, option
from mmrl_jax.pretrained import chat, hub, vision_chat
from mmrl_jax.problems.model_options import (
    ModelOptions,
    PatchOptions,
    VisionEncoderOptions,
    check_patches,
    options_of_kind,
)
from mmrl_jax.training.settings import check_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TokenPatchOptions(PatchOptions):
    heads: int = option(
        4, "Number of attention heads; the width must be divisible by twice this number.", POSITIVE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PretrainedOptions(ModelOptions):
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = option(
        "float32",
        "Data type of the pretrained parameters that no stage trains; with 'int8' it is int8 for "
        "the matrices of layers and bfloat16 for other parameters.",
    )
    scan_layers: bool = option(
        False,
        "Whether the layers of each stack run in a loop, so that a deep model compiles in the time "
        "of a shallow one.",
    )
    gather_for_sampling: bool = option(
        False,
        "Whether devices gather the parameters that mesh.fsdp splits once before they sample "
        "completions; otherwise they gather each matrix for each token, which needs less memory.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchOptions(_TokenPatchOptions):
    """A small vision-language model that is trained from scratch on the words of one task."""

    kind: Literal["scratch"] = option("scratch", "Kind of model.")
    layers: int = option(2, "Number of blocks of the language model.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOptions(_TokenPatchOptions, VisionEncoderOptions, _PretrainedOptions):
    """A pretrained decoder with a projector, after a new or a pretrained vision encoder."""

    kind: Literal["decoder"] = option("decoder", "Kind of model.")
    width: int = option(64, "Width of the vision encoder, before the projector.", POSITIVE)
    checkpoint: str | None = option(
        "smollm2",
        "'smollm2', a directory of a chat model in the Hugging Face format, or hf://owner/name (or "
        "hf://owner/name@revision) to download it; its tokenizer and chat template are used.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMOptions(_PretrainedOptions):
    """A complete pretrained vision-language model."""

    kind: Literal["vlm"] = option("vlm", "Kind of model.")
    checkpoint: str | None = option(
        None,
        "Directory of a vision-language chat model in the Hugging Face format, or hf://owner/name "
        "(or hf://owner/name@revision) to download it; its processor and chat template are used.",
    )
    image_splitting: bool = option(
        False, "Whether the model's processor splits an image into tiles; otherwise it is one tile."
    )


MODELS: dict[str, type] = {"scratch": ScratchOptions, "decoder": DecoderOptions, "vlm": VLMOptions}
# A public config for each kind of model, for error messages.
CONFIGS = {"scratch": "count_grpo", "decoder": "smollm2_vqa_grpo", "vlm": "vlm_grpo"}


def options(config: Any) -> Group:
    """Returns the keys of 'model' that the config's kind of model reads, see `options_of_kind`."""
    return options_of_kind(config, MODELS, CONFIGS)


def check_model(config: ml_collections.ConfigDict, height: int, width: int, where: str) -> None:
    """Checks that the model fits the images.

    Args:
      config: Config of the run.
      height: Height of the images in pixels.
      width: Width of the images in pixels.
      where: Name of the group of the config that has height and width.

    Raises:
      ValueError: If the model is invalid; the message gives the field, its value and the remedy.
    """
    check_settings()
    m = config.model
    if m.kind != "scratch":
        if m.checkpoint is None:
            raise ValueError(
                f"model.checkpoint=None, but model.kind={m.kind!r} is read from a directory in the "
                "Hugging Face format; give the directory."
            )
        if is_vlm(m) != (m.kind == "vlm"):
            other = "decoder" if m.kind == "vlm" else "vlm"
            raise ValueError(
                f"model.checkpoint={m.checkpoint!r} is of model.kind={other!r}, not {m.kind!r}: "
                f"start from the config {CONFIGS[other]!r}, or give another directory."
            )
    if m.kind == "vlm" or m.get("vision_encoder") is not None:
        return
    check_patches(m, height, width, where)
    if m.width % (2 * m.heads) or m.width % 4:
        raise ValueError(
            f"model.width={m.width} is not divisible by 4 and by twice model.heads={m.heads}."
        )


def is_vlm(m: ml_collections.ConfigDict) -> bool:
    """Returns whether the directory of model.checkpoint has a vision-language model.

    Raises:
      ValueError: If the config of the model cannot be read.
    """
    try:
        kind = hub.read_config(chat.directory_of(m.checkpoint))["model_type"]
    except ValueError as error:
        raise ValueError(f"model.checkpoint={m.checkpoint!r}: {error}") from error
    return kind in vision_chat.FAMILIES
