"""Tests that every key of a config is used, unused, or rejected unless it is the default."""

import dataclasses
import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmrl_jax.pretrained import blueprints
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained.families import config_keys
from tests import hub
from tests.pretrained import test_pretrained_decoders as decoders
from tests.pretrained import test_pretrained_encoders as encoders
from tests.pretrained import test_pretrained_qwen_vl as qwen_vl
from tests.pretrained import test_pretrained_vlm as vlms

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
NAMES = (*DECODERS, *encoders.models(), *vlms.FAMILIES, *qwen_vl.NAMES)
# Other values of those keys for which `other` makes none that is allowed.
VALUES = {
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "projector_hidden_act": "relu",
    "vision_feature_layer": 1,
    "vision_feature_select_strategy": lambda x: "full" if x == "default" else "default",
    "vision_aspect_ratio": "anyres_max_2",
    "layer_types": lambda x: ["sliding_attention"] * len(x),
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [1],
    "num_position_embeddings": 36,
    "image_grid_pinpoints": [[32, 32]],
    "num_key_value_heads": lambda x: 1 if x > 1 else 2,
    "_out_features": ["stage1"],
    "_out_indices": [1],
    "attn_logit_softcapping": 7.0,
    "use_bidirectional_attention": lambda x: not x,
    "final_logit_softcapping": 7.0,
    "dtype": "float16",
    "architectures": ["Another"],
    "problem_type": "regression",
    "id2label": {0: "a"},
    "label2id": {"a": 0},
}


def overruled(name):
    """Returns keys that another key of the config, or the whole model, makes ineffective."""
    if name.endswith("_gated"):  # Its activation is always SiLU.
        return ("hidden_act",)
    if name not in (*vlms.FAMILIES, *qwen_vl.NAMES):
        return ()
    # transformers' LLaVA takes it from the decoder, where it was once saved.
    tie = () if name.startswith("llava") else ("text_config.tie_word_embeddings",)
    return (*tie, "vision_config.vision_use_head")


@functools.cache
def config_of(name):
    if name in DECODERS:
        family, changes = decoders.FAMILIES[name]
        suffix = "TextConfig" if name == "gemma3" else "Config"
        return getattr(transformers, f"{family}{suffix}")(**decoders.TINY | changes)
    if name in encoders.models():
        return encoders.models()[name]().config
    if name in vlms.FAMILIES:
        family, changes = vlms.FAMILIES[name]
        return getattr(transformers, f"{family}Config")(**changes)
    return qwen_vl.tiny_config(name)


def halves(config, prefix=()):
    """Yields a config and its inner configs with their paths."""
    yield prefix, config
    for name in ("text_config", "vision_config"):
        if dataclasses.is_dataclass(getattr(config, name, None)):
            yield from halves(getattr(config, name), (*prefix, name))


def other(name, x):
    """Returns another value for a key."""
    if name in VALUES:
        value = VALUES[name]
        return value(x) if callable(value) else value
    if name == "rope_parameters":
        return {
            k: other(name, v) if isinstance(v, dict) else v * 2 if k == "rope_theta" else v
            for k, v in x.items()
        }
    if isinstance(x, bool):
        return not x
    return 7 if x is None else x * 2 if isinstance(x, int) else x * 1.5 + 0.1


def changed(config, path, name, value):
    """Returns the config as a dict with another value for a key."""
    whole = config.to_dict()
    functools.reduce(lambda x, k: x[k], path, whole)[name] = value
    return whole


def plans(config, directory):
    """Returns what is built from a config, for all kinds of models that it fits."""
    (directory / "config.json").write_text(json.dumps(config))
    read = ours.read_config(directory)
    return [
        repr((plan.model, plan.inputs, sorted(plan.keys), plan.ignored, plan.tied))
        for kind, (_, families, _) in blueprints.KINDS.items()
        if read["model_type"] in families
        for plan in [blueprints.make(kind, read, (), dtype=jnp.float32, remat=False)]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_followed_or_idle_or_refused(name, tmp_path):
    config = config_of(name)
    before = plans(config.to_dict(), tmp_path)
    assert before
    for path, half in halves(config):
        keys = config_keys.KEYS[half.model_type]
        idle = {*keys.idle, *config_keys.IDLE, *config_keys.RECORDS} - {*keys.followed}
        fields = {x.name for x in dataclasses.fields(half)}
        for key in sorted(fields - {"text_config", "vision_config", "transformers_version"}):
            mutated = changed(config, path, key, other(key, half.to_dict().get(key)))
            where = ".".join((*path, key))
            if key in idle or where in overruled(name):
                assert plans(mutated, tmp_path) == before, where
            elif key in keys.followed:
                try:
                    assert plans(mutated, tmp_path) != before, where
                except ValueError as error:
                    assert key in str(error), (where, error)
            else:
                with pytest.raises(ValueError, match=rf"config\.json: .*(\n.*)*{key}="):
                    plans(mutated, tmp_path)


def logits(config):
    """Returns the logits of a randomly initialized torch model."""
    config._attn_implementation = "eager"
    if config.model_type in blueprints.DECODERS:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    hub.redraw(model)
    tokens = torch.tensor([[1, 7, 33, 21, 9, 40, 2, 59]])
    pixels = torch.tensor(encoders.pictures().transpose(0, 3, 1, 2))[:1]
    inputs = {"input_ids": tokens, "pixel_values": pixels}
    sees = config.model_type in blueprints.VISION
    taken = {"clip": inputs, "siglip": inputs}.get(
        config.model_type, {"pixel_values" if sees else "input_ids": None}
    )
    with torch.no_grad():
        out = model.eval()(**{key: inputs[key] for key in taken})
    return [x.numpy() for x in out.to_tuple() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", (*DECODERS, *encoders.models()))
def test_torch_computes_the_same_whatever_the_idle_keys_are(name):
    config = config_of(name)
    mutated = config.to_dict()
    for path, half in halves(config):
        keys = config_keys.KEYS[half.model_type]
        for key in {*keys.idle, *config_keys.IDLE} - {*keys.followed, "use_cache"}:
            # The mask token is not used here, but its random numbers would change the others.
            if hasattr(half, key) and key != "use_mask_token":
                value = 0.5 if "dropout" in key else other(key, getattr(half, key))
                functools.reduce(lambda x, k: x[k], path, mutated)[key] = value
    before, after = (logits(type(config).from_dict(x)) for x in (config.to_dict(), mutated))
    assert len(before) > 0
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "final_logit_softcapping", 1.0),
        ("llama", "sliding_window", 2),
        ("qwen2", "attention_bias", True),
        ("gemma", "hidden_activation", "relu"),
        ("bert", "position_embedding_type", "relative_key"),
        ("clip", "tie_word_embeddings", True),
    ],
)
def test_keys_that_transformers_does_not_read_are_left_out(name, key, value, tmp_path):
    config = config_of(name).to_dict()
    assert plans(config | {key: value}, tmp_path) == plans(config, tmp_path)


REFUSED = {
    "activation": ({"hidden_act": "nope"}, "hidden_act='nope'.*'gelu_pytorch_tanh'"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    "weights elsewhere": ({"transformers_weights": "x.safetensors"}, "transformers_weights="),
    "type": ({"hidden_size": "16"}, "hidden_size.*'16'"),
    "sign": ({"hidden_size": -16, "head_dim": 8}, "hidden_size=-16"),
    "zero": ({"num_attention_heads": 0}, "damaged"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads=3.*num_attention_heads=4"),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
    "rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    "dtype": ({"dtype": "float7"}, "float7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_no_model_can_have_name_the_file_and_the_key(case, tmp_path):
    changes, message = REFUSED[case]
    config = transformers.LlamaConfig(**decoders.TINY).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path))}/config\.json(.|\n)*{message}"
    ):
        ours.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a":', b"\xff\xfe", b"{}", b"null"])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged.*Download it again"):
        ours.read_config(tmp_path)


def test_the_prompt_of_paligemma_s_decoder_must_see_ahead(tmp_path):
    config = config_of("paligemma")
    mutated = changed(config, ("text_config",), "use_bidirectional_attention", False)
    with pytest.raises(ValueError, match=r"text_config\.use_bidirectional_attention=False.*True"):
        plans(mutated, tmp_path)
