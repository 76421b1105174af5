"""Qwen2.5-VL and Qwen3-VL against torch: images of several sizes, redrawn, layer by layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.vision_utils import get_vision_window_index

from mmrl_jax.models import qwen_vision
from mmrl_jax.models.language import next_position
from mmrl_jax.models.qwen_vision import PatchImages
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained import qwen_processing
from tests import hub

PATCH, FRAMES, IMAGE, VOCABULARY = 4, 2, 5, 60
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES,
    "out_hidden_size": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
SIZES = [[(6, 10), (2, 2)], [(2, 8)], [], [(4, 4), (8, 6)]]  # Of each sample's images, in patches.
PATCHES = 72


def tiny_config(name):
    ids = {"image_token_id": IMAGE, "video_token_id": 6}
    if name == "qwen2_5_vl":
        return transformers.Qwen2_5_VLConfig(
            text_config=TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}},
            vision_config=VISION
            | {"depth": 3, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
            **ids,
        )
    rope = ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return transformers.Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 16, "rope_parameters": rope},
        vision_config=VISION
        | {"depth": 4, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
        tie_word_embeddings=True,
        **ids,
    )


NAMES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@functools.cache
def pair(name, directory):
    """The torch model, and ours, loaded from what it saved."""
    config = tiny_config(name)
    config._attn_implementation = "eager"
    theirs = hub.save(getattr(transformers, NAMES[name])(config), directory / name)
    return theirs, ours.load_vision_language_model(directory / name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@functools.cache
def images():
    """Patches for torch [N, 3, FRAMES, PATCH, PATCH] and for us; the frames are not the same."""
    rng = np.random.default_rng(0)
    shape = (len(SIZES), PATCHES)
    patches = np.zeros((*shape, 3, FRAMES, PATCH, PATCH), np.float32)
    segment, rows, columns = np.full((3, *shape), -1, np.int32)
    for b, sizes in enumerate(SIZES):
        start = 0
        for i, (height, width) in enumerate(sizes):
            here = slice(start, start := start + height * width)
            patches[b, here] = rng.normal(size=(height * width, 3, FRAMES, PATCH, PATCH))
            segment[b, here] = i
            rows[b, here], columns[b, here] = qwen_processing.grid(height, width, 2)
    channels_last = patches.transpose(0, 1, 3, 4, 5, 2).reshape(*shape, -1)
    return patches[segment >= 0], PatchImages(channels_last, segment, rows, columns)


def prompts():
    """Ragged, padded on the left, and on the right."""
    rng = np.random.default_rng(1)
    tokens, present = np.zeros((4, 26), np.int64), np.zeros((4, 26), bool)
    for b, sizes in enumerate(SIZES):
        words = list(rng.integers(7, VOCABULARY, 3))
        for height, width in sizes:
            words += [IMAGE] * (height * width // 4) + list(rng.integers(7, VOCABULARY, 2))
        here = slice(0, len(words)) if b == 1 else slice(26 - len(words), 26)
        tokens[b, here], present[b, here] = words, True
    return tokens, present


def torch_inputs():
    tokens, present = prompts()
    grids = [(1, *size) for sizes in SIZES for size in sizes]
    return {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(present.astype(np.int64)),
        "mm_token_type_ids": torch.tensor((tokens == IMAGE).astype(np.int64)),
        "image_grid_thw": torch.tensor(grids),
    }


@functools.cache
def torch_run(name, directory):
    """Hidden states of the tower [N, D], its features [N / 4, D], those of the decoder, logits."""
    theirs, _ = pair(name, directory)
    inputs, pixels = torch_inputs(), torch.tensor(images()[0].reshape(-1, 3 * FRAMES * PATCH**2))
    grids = inputs["image_grid_thw"]
    towers, layers = [], []

    def keep(into):
        return lambda module, args, out: into.append(out.detach())

    hooks = [b.register_forward_hook(keep(towers)) for b in theirs.model.visual.blocks]
    hooks += [b.register_forward_hook(keep(layers)) for b in theirs.model.language_model.layers]
    with torch.no_grad():
        logits = theirs(pixel_values=pixels, **inputs).logits
        for hook in hooks:
            hook.remove()
        found = theirs.model.get_image_features(pixels, grids)
    features = [torch.cat(found.pooler_output)]
    features += [torch.cat(x) for x in getattr(found, "deepstack_features", None) or ()]
    if name == "qwen2_5_vl":  # It goes through the windows one after the other.
        order, _ = get_vision_window_index(grids, 2, 4 * PATCH, PATCH)
        back = torch.argsort(order)
        towers = [x.reshape(-1, 4, x.shape[-1])[back].reshape(x.shape) for x in towers]
    return towers, features, layers, logits


def errors(name, directory, model, params, seen_images=None):
    """Of every block of the tower, the features, every block of the decoder, and the logits."""
    towers, features, layers, logits = torch_run(name, directory)
    tokens, present = prompts()
    packed = images()[1] if seen_images is None else seen_images
    positions = qwen_processing.axial_positions(tokens == IMAGE, present, packed, 2)
    inputs = jax.tree.map(jnp.asarray, (tokens, present, packed, positions))
    with jax.default_matmul_precision("highest"):
        found, seen = model.apply(params, *inputs, mutable=["hidden"])
        encoded = model.apply(params, inputs[2], method="encode")
    tower, decoder = (seen["hidden"][half]["stack"] for half in ("vision", "language"))
    there = packed.segment >= 0

    def compare(stack, expected, where):
        assert len(stack) == len(expected)
        for i, x in enumerate(expected):
            yield np.asarray(stack[f"block_{i}"]["out"][0])[where], x

    pairs = list(compare(tower, towers, there))
    in_place = np.asarray(encoded.present)
    ours_features = [encoded.tokens, *encoded.deep]
    pairs += [(np.asarray(a)[in_place], b) for a, b in zip(ours_features, features, strict=True)]
    pairs += [(a, b[present]) for a, b in compare(decoder, layers, present)]
    pairs.append((np.asarray(found)[present], logits[present]))
    return [hub.error(a, b, np.ones(len(b), bool)) for a, b in pairs]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_the_features_and_the_logits_are_torch_s(name, directory):
    _, (model, params, _) = pair(name, directory)
    found = errors(name, directory, model, params)
    print(name, found)
    assert max(found) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_torch_s(name, directory):
    theirs, _ = pair(name, directory)
    tokens, present = prompts()
    positions = qwen_processing.axial_positions(tokens == IMAGE, present, images()[1], 2)
    expected, deltas = theirs.model.get_rope_index(**torch_inputs())
    np.testing.assert_array_equal(positions, expected.numpy().transpose(1, 0, 2))
    # transformers goes on at the number of tokens and the deltas.
    following = present.sum(axis=1) + deltas.numpy()[:, 0]
    np.testing.assert_array_equal(next_position(positions, present), following)
