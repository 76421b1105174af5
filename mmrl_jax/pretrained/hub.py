"""Models from local directories in the hub's format: config.json and safetensors."""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.pretrained import weights
from mmrl_jax.pretrained.families import decoders, encoders, qwen_vl, vlm

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
VISION = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
TEXT = ("bert", "clip", "clip_text_model", "siglip", "siglip_text_model")
TOWERS = ("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision")
WORDS = (jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_))
BUFFERS = (r".*\.inv_freq", r".*\.position_ids")


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: the Linen module.
      params: its variables, for `model.apply`.
      config: the hub's config of the model, complete with defaults.
    """

    model: nn.Module
    params: Any
    config: Mapping[str, Any]


def read_config(directory: str | pathlib.Path) -> dict[str, Any]:
    """The config of a local directory, with transformers' defaults for what it leaves out.

    Raises:
      ValueError: there is none, or it is of no model that transformers knows without running code.
    """
    from transformers import AutoConfig

    path = pathlib.Path(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give a local directory in the hub's format.")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{path}/config.json is of no model that we know: {error}") from error
    return config.to_dict()


def load_language_model(
    directory: str | pathlib.Path, *, dtype: jnp.dtype = jnp.float32, remat: bool = False
) -> Pretrained:
    """Loads a decoder: Llama, Qwen2, Qwen3, Gemma 1 to 3.

    Args:
      directory: local, in the hub's format.
      dtype: of the parameters and of the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family is not supported, or see `weights.load`.
    """
    config = read_config(directory)
    kind = _known(config, DECODERS)
    model = decoders.build(config, dtype=dtype, remat=remat)
    tied = (r"lm_head\.weight",) if model.tied else ()
    params = _load(directory, model, decoders.keys(kind), dtype, WORDS, ignored=tied)
    return Pretrained(model, params, config)


def load_vision_tower(
    directory: str | pathlib.Path, *, dtype: jnp.dtype = jnp.float32, remat: bool = False
) -> Pretrained:
    """Loads the picture half of CLIP or SigLIP, from a directory of both halves or of that alone.

    Args:
      directory: local, in the hub's format.
      dtype: of the parameters and of the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family is not supported, or see `weights.load`.
    """
    whole = read_config(directory)
    kind, config = _known(whole, VISION), whole.get("vision_config", whole)
    both = "vision_config" in whole
    projection = whole["projection_dim"] if kind == "clip" else None
    model = encoders.build_vision(config, projection=projection, dtype=dtype, remat=remat)
    keys = encoders.vision_keys(_prefix(directory, "vision_model."))
    ignored = (r"text_.*", r"logit_.*") if both else ()
    edge = model.patch * round(model.patches**0.5)
    pixels = jax.ShapeDtypeStruct((1, edge, edge, 3), jnp.float32)
    params = _load(directory, model, keys, dtype, (pixels,), ignored=ignored)
    return Pretrained(model, params, config)


def load_text_tower(
    directory: str | pathlib.Path, *, dtype: jnp.dtype = jnp.float32, remat: bool = False
) -> Pretrained:
    """Loads a text encoder: BERT-type ones, or the text half of CLIP or SigLIP.

    Args:
      directory: local, in the hub's format.
      dtype: of the parameters and of the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family is not supported, or see `weights.load`.
    """
    whole = read_config(directory)
    kind, config = _known(whole, TEXT), whole.get("text_config", whole)
    if kind == "bert":
        model = encoders.build_bert(config, dtype=dtype, remat=remat)
        keys = encoders.bert_keys(_prefix(directory, "bert."))
        # The pooler and the heads of pre-training are not part of a sentence encoder.
        ignored: tuple[str, ...] = (r"(bert\.)?pooler\..*", r"cls\..*")
    else:
        projection = whole["projection_dim"] if kind == "clip" else None
        model = encoders.build_text(config, projection=projection, dtype=dtype, remat=remat)
        prefix = _prefix(directory, "text_model.")
        head = "text_projection" if kind == "clip" else f"{prefix}head"
        keys = encoders.text_keys(prefix, head)
        ignored = (r"vision_.*", r"visual_.*", r"logit_.*") if "text_config" in whole else ()
    return Pretrained(model, _load(directory, model, keys, dtype, WORDS, ignored=ignored), config)


def load_vision_language_model(
    directory: str | pathlib.Path, *, dtype: jnp.dtype = jnp.float32, remat: bool = False
) -> Pretrained:
    """Loads a vision-language model.

    Idefics3, SmolVLM, PaliGemma, LLaVA, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL.

    Args:
      directory: local, in the hub's format.
      dtype: of the parameters and of the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family, its tower or its decoder is not supported, or see `weights.load`.
    """
    config = read_config(directory)
    kind = _known(config, (*vlm.FAMILIES, *qwen_vl.DECODERS))
    if kind in qwen_vl.DECODERS:
        return _load_qwen(directory, config, dtype, remat)
    _known(config["vision_config"], TOWERS)
    _known(config["text_config"], DECODERS)
    names = weights.files(pathlib.Path(directory))
    recipe = vlm.FAMILIES[kind](config, names, dtype, remat)
    ignored = recipe.ignored
    if recipe.model.language.tied:
        ignored += (r"(language_model\.)?lm_head\.weight",)
    inputs = (*WORDS, recipe.images)
    params = _load(directory, recipe.model, recipe.keys, dtype, inputs, ignored=ignored)
    return Pretrained(recipe.model, params, config)


def _load_qwen(
    directory: str | pathlib.Path, config: Mapping[str, Any], dtype: jnp.dtype, remat: bool
) -> Pretrained:
    model = qwen_vl.build(config, dtype=dtype, remat=remat)
    nested = bool(_prefix(directory, "model.visual."))
    keys = qwen_vl.keys(config["model_type"], nested=nested)
    tied = (r"lm_head\.weight",) if model.language.tied else ()
    inputs = (*WORDS, *qwen_vl.smallest_inputs(config))
    params = _load(directory, model, keys, dtype, inputs, ignored=tied)
    return Pretrained(model, params, config)


def _known(config: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    kind = config["model_type"]
    if kind not in kinds:
        raise ValueError(f"model_type={kind!r} is not supported here; these are: {list(kinds)}.")
    return kind


def _prefix(directory: str | pathlib.Path, prefix: str) -> str:
    """The prefix where the tensors have it; models saved by themselves have none."""
    names = weights.files(pathlib.Path(directory))
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _load(
    directory: str | pathlib.Path,
    model: nn.Module,
    keys: Mapping[str, str],
    dtype: jnp.dtype,
    inputs: tuple,
    *,
    ignored: tuple[str, ...],
) -> Any:
    like = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like)
    params = weights.load(pathlib.Path(directory), like, keys, ignored=(*BUFFERS, *ignored))
    return {"params": params}
