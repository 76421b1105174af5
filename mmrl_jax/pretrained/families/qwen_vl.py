"""Qwen2.5-VL and Qwen3-VL: a tower for images of any size, with the decoders Qwen2 and Qwen3."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.language import Rope
from mmrl_jax.models.qwen_vision import PatchImages, PatchTower
from mmrl_jax.models.transformer import BlockSpec, Remat
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained.families import decoders
from mmrl_jax.pretrained.families.config_keys import ACTIVATIONS

DECODERS = {"qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
# Defaults of transformers for a config without `mrope_section`.
SECTIONS = {"qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}

_BLOCK = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attn.qkv[0/3]": "attention/query",
    "attn.qkv[1/3]": "attention/key",
    "attn.qkv[2/3]": "attention/value",
    "attn.proj": "attention/out",
}
_MLP = {
    "qwen2_5_vl": {
        "mlp.gate_proj": "mlp_gate",
        "mlp.up_proj": "mlp_in",
        "mlp.down_proj": "mlp_out",
    },
    "qwen3_vl": {"mlp.linear_fc1": "mlp_in", "mlp.linear_fc2": "mlp_out"},
}
_MERGER = {
    "qwen2_5_vl": {"ln_q": "norm", "mlp.0": "mlp_in", "mlp.2": "mlp_out"},
    "qwen3_vl": {"norm": "norm", "linear_fc1": "mlp_in", "linear_fc2": "mlp_out"},
}


def keys(model_type: str, *, nested: bool) -> dict[str, str]:
    """Returns the key map of a model, see `weights.counterparts`.

    Args:
      model_type: Model type of the hub's config, a key of `DECODERS`.
      nested: Whether the names of both parts of the model begin with 'model.'.
    """
    visual, text = ("model.visual.", "model.language_model.") if nested else ("visual.", "model.")
    parts = {
        "blocks.{i}.": ("stack/block_{i}/", _BLOCK | _MLP[model_type]),
        "merger.": ("merger/", _MERGER[model_type]),
        "deepstack_merger_list.{i}.": ("deep_merger_{i}/", _MERGER[model_type]),
        "": ("", {"patch_embed.proj": "patch_embedding", "pos_embed.weight": "positions"}),
    }
    vision = {
        f"{visual}{hub_prefix}{name}": f"vision/{path_prefix}{path}"
        for hub_prefix, (path_prefix, names) in parts.items()
        for name, path in names.items()
    }
    language = decoders.keys(DECODERS[model_type], text)
    return vision | {name: f"language/{path}" for name, path in language.items()}


def build(config: Mapping[str, Any], *, dtype: jnp.dtype, remat: Remat) -> VisionLanguageModel:
    """Builds the model of a hub config that has all defaults, see `hub.read_config`.

    Raises:
      ValueError: The decoder's config has an unsupported type of layer or rotary embedding.
    """
    kind = config["model_type"]
    text = config["text_config"] | {
        "model_type": DECODERS[kind],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    language = decoders.build(text, dtype=dtype, remat=remat)
    rope = dataclasses.replace(
        language.ropes[0],
        sections=tuple(text["rope_parameters"].get("mrope_section", SECTIONS[kind])),
        interleaved=kind == "qwen3_vl",
    )
    vision = build_vision(config["vision_config"], kind, dtype=dtype, remat=remat)
    return VisionLanguageModel(vision, language.clone(ropes=(rope,)), config["image_token_id"])


def build_vision(
    config: Mapping[str, Any], model_type: str, *, dtype: jnp.dtype, remat: Remat
) -> PatchTower:
    """Builds the tower of a vision config."""
    c, is_qwen3 = config, model_type == "qwen3_vl"
    merge = c["spatial_merge_size"]
    return PatchTower(
        width=c["hidden_size"],
        layers=c["depth"],
        block=BlockSpec(
            heads=c["num_heads"],
            hidden=c["intermediate_size"],
            norm="layer" if is_qwen3 else "rms",
            epsilon=1e-6,  # Configs do not have it.
            activation=ACTIVATIONS[c["hidden_act"]],
            gated=not is_qwen3,
        ),
        features=c["out_hidden_size"],
        rope=Rope(c["rope_parameters"]["rope_theta"], c["hidden_size"] // c["num_heads"] // 2),
        merge=merge,
        window=None if is_qwen3 else c["window_size"] // merge // c["patch_size"] * merge,
        full_layers=() if is_qwen3 else tuple(c["fullatt_block_indexes"]),
        side=round(c["num_position_embeddings"] ** 0.5) if is_qwen3 else None,
        deepstack=tuple(c["deepstack_visual_indexes"]) if is_qwen3 else (),
        patch_bias=is_qwen3,
        dtype=dtype,
        remat=remat,
    )


def smallest_inputs(config: Mapping[str, Any]) -> tuple[PatchImages, np.ndarray]:
    """Returns the smallest inputs, all zero: an image of one feature, positions of two tokens."""
    c = config["vision_config"]
    count = c["spatial_merge_size"] ** 2
    pixels = c["temporal_patch_size"] * c["patch_size"] ** 2 * c["in_channels"]
    index = np.zeros((1, count), np.int32)
    patches = np.zeros((1, count, pixels), np.float32)
    return PatchImages(patches, index, index, index), np.zeros((1, 3, 2), np.int32)
