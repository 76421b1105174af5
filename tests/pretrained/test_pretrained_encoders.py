"""Compares CLIP, SigLIP, DINOv2 and BERT, with random parameters, with torch layer by layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmrl_jax.pretrained import hub as ours
from tests import hub

STACK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VISION = STACK | {"image_size": 24, "patch_size": 8}
DINO = {name: x for name, x in VISION.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
DINOS = ("dinov2", "dinov2_gated", "dinov2_with_registers", "dinov2_with_registers_gated")
# The 3 x 3 patches of the position embeddings, fewer rows and more columns, and 9 in one column.
SIZES = ((24, 24), (16, 40), (72, 8))
TEXT = STACK | {"vocab_size": 60, "max_position_embeddings": 9}
CLIP_TEXT = TEXT | {"eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 0}


def dinov2(name):
    model = "Dinov2WithRegisters" if "registers" in name else "Dinov2"
    config = getattr(transformers, f"{model}Config")
    gated = name.endswith("_gated")
    return getattr(transformers, f"{model}Model")(config(**DINO, use_swiglu_ffn=gated))


def models():
    return {name: functools.partial(dinov2, name) for name in DINOS} | {
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=20)
        ),
        "siglip": lambda: transformers.SiglipModel(
            transformers.SiglipConfig(
                text_config=TEXT | {"projection_size": 32}, vision_config=VISION
            )
        ),
        "clip_vision": lambda: transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**VISION)
        ),
        "siglip_vision": lambda: transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**VISION)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@functools.cache
def saved(name, directory):
    torch.manual_seed(0)
    return hub.save(models()[name](), directory / name)


def pictures(size=(24, 24)):
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, *size, 3)).astype(np.float32)


def sentences():
    """Returns sentences padded on the right, each of which ends with the highest id."""
    rng = np.random.default_rng(1)
    tokens, present = rng.integers(1, 58, (4, 8)), np.ones((4, 8), bool)
    for row, length in enumerate((8, 5, 3, 7)):
        tokens[row, length - 1], tokens[row, length:] = 59, 0
        present[row, length:] = False
    return tokens, present


def run(model, params, *inputs):
    with jax.default_matmul_precision("highest"):
        encoded, seen = model.apply(params, *map(jnp.asarray, inputs), mutable=["hidden"])
    stack = seen["hidden"]["stack"]
    return encoded, [stack[f"block_{i}"]["out"][0] for i in range(model.layers)]


def errors(ours, theirs, pooled, present=None):
    """Returns the errors of all layers, of the tokens and of the pooled features."""
    encoded, layers = ours
    everywhere = np.ones(encoded.tokens.shape[:2], bool) if present is None else present
    found = [
        hub.error(a, b, everywhere) for a, b in zip(layers, theirs.hidden_states[1:], strict=True)
    ]
    found.append(hub.error(encoded.tokens, theirs.last_hidden_state, everywhere))
    if pooled is not None:
        found.append(hub.error(encoded.pooled, pooled, np.ones(len(pooled), bool)))
    return found


def vision_errors(name, directory, mutate=lambda model: model, size=(24, 24)):
    theirs = saved(name, directory)
    tower = getattr(theirs, "vision_model", theirs)
    model, params, _ = ours.load_vision_tower(directory / name)
    images = pictures(size)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True)
        pooled = out.pooler_output
        if name == "clip":
            pooled = theirs.visual_projection(pooled)
    return max(errors(run(mutate(model), params, images), out, pooled))


def text_errors(name, directory, mutate=lambda model: model):
    theirs = saved(name, directory)
    tower = getattr(theirs, "text_model", theirs)
    model, params, _ = ours.load_text_tower(directory / name)
    tokens, present = sentences()
    with torch.no_grad():
        out = tower(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(present.astype(np.int64)),
            output_hidden_states=True,
        )
        if name == "clip":
            pooled = theirs.text_projection(out.pooler_output)
        elif name == "siglip":
            pooled = out.pooler_output
        else:
            weight = torch.tensor(present)[..., None].float()
            pooled = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
    return max(errors(run(mutate(model), params, tokens, present), out, pooled, present))


@pytest.mark.parametrize("name", ["clip", "siglip", "clip_vision", "siglip_vision"])
def test_vision_towers_are_torch_s(name, directory):
    assert vision_errors(name, directory) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DINOS)
def test_dinov2_is_torch_s_for_images_of_any_number_of_patches(name, size, directory):
    assert vision_errors(name, directory, size=size) < 1e-5


def test_a_classifier_of_dinov2_is_read_without_its_head(directory, tmp_path):
    config = transformers.Dinov2Config(**DINO, num_labels=5)
    theirs = hub.save(transformers.Dinov2ForImageClassification(config), tmp_path)
    model, params, _ = ours.load_vision_tower(tmp_path)
    with torch.no_grad():
        out = theirs.dinov2(torch.tensor(pictures().transpose(0, 3, 1, 2)))
    encoded, _ = run(model, params, pictures())
    assert hub.error(encoded.pooled, out.pooler_output, np.ones(3, bool)) < 1e-5


def test_an_image_that_is_not_made_of_patches_is_refused(directory):
    with pytest.raises(ValueError, match="28x24 is not divisible into patches of 8"):
        vision_errors("dinov2", directory, size=(28, 24))


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_text_towers_are_torch_s(name, directory):
    assert text_errors(name, directory) < 1e-5


def other_size(name, directory, mutate):
    return vision_errors(name, directory, mutate, size=(16, 40))


def block(**changes):
    return lambda model: model.clone(block=dataclasses.replace(model.block, **changes))


def clone(**changes):
    return lambda model: model.clone(**changes)


@pytest.mark.parametrize(
    ("find", "name", "mutate"),
    [
        (vision_errors, "clip", block(activation="gelu")),
        (vision_errors, "clip", block(epsilon=1e-3)),
        (vision_errors, "clip", clone(norm_tokens=True)),
        (vision_errors, "siglip", block(activation="gelu")),
        (other_size, "dinov2", clone(antialias=True)),
        (other_size, "dinov2_with_registers", clone(antialias=False)),
        (vision_errors, "dinov2", block(activation="gelu_tanh")),
        (vision_errors, "dinov2_gated", block(activation="gelu")),
        (text_errors, "clip", clone(causal=False)),
        (text_errors, "clip", clone(end=58)),
        (text_errors, "siglip", clone(causal=True)),
        (text_errors, "siglip", clone(pool="mean")),
        (text_errors, "bert", block(activation="gelu_tanh")),
        (text_errors, "bert", block(epsilon=1e-3)),
        (text_errors, "bert", clone(pool="last")),
    ],
)
def test_a_mutation_is_noticed(find, name, mutate, directory):
    assert find(name, directory, mutate) > 2e-5
