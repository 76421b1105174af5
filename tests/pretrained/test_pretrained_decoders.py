"""Compares decoders of every family, with random parameters, with torch layer by layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmrl_jax.pretrained import hub as ours
from mmrl_jax.rollouts import generate as gen
from tests import hub

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOWS = {
    "head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", WINDOWS | {"query_pre_attn_scalar": 10}),
    "gemma3": ("Gemma3", WINDOWS | {"query_pre_attn_scalar": 10}),
}


@functools.cache
def pair(family, directory):
    """Returns the torch model, and our model loaded from its files."""
    name, changes = FAMILIES[family]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, f"{name}{suffix}")(**TINY | changes)
    config._attn_implementation = "eager"
    theirs = hub.save(getattr(transformers, f"{name}ForCausalLM")(config), directory / family)
    return theirs, ours.load_language_model(directory / family)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def prompts():
    """Returns prompts of different lengths, padded on the left and on the right."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 101, (4, 11))
    present = np.ones((4, 11), bool)
    present[1, :4] = present[2, 8:] = present[3, :1] = False
    return np.where(present, tokens, 0), present


def largest_error(theirs, model, params):
    """Returns the largest error over all layers and the logits."""
    tokens, present = prompts()
    positions = np.maximum(np.cumsum(present, axis=1) - 1, 0)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(present.astype(np.int64)),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
        )
    with jax.default_matmul_precision("highest"):
        logits, seen = model.apply(
            params, jnp.asarray(tokens), jnp.asarray(present), mutable=["hidden"]
        )
    stack = seen["hidden"]["stack"]
    errors = [hub.error(logits, expected.logits, present)]
    for i in range(model.layers - 1):  # transformers gives the last one after its norm alone.
        errors.append(
            hub.error(stack[f"block_{i}"]["out"][0], expected.hidden_states[i + 1], present)
        )
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_the_logits_are_torch_s(family, directory):
    theirs, (model, params, _) = pair(family, directory)
    assert largest_error(theirs, model, params) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_torch_s(family, directory):
    theirs, (model, variables, _) = pair(family, directory)
    tokens, present = (x[[0, 1, 3]] for x in prompts())  # Those padded on the left.
    theirs.generation_config.eos_token_id = None
    with torch.inference_mode():
        expected = theirs.generate(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(present.astype(np.int64)),
            max_new_tokens=32,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    @jax.jit
    def generate(variables, tokens, present):
        prompt = gen.text_prompt(model, variables, tokens, present)
        sampling = gen.Sampling(temperature=0.0)
        key = jax.random.key(0)
        return gen.generate(
            model, variables, prompt, key, num_completions=1, max_new_tokens=32, sampling=sampling
        )

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(generate(variables, tokens, present).tokens[:, 0])
    hub.compare_greedy(ours, expected.sequences[:, 11:].numpy(), torch.stack(expected.logits, 1))


def block(**changes):
    return lambda model: model.clone(block=dataclasses.replace(model.block, **changes))


def rope(**changes):
    return lambda model: model.clone(
        ropes=tuple(dataclasses.replace(r, **changes) for r in model.ropes)
    )


def clone(**changes):
    return lambda model: model.clone(**changes)


MUTATIONS = [
    ("llama", "theta", rope(theta=1100.0)),
    ("llama", "llama3", rope(llama3=None)),
    ("llama", "factor", rope(factor=2.0)),
    ("llama", "activation", block(activation="gelu_tanh")),
    ("llama", "epsilon", block(epsilon=1e-3)),
    ("qwen2", "theta", rope(theta=11_000.0)),
    ("qwen3", "query and key norms", block(qk_norm=False)),
    ("gemma", "norm offset", block(norm="rms")),
    ("gemma", "activation", block(activation="gelu")),
    ("gemma", "embedding scale", clone(embedding_scale=1.0)),
    ("gemma2", "window", clone(windows=(None, 5))),
    ("gemma2", "pattern", clone(pattern=(0, 1, 0))),
    ("gemma2", "soft cap of scores", block(softcap=None)),
    ("gemma2", "soft cap of logits", clone(softcap=None)),
    ("gemma2", "scale of scores", block(scale=None)),
    ("gemma3", "one rope for all", lambda model: model.clone(ropes=model.ropes[:1] * 2)),
    ("gemma3", "window", clone(windows=(None, 3))),
    ("gemma3", "query and key norms", block(qk_norm=False)),
]


@pytest.mark.parametrize(
    ("family", "mutate"),
    [(f, m) for f, _, m in MUTATIONS],
    ids=[f"{f}: {n}" for f, n, _ in MUTATIONS],
)
def test_a_mutation_is_noticed(family, mutate, directory):
    theirs, (model, params, _) = pair(family, directory)
    assert largest_error(theirs, mutate(model), params) > 1e-4


@pytest.mark.parametrize("family", ["llama_biases", "qwen2"])
def test_swapped_biases_of_keys_and_values_are_noticed(family, directory):
    theirs, (model, params, _) = pair(family, directory)
    attention = params["params"]["stack"]["block_1"]["attention"]
    key, value = (attention[name]["bias"] for name in ("key", "value"))
    swapped = attention | {
        "key": attention["key"] | {"bias": value},
        "value": attention["value"] | {"bias": key},
    }
    stack = params["params"]["stack"]
    stack = stack | {"block_1": stack["block_1"] | {"attention": swapped}}
    mutated = {"params": params["params"] | {"stack": stack}}
    assert largest_error(theirs, model, mutated) > 1e-4
