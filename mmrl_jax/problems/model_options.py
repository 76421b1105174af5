"""Options of the group `model` that models of control and of token policies share."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import ml_collections

from mmrl_jax.config.options import (
    NON_NEGATIVE,
    PATTERN,
    POSITIVE,
    Group,
    group,
    option,
    options_of,
)
from mmrl_jax.config.schema import is_group
from mmrl_jax.models.attention import Implementation
from mmrl_jax.models.transformer import Remat

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of the group `lora` of a model."""

    pattern: str | None = option(
        None,
        "Regular expression that matches the full paths of the layers with low-rank adapters; None "
        "for no adapters.",
        PATTERN,
    )
    rank: int = option(8, "Rank of the adapters.", POSITIVE)
    alpha: float = option(
        16.0, "Scale of the adapters: their output is multiplied by alpha / rank.", POSITIVE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every transformer, of control and of token policies."""

    lora: LoraOptions = group(LoraOptions)
    dtype: Dtype = option(
        "float32", "Data type of the computation; trained parameters are float32."
    )
    remat: bool = option(
        False, "Whether to recompute activations in the backward pass to save memory."
    )
    remat_policy: Literal["nothing", "dots"] = option(
        "nothing",
        "What model.remat=True does not recompute: 'nothing', or 'dots' for the outputs of "
        "products with parameters, which takes less time and more memory.",
    )
    attention: Implementation = option(
        "auto",
        "Implementation of attention: 'auto' for a flash attention kernel on TPU and NVIDIA GPU "
        "where dtype is 'bfloat16' and the kernel supports it, 'xla' for no kernel.",
    )


def remat_of(model: ml_collections.ConfigDict) -> Remat:
    """Returns what a model recomputes in the backward pass, from the group `model` of a config.

    Raises:
      ValueError: If `remat_policy` has no effect.
    """
    if model.remat_policy != "nothing" and not model.remat:
        raise ValueError(
            f"model.remat_policy={model.remat_policy!r} has no effect with model.remat=False; set "
            "model.remat=True, or remove it."
        )
    return "dots" if model.remat and model.remat_policy == "dots" else model.remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchOptions(ModelOptions):
    """Options of every model with the patch encoder of this library."""

    width: int = option(64, "Width of the tokens.", POSITIVE)
    heads: int = option(1, "Number of attention heads, which must divide the width.", POSITIVE)
    mlp_ratio: int = option(2, "Ratio of the hidden width of an MLP to the width.", POSITIVE)
    patch: int = option(
        8,
        "Side of an image patch in pixels, which must divide height and width of the images.",
        POSITIVE,
    )
    patch_margin: int = option(
        0, "Number of pixels around a patch that are also inputs of its token.", NON_NEGATIVE
    )
    patch_hidden: int = option(128, "Hidden width of the MLP that embeds a patch.", POSITIVE)
    vision_layers: int = option(0, "Number of blocks over the patches alone.", NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionEncoderOptions(PatchOptions):
    """Options of every model with an image encoder that may be pretrained."""

    vision_encoder: str | None = option(
        None,
        "Pretrained image encoder: 'dinov2', or a directory of DINOv2, CLIP or SigLIP; None for an "
        "encoder of patches that is trained from scratch.",
    )
    vision_size: int | None = option(
        None,
        "Side in pixels of the squares to which images are resized for DINOv2, a multiple of its "
        "patch; None for the side that its image processor has.",
        POSITIVE,
    )


def options_of_kind(config: Any, models: Mapping[str, type], configs: Mapping[str, str]) -> Group:
    """Returns the keys of the group `model` for the kind of model of a config.

    Args:
      config: Config of the run, which may lack keys.
      models: Dataclass of the options of each kind of model; the first kind is the default.
      configs: Public config of each kind of model, for the message.

    Raises:
      ValueError: If the kind is unknown, or the config has keys of other kinds of models.
    """
    model = config.get("model", {})
    default = next(iter(models))
    kind = model.get("kind", default) if is_group(model) else default
    if kind not in models:
        raise ValueError(
            f"Config key 'model.kind' is {kind!r}, but must be one of "
            f"{', '.join(map(repr, models))}."
        )
    known = options_of(models[kind])
    others = {name: options_of(other) for name, other in models.items() if name != kind}
    unused = [
        key
        for key in (model if is_group(model) else ())
        if key not in known and any(key in other for other in others.values())
    ]
    if unused:
        fitting = [name for name, other in others.items() if set(unused) <= set(other)]
        raise ValueError(
            f"model.kind={kind!r} does not use "
            + ", ".join(f"model.{key}={model[key]!r}" for key in unused)
            + ": remove these keys from the config"
            + (
                f", or start from the config {configs[fitting[0]]!r} of model.kind={fitting[0]!r}"
                if fitting
                else ""
            )
            + f"; the config {configs[kind]!r} has the keys of model.kind={kind!r}."
        )
    return known


def check_patches(model: ml_collections.ConfigDict, height: int, width: int, where: str) -> None:
    """Checks that the patches of our own image encoder fit the images.

    Args:
      model: Group `model` of the config.
      height: Height of the images in pixels.
      width: Width of the images in pixels.
      where: Name of the group of the config that has height and width.

    Raises:
      ValueError: If the patches do not divide the images, or their margins make more than 9 copies
        of each pixel in memory, or there is a size for a pretrained encoder.
    """
    if model.get("vision_size") is not None:
        raise ValueError(
            f"model.vision_size={model.vision_size}, but model.vision_encoder=None has the size of "
            "the images; set it to None, or give a pretrained encoder."
        )
    if height % model.patch or width % model.patch:
        raise ValueError(
            f"{where}.height={height} and {where}.width={width} are not both divisible by "
            f"model.patch={model.patch}."
        )
    if model.patch_margin > model.patch:
        copies = (1 + 2 * model.patch_margin / model.patch) ** 2
        raise ValueError(
            f"model.patch_margin={model.patch_margin} makes {copies:.0f} copies of each pixel in "
            f"memory; it must be at most model.patch={model.patch}, which makes 9."
        )
