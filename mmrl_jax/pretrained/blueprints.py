"""Models of the hub without their parameters: modules and the names of their tensors."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.towers import TextTower, VisionTower
from mmrl_jax.models.transformer import Remat
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained.families import decoders, dinov2, encoders, qwen_vl, vlm

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
VISION = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", *dinov2.FAMILIES)
TEXT = ("bert", "clip", "clip_text_model", "siglip", "siglip_text_model")
TOWERS = ("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision")
WORDS = (jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_))
BUFFERS = (r".*\.inv_freq", r".*\.position_ids")


class Blueprint(NamedTuple):
    """A model without parameters, and the correspondence of its parameters to the hub's tensors.

    Attributes:
      model: Linen module.
      config: Config of the model in the hub's format, completed with defaults.
      keys: Module paths of the model by the hub's module names, see `weights.counterparts`.
      inputs: Shapes and dtypes of the model's inputs.
      ignored: Patterns of the hub's tensors that the model does not use.
      tied: Patterns of the hub's tensors that duplicate another parameter.
    """

    model: nn.Module
    config: Mapping[str, Any]
    keys: Mapping[str, str]
    inputs: tuple
    ignored: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    def shapes(self, dtype: jnp.dtype) -> Any:
        """Returns the shapes of the parameters, with the given dtype."""
        like = jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)["params"]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like)


def make(
    kind: str, config: Mapping[str, Any], names: Collection[str], *, dtype: jnp.dtype, remat: Remat
) -> Blueprint:
    """Builds a model of a kind without its parameters.

    Args:
      kind: Kind of the model, one of `KINDS`.
      config: Complete config of the model, see `hub.read_config`.
      names: Names of the hub's tensors, on which only the keys of the blueprint depend.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.

    Raises:
      ValueError: The family is not supported.
    """
    _, families, build = KINDS[kind]
    check_family(config, families)
    return build(config, names, dtype, remat)


def kind_of(model: nn.Module) -> str:
    """Returns the kind of a model, one of `KINDS`.

    Raises:
      ValueError: The model is of no kind in `KINDS`.
    """
    for kind, (module, _, _) in KINDS.items():
        if isinstance(model, module):
            return kind
    raise ValueError(
        f"{type(model).__name__} is not a model of the hub; supported are {list(KINDS)}."
    )


def check_family(config: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    """Raises ValueError if the model type of a config is not supported."""
    kind = config["model_type"]
    if kind not in kinds:
        raise ValueError(f"model_type={kind!r} is not supported here; supported are {list(kinds)}.")


def _language_model(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Blueprint:
    model = decoders.build(config, dtype=dtype, remat=remat)
    tied = (r"lm_head\.weight",) if model.tied else ()
    return Blueprint(model, config, decoders.keys(config["model_type"]), WORDS, BUFFERS, tied)


def _vision_tower(
    whole: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Blueprint:
    config = whole.get("vision_config", whole)
    kind = whole["model_type"]
    if kind in dinov2.FAMILIES:
        model: VisionTower = dinov2.build(config, dtype=dtype, remat=remat)
        keys = dinov2.keys(_prefix(names, f"{kind}."), gated=model.block.gated)
        # The mask token is for pretraining.
        ignored: tuple[str, ...] = (r"(.*\.)?embeddings\.mask_token", r"classifier\..*")
    else:
        projection = whole["projection_dim"] if kind == "clip" else None
        model = encoders.build_vision(config, projection=projection, dtype=dtype, remat=remat)
        keys = encoders.vision_keys(_prefix(names, "vision_model."))
        ignored = (r"text_.*", r"logit_.*") if "vision_config" in whole else ()
    edge = model.patch * round(model.patches**0.5)
    pixels = jax.ShapeDtypeStruct((1, edge, edge, 3), jnp.float32)
    return Blueprint(model, config, keys, (pixels,), (*BUFFERS, *ignored))


def _text_tower(
    whole: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Blueprint:
    kind, config = whole["model_type"], whole.get("text_config", whole)
    if kind == "bert":
        model = encoders.build_bert(config, dtype=dtype, remat=remat)
        keys = encoders.bert_keys(_prefix(names, "bert."))
        # A sentence encoder does not use the pooler and the heads of pretraining.
        ignored: tuple[str, ...] = (r"(bert\.)?pooler\..*", r"cls\..*")
    else:
        projection = whole["projection_dim"] if kind == "clip" else None
        model = encoders.build_text(config, projection=projection, dtype=dtype, remat=remat)
        prefix = _prefix(names, "text_model.")
        head = "text_projection" if kind == "clip" else f"{prefix}head"
        keys = encoders.text_keys(prefix, head)
        ignored = (r"vision_.*", r"visual_.*", r"logit_.*") if "text_config" in whole else ()
    return Blueprint(model, config, keys, WORDS, (*BUFFERS, *ignored))


def _vision_language_model(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Blueprint:
    kind = config["model_type"]
    if kind in qwen_vl.DECODERS:
        model = qwen_vl.build(config, dtype=dtype, remat=remat)
        keys = qwen_vl.keys(kind, nested=bool(_prefix(names, "model.visual.")))
        tied = (r"lm_head\.weight",) if model.language.tied else ()
        inputs = (*WORDS, *qwen_vl.smallest_inputs(config))
        return Blueprint(model, config, keys, inputs, BUFFERS, tied)
    check_family(config["vision_config"], TOWERS)
    check_family(config["text_config"], DECODERS)
    recipe = vlm.FAMILIES[kind](config, names, dtype, remat)
    tied = (r"(language_model\.)?lm_head\.weight",) if recipe.model.language.tied else ()
    inputs, ignored = (*WORDS, recipe.images), (*BUFFERS, *recipe.ignored)
    return Blueprint(recipe.model, config, recipe.keys, inputs, ignored, tied)


# For each kind: the module, the families, and a function from (config, names of tensors, dtype,
# remat) to a blueprint.
KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...], Callable[..., Blueprint]]] = {
    "language_model": (LanguageModel, DECODERS, _language_model),
    "vision_tower": (VisionTower, VISION, _vision_tower),
    "text_tower": (TextTower, TEXT, _text_tower),
    "vision_language_model": (
        VisionLanguageModel,
        (*vlm.FAMILIES, *qwen_vl.DECODERS),
        _vision_language_model,
    ),
}


def _prefix(names: Collection[str], prefix: str) -> str:
    """Returns the prefix if tensors have it, and '' otherwise, as for a tower saved separately."""
    return prefix if any(name.startswith(prefix) for name in names) else ""
