"""Classification of the keys of the hub's configs: supported, without effect, or default only.

Each key of transformers' config class is in one of three states:

  followed: The model is built from it, and families read no other keys.
  idle: transformers computes the same logits for any value. This includes dropout, which is off in
    evaluation and not used for fine-tuning here.
  neither: The key must have its default, since transformers' model does something else otherwise.

Keys that the class does not have, from older versions or other tools, are omitted, since
transformers does not read them. `EXTRA` has the few exceptions that its models read.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from mmrl_jax.models.transformer import Activation

# Names of activations in transformers and in `models.transformer.ACTIVATIONS`.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}


class Keys(NamedTuple):
    """The supported keys of a `model_type`.

    Attributes:
      followed: Keys from which the model is built.
      idle: Keys that have no effect.
    """

    followed: tuple[str, ...]
    idle: tuple[str, ...] = ()


# Keys that every class has.
RECORDS = ("architectures", "dtype", "model_type", "transformers_version", "id2label", "label2id")
RECORDS += ("output_hidden_states", "output_attentions", "return_dict", "problem_type")
# This key splits a computation into chunks with the same result.
RECORDS += ("chunk_size_feed_forward",)
# Keys of initialization, sampling, and training.
IDLE = ("initializer_range", "initializer_factor", "use_cache", "attention_dropout")
IDLE += ("pad_token_id", "bos_token_id", "eos_token_id")
# Keys that transformers' models read although their class does not have them.
EXTRA = ("head_dim",)
KEPT = (*EXTRA, "model_type", "transformers_version", "_name_or_path", "dtype")
# Keys that no class has, but that change how any model is loaded.
NEVER = ("quantization_config", "transformers_weights")

_DECODER = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_DECODER += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
_DECODER += ("tie_word_embeddings", "rope_parameters")
_GEMMA2 = (*_DECODER, "hidden_activation", "attention_bias", "query_pre_attn_scalar")
_GEMMA2 += ("sliding_window", "layer_types", "final_logit_softcapping")
# The last two have no effect without sliding windows, which are rejected.
_QWEN_IDLE = ("max_position_embeddings", "sliding_window", "max_window_layers")
_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_VISION += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
_DINO = ("hidden_size", "mlp_ratio", "num_hidden_layers", "num_attention_heads", "image_size")
_DINO += ("patch_size", "hidden_act", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn")
# The last four are of backbones and of pretraining.
_DINO_IDLE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
_DINO_IDLE += ("layerscale_value", "_out_features", "_out_indices", "apply_layernorm")
_DINO_IDLE += ("reshape_hidden_states",)
_TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_TEXT += ("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps")
_HALVES = ("text_config", "vision_config")
_IDEFICS3 = Keys((*_HALVES, "image_token_id", "tie_word_embeddings", "scale_factor"))
_LLAVA = (*_HALVES, "image_token_index", "tie_word_embeddings", "projector_hidden_act")
_LLAVA += ("vision_feature_select_strategy", "vision_feature_layer", "multimodal_projector_bias")
_QWEN_VL = Keys(
    (*_HALVES, "image_token_id", "tie_word_embeddings"),
    # Videos are not supported, and the processor writes the tokens around an image.
    ("video_token_id", "vision_start_token_id", "vision_end_token_id"),
)
_QWEN_VISION = ("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads")
_QWEN_VISION += ("in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size")
_QWEN_VISION += ("out_hidden_size", "rope_parameters")

KEYS: dict[str, Keys] = {
    "llama": Keys(
        (*_DECODER, "hidden_act", "attention_bias", "mlp_bias"),
        ("max_position_embeddings", "pretraining_tp"),
    ),
    "qwen2": Keys((*_DECODER, "hidden_act", "layer_types"), _QWEN_IDLE),
    "qwen3": Keys((*_DECODER, "hidden_act", "layer_types", "attention_bias"), _QWEN_IDLE),
    "gemma": Keys((*_DECODER, "hidden_act", "attention_bias"), ("max_position_embeddings",)),
    "gemma2": Keys((*_GEMMA2, "attn_logit_softcapping"), ("max_position_embeddings",)),
    "gemma3_text": Keys(
        _GEMMA2,
        # transformers' Gemma 3 stores the soft cap of attention logits without applying it.
        ("max_position_embeddings", "attn_logit_softcapping", "_sliding_window_pattern"),
    ),
    "clip": Keys((*_HALVES, "projection_dim"), ("logit_scale_init_value",)),
    "clip_text_model": Keys((*_TEXT, "eos_token_id"), ("projection_dim",)),
    "clip_vision_model": Keys(_VISION, ("projection_dim",)),
    "siglip": Keys(_HALVES),
    "siglip_text_model": Keys((*_TEXT, "projection_size")),
    "siglip_vision_model": Keys((*_VISION, "vision_use_head")),
    "dinov2": Keys(_DINO, (*_DINO_IDLE, "use_mask_token")),
    "dinov2_with_registers": Keys((*_DINO, "num_register_tokens"), _DINO_IDLE),
    "idefics3_vision": Keys(_VISION),
    "smolvlm_vision": Keys(_VISION),
    "bert": Keys(
        (*_TEXT, "type_vocab_size"),
        # Heads of pretraining and of classifiers are not read.
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        + ("tie_word_embeddings",),
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    # The parts of the model have these sizes too.
    "paligemma": Keys(
        (*_HALVES, "image_token_index", "tie_word_embeddings"),
        ("vocab_size", "projection_dim", "hidden_size"),
    ),
    "llava": Keys(_LLAVA, ("image_seq_length",)),
    "llava_onevision": Keys(
        (*_LLAVA, "vision_aspect_ratio"),
        # The processor has its own copies of these keys.
        ("video_token_index", "image_grid_pinpoints"),
    ),
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "qwen2_5_vl_text": Keys((*_DECODER, "hidden_act", "layer_types"), _QWEN_IDLE),
    "qwen3_vl_text": Keys(
        (*_DECODER, "hidden_act", "attention_bias"), ("max_position_embeddings",)
    ),
    "qwen2_5_vl_vision": Keys(
        (*_QWEN_VISION, "window_size", "fullatt_block_indexes"),
        ("tokens_per_second",),  # This key is for videos.
    ),
    "qwen3_vl_vision": Keys((*_QWEN_VISION, "num_position_embeddings", "deepstack_visual_indexes")),
}
# PaliGemma's prompts have bidirectional attention, which this key of its decoder's config selects.
REQUIRED = {("paligemma", "text_config"): {"use_bidirectional_attention": True}}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
SIZES += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "image_size")
SIZES += ("patch_size", "num_heads", "depth", "in_channels", "spatial_merge_size", "scale_factor")
SIZES += ("temporal_patch_size", "out_hidden_size", "type_vocab_size", "query_pre_attn_scalar")
SIZES += ("window_size", "num_position_embeddings", "mlp_ratio", "num_register_tokens")


def followed(config: Any) -> dict[str, Any]:
    """Returns a config as a dict, without the keys that transformers' models do not read.

    Args:
      config: Config object of transformers. One without an entry in `KEYS` is not checked.

    Raises:
      ValueError: A key is neither followed nor idle and does not have its default, or a value is
        invalid; the message lists the keys.
    """
    problems: list[str] = []
    values = _followed(config, "", {}, problems)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"it requires features that are not supported here:\n  {listed}")
    return values


def _followed(
    config: Any, prefix: str, required: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    kind, values = config.model_type, config.to_dict()
    for name in NEVER:
        if values.get(name) is not None:
            problems.append(
                f"{prefix}{name}={values[name]!r}: give the model's original weights, neither "
                "quantized nor renamed."
            )
    if kind not in KEYS:
        return values
    keys, defaults = KEYS[kind], {x.name: x.default for x in dataclasses.fields(config)}
    values = {name: x for name, x in values.items() if name in defaults or name in KEPT}
    known = {*keys.followed, *keys.idle, *IDLE, *RECORDS}
    for name, default in {**defaults, **required}.items():
        if name not in known and not _same(values.get(name), default):
            problems.append(
                f"{prefix}{name}={values.get(name)!r}: for a {kind!r}, only {default!r} is "
                "supported; give a model that has it."
            )
    problems += [f"{prefix}{problem}" for problem in _invalid_values(values, keys.followed)]
    for name in _HALVES:
        part = getattr(config, name, None)
        if dataclasses.is_dataclass(part):
            values[name] = _followed(part, f"{name}.", REQUIRED.get((kind, name), {}), problems)
    return values


def _invalid_values(values: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Returns messages about invalid values of followed keys."""
    problems = []
    for name in names:
        x = values.get(name)
        if name in SIZES and x is not None and not (_number(x) and x > 0 and x == int(x)):
            problems.append(f"{name}={x!r}: it must be a positive integer.")
        if name.endswith(("hidden_act", "hidden_activation")) and x not in ACTIVATIONS:
            problems.append(f"{name}={x!r}: supported activations are {list(ACTIVATIONS)}.")
        if name == "rope_parameters":
            nested = [y for y in x.values() if isinstance(y, Mapping)] if x else []
            for rope in nested or [x or {}]:
                if not (_number(rope.get("rope_theta")) and rope["rope_theta"] > 0):
                    problems.append(f"{name}={x!r}: rope_theta must be a positive number.")
                if rope.get("partial_rotary_factor") not in (None, 1):
                    problems.append(f"{name}={x!r}: partial_rotary_factor must be 1.")
    if not problems and "num_key_value_heads" in names:
        heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
        if heads % (groups or heads):
            problems.append(
                f"num_key_value_heads={groups}: it must divide num_attention_heads={heads}."
            )
    return problems


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _same(value: Any, default: Any) -> bool:
    """Returns whether two values of a key are equal, where None equals False."""
    return value == default or (value in (None, False) and default in (None, False))
