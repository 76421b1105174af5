"""Encoders: CLIP and SigLIP, for images and text, and BERT-type sentence encoders (MiniLM)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mmrl_jax.models.towers import TextTower, VisionTower
from mmrl_jax.models.transformer import BlockSpec, Remat
from mmrl_jax.pretrained.families.config_keys import ACTIVATIONS

# The blocks of CLIP and SigLIP have the same names.
_BLOCK = {
    "layer_norm1": "attention_norm",
    "layer_norm2": "mlp_norm",
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.out_proj": "attention/out",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
}
_BERT_BLOCK = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/out",
    "attention.output.LayerNorm": "attention_out_norm",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_out",
    "output.LayerNorm": "mlp_out_norm",
}


def _layers(prefix: str, block: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{{i}}.{name}": f"stack/block_{{i}}/{path}" for name, path in block.items()}


def vision_keys(prefix: str) -> dict[str, str]:
    """Returns the key map of a vision tower of CLIP or SigLIP; see `weights.counterparts`.

    Args:
      prefix: Prefix of the hub's names, '' or 'vision_model.'.
    """
    head = f"{prefix}head"
    pool = {
        f"{head}.probe": "head/probe",
        f"{head}.layernorm": "head/norm",
        f"{head}.mlp.fc1": "head/mlp_in",
        f"{head}.mlp.fc2": "head/mlp_out",
        f"{head}.attention.out_proj": "head/attention/out",
    }
    for k, name in enumerate(("query", "key", "value")):
        for hub_leaf, leaf in (("weight", "kernel"), ("bias", "bias")):
            part = f"{head}.attention.in_proj_{hub_leaf}[{k}/3]"
            pool[part] = f"head/attention/{name}/{leaf}"
    return (
        _layers(f"{prefix}encoder.layers", _BLOCK)
        | pool
        | {
            f"{prefix}embeddings.class_embedding": "class_embedding",
            f"{prefix}embeddings.patch_embedding": "patch_embedding",
            f"{prefix}embeddings.position_embedding.weight": "positions",
            f"{prefix}pre_layrnorm": "pre_norm",
            f"{prefix}post_layernorm": "norm",
            "visual_projection": "projection",
        }
    )


def text_keys(prefix: str, projection: str) -> dict[str, str]:
    """Returns the key map of a text tower of CLIP or SigLIP, see `weights.counterparts`.

    Args:
      prefix: Prefix of the hub's names.
      projection: Name of the hub's module for the projection.
    """
    return _layers(f"{prefix}encoder.layers", _BLOCK) | {
        f"{prefix}embeddings.token_embedding.weight": "table",
        f"{prefix}embeddings.position_embedding.weight": "positions_table",
        f"{prefix}final_layer_norm": "norm",
        projection: "projection",
    }


def bert_keys(prefix: str = "") -> dict[str, str]:
    """Returns the key map of BERT without its pooler; `prefix` is the prefix of the hub's names."""
    return _layers(f"{prefix}encoder.layer", _BERT_BLOCK) | {
        f"{prefix}embeddings.word_embeddings.weight": "table",
        f"{prefix}embeddings.position_embeddings.weight": "positions_table",
        f"{prefix}embeddings.token_type_embeddings.weight": "segments_table",
        f"{prefix}embeddings.LayerNorm": "pre_norm",
    }


def build_vision(
    config: Mapping[str, Any], *, projection: int | None, dtype: jnp.dtype, remat: Remat
) -> VisionTower:
    """Builds the tower of a CLIP or SigLIP vision config.

    Args:
      config: Vision config in the hub's format.
      projection: Width of the pooled features; None for no projection.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
    """
    c, clip = config, config["model_type"].startswith("clip")
    return VisionTower(
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        block=_block(c),
        patch=c["patch_size"],
        patches=(c["image_size"] // c["patch_size"]) ** 2,
        class_token=clip,
        patch_bias=not clip,
        pre_norm=clip,
        pool="class" if clip else "attention" if c.get("vision_use_head", True) else None,
        norm_tokens=not clip,
        projection=projection,
        dtype=dtype,
        remat=remat,
    )


def build_text(
    config: Mapping[str, Any], *, projection: int | None, dtype: jnp.dtype, remat: Remat
) -> TextTower:
    """Builds the tower of a CLIP or SigLIP text config.

    Args:
      config: Text config in the hub's format.
      projection: Width of CLIP's pooled features; None for no projection. SigLIP's config has its
        own.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
    """
    c, clip = config, config["model_type"].startswith("clip")
    return TextTower(
        vocabulary=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        block=_block(c),
        positions=c["max_position_embeddings"],
        pool="end" if clip else "last",
        # As in transformers: old configs have a wrong id of 2, and the highest id ends the text.
        end=c["eos_token_id"] if clip and c["eos_token_id"] != 2 else None,
        causal=clip,
        projection=projection if clip else c["projection_size"],
        projection_bias=not clip,
        dtype=dtype,
        remat=remat,
    )


def build_bert(config: Mapping[str, Any], *, dtype: jnp.dtype, remat: Remat) -> TextTower:
    """Builds a sentence encoder whose pooled output is the mean of BERT's features over words."""
    c = config
    return TextTower(
        vocabulary=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        block=BlockSpec(
            heads=c["num_attention_heads"],
            hidden=c["intermediate_size"],
            norm="layer",
            epsilon=c["layer_norm_eps"],
            placement="post",
            activation=ACTIVATIONS[c["hidden_act"]],
        ),
        positions=c["max_position_embeddings"],
        pool="mean",
        segments=c["type_vocab_size"],
        pre_norm=True,
        final_norm=False,
        dtype=dtype,
        remat=remat,
    )


def _block(config: Mapping[str, Any]) -> BlockSpec:
    return BlockSpec(
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        norm="layer",
        epsilon=config["layer_norm_eps"],
        activation=ACTIVATIONS[config["hidden_act"]],
    )
