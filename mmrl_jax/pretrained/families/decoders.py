"""Decoders: Llama (SmolLM2), Qwen2, Qwen3, Gemma 1 to 3. A family is a config and a key map."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec, Remat
from mmrl_jax.pretrained.families.config_keys import ACTIVATIONS

# The hub's names and module paths. '{i}' is a layer; matrices are transposed, see
# `weights.to_ours`.
BLOCK = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_in",
    "mlp.down_proj": "mlp_out",
    "input_layernorm": "attention_norm",
}
PRE = {"post_attention_layernorm": "mlp_norm"}
BOTH = {
    "post_attention_layernorm": "attention_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}


def keys(model_type: str, prefix: str = "model.", head: str = "lm_head.weight") -> dict[str, str]:
    """Returns the key map of a decoder, see `weights.counterparts`.

    Args:
      model_type: Model type of the hub's config.
      prefix: Prefix of the hub's names.
      head: Name of the hub's tensor of the output layer.
    """
    block = BLOCK | (BOTH if model_type.startswith(("gemma2", "gemma3")) else PRE)
    layers = {
        f"{prefix}layers.{{i}}.{name}": f"stack/block_{{i}}/{path}" for name, path in block.items()
    }
    return layers | {
        f"{prefix}embed_tokens.weight": "table",
        f"{prefix}norm": "stack/norm",
        head: "head",
    }


def build(config: Mapping[str, Any], *, dtype: jnp.dtype, remat: Remat) -> LanguageModel:
    """Builds the model of a hub config that has all defaults, see `hub.read_config`.

    Raises:
      ValueError: The config has an unsupported type of layer or rotary embedding.
    """
    c, kind = config, config["model_type"]
    size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    gemma = kind.startswith("gemma")
    both = kind in ("gemma2", "gemma3_text")
    types = c.get("layer_types") or ()
    supported = ("full_attention", "sliding_attention") if both else ("full_attention",)
    if others := sorted({*types} - {*supported}):
        raise ValueError(f"layer_types of {kind!r} has {others}; supported are {list(supported)}.")
    sliding = types if both else ()
    pattern = tuple(int(name == "sliding_attention") for name in sliding) or None
    ropes = tuple(
        rope(c["rope_parameters"], size, name)
        for name in (("full_attention", "sliding_attention") if sliding else ("",))
    )
    biases = ("query", "key", "value") if kind == "qwen2" else ()
    if c.get("attention_bias"):
        biases = ("query", "key", "value", "out")
    if c.get("mlp_bias"):
        biases += ("mlp",)
    activation = c["hidden_activation" if both else "hidden_act"]
    return LanguageModel(
        vocabulary=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        block=BlockSpec(
            heads=c["num_attention_heads"],
            hidden=c["intermediate_size"],
            kv_heads=c["num_key_value_heads"],
            head_size=size,
            norm="rms_offset" if gemma else "rms",
            epsilon=c["rms_norm_eps"],
            placement="both" if both else "pre",
            activation=ACTIVATIONS[activation],
            gated=True,
            biases=biases,
            qk_norm=kind in ("qwen3", "gemma3_text"),
            scale=c["query_pre_attn_scalar"] ** -0.5 if both else None,
            softcap=c["attn_logit_softcapping"] if kind == "gemma2" else None,
        ),
        ropes=ropes,
        pattern=pattern,
        windows=(None, c["sliding_window"]) if sliding else (None,),
        embedding_scale=c["hidden_size"] ** 0.5 if gemma else 1.0,
        tied=c["tie_word_embeddings"],
        softcap=c.get("final_logit_softcapping"),
        dtype=dtype,
        remat=remat,
    )


def rope(parameters: Mapping[str, Any], size: int, layer_type: str) -> Rope:
    """Builds a rotary embedding from the hub's `rope_parameters`.

    Args:
      parameters: Parameters of all layers, or a mapping from types of layers to parameters.
      size: Head size.
      layer_type: Type of layer whose parameters are used, if there are several.

    Raises:
      ValueError: The scaling is not supported.
    """
    p = parameters.get(layer_type, parameters)
    if p["rope_type"] == "default":
        return Rope(p["rope_theta"], size)
    if p["rope_type"] == "linear":
        return Rope(p["rope_theta"], size, factor=p["factor"])
    if p["rope_type"] == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        low, high, original = (p[name] for name in names)
        return Rope(p["rope_theta"], size, factor=p["factor"], llama3=(low, high, original))
    raise ValueError(
        f"rope_type={p['rope_type']!r} is not supported; supported are 'default', 'linear' and "
        "'llama3'."
    )
