"""DINOv2 and DINOv2 with registers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mmrl_jax.models.dinov2 import DinoTower
from mmrl_jax.models.transformer import BlockSpec, Remat
from mmrl_jax.pretrained.families.config_keys import ACTIVATIONS

FAMILIES = ("dinov2", "dinov2_with_registers")
_BLOCK = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attention.attention.query": "attention/query",
    "attention.attention.key": "attention/key",
    "attention.attention.value": "attention/value",
    "attention.output.dense": "attention/out",
    "layer_scale1.lambda1": "attention_scale",
    "layer_scale2.lambda1": "mlp_scale",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
}
# The gate and the other factor are blocks of rows of one tensor.
_GATED = {
    f"mlp.weights_in.{hub_leaf}[{k}/2]": f"{name}/{leaf}"
    for k, name in enumerate(("mlp_gate", "mlp_in"))
    for hub_leaf, leaf in (("weight", "kernel"), ("bias", "bias"))
} | {"mlp.weights_out": "mlp_out"}


def keys(prefix: str, *, gated: bool) -> dict[str, str]:
    """Returns the key map of a tower; see `weights.counterparts`.

    Args:
      prefix: Prefix of the hub's names: '', or the model type for a classifier.
      gated: Whether the MLPs are gated (SwiGLU).
    """
    block = _BLOCK
    if gated:
        block = {name: path for name, path in block.items() if not name.startswith("mlp.")} | _GATED
    layers = {
        f"{prefix}encoder.layer.{{i}}.{name}": f"stack/block_{{i}}/{path}"
        for name, path in block.items()
    }
    return layers | {
        f"{prefix}embeddings.cls_token": "class_embedding",
        f"{prefix}embeddings.register_tokens": "registers",
        f"{prefix}embeddings.position_embeddings": "positions",
        f"{prefix}embeddings.patch_embeddings.projection": "patch_embedding",
        f"{prefix}layernorm": "norm",
    }


def build(config: Mapping[str, Any], *, dtype: jnp.dtype, remat: Remat) -> DinoTower:
    """Builds the tower of a config, whose pooled features are the normalized class token.

    Args:
      config: Config in the hub's format.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
    """
    c, gated = config, config["use_swiglu_ffn"]
    hidden = c["hidden_size"] * c["mlp_ratio"]
    if gated:  # Two thirds of it, rounded up to a multiple of 8.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return DinoTower(
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        block=BlockSpec(
            heads=c["num_attention_heads"],
            hidden=hidden,
            head_size=c.get("head_dim"),
            norm="layer",
            epsilon=c["layer_norm_eps"],
            activation="silu" if gated else ACTIVATIONS[c["hidden_act"]],
            gated=gated,
            biases=("query", "key", "value", "out", "mlp") if c["qkv_bias"] else ("out", "mlp"),
            layer_scale=True,
        ),
        patch=c["patch_size"],
        patches=(c["image_size"] // c["patch_size"]) ** 2,
        registers=c.get("num_register_tokens", 0),
        antialias=c["model_type"] == "dinov2_with_registers",
        pool="class",
        dtype=dtype,
        remat=remat,
    )
