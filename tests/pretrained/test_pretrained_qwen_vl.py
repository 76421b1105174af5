"""Compares Qwen2.5-VL and Qwen3-VL with torch layer by layer, for several image sizes."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
import torch
import transformers
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as their_processing
from transformers.processing_utils import ProcessorMixin
from transformers.vision_utils import get_vision_window_index

from mmrl_jax.models import qwen_vision
from mmrl_jax.models.language import Rope, next_position
from mmrl_jax.models.qwen_vision import PatchImages
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained import processing, qwen_processing
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
    """Returns the torch model, and our model loaded from its files."""
    config = tiny_config(name)
    config._attn_implementation = "eager"
    # With seed 0 torch's own logits of Qwen2.5-VL are 1e-5 from those in float64.
    theirs = hub.save(getattr(transformers, NAMES[name])(config), directory / name, seed=1)
    return theirs, ours.load_vision_language_model(directory / name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@functools.cache
def images():
    """Returns patches for torch [N, 3, FRAMES, PATCH, PATCH] and for us, with distinct frames."""
    rng = np.random.default_rng(0)
    shape = (len(SIZES), PATCHES)
    patches = np.zeros((*shape, 3, FRAMES, PATCH, PATCH), np.float32)
    segment = np.full(shape, -1, np.int32)
    rows, columns = np.zeros((2, *shape), np.int32)
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
    """Returns prompts of different lengths, padded on the left and on the right."""
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
    """Returns tower states [N, D], features [N / 4, D], decoder states and logits."""
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


def errors(name, directory, model, params, packed=None):
    """Returns the errors of all tower blocks, features, all decoder blocks, and logits."""
    towers, features, layers, logits = torch_run(name, directory)
    tokens, present = prompts()
    packed = packed or images()[1]
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
    assert np.max(errors(name, directory, model, params)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_the_full_pass(name, directory):
    _, (model, params, _) = pair(name, directory)
    tokens, present = prompts()
    packed = images()[1]

    def positions(tokens, present):
        return jnp.asarray(qwen_processing.axial_positions(tokens == IMAGE, present, packed, 2))

    found = hub.generation_error(
        model, params, tokens, present, jax.tree.map(jnp.asarray, packed), positions
    )
    assert found < 2e-4


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


def vision(**changes):
    return lambda model: model.clone(vision=model.vision.clone(**changes))


def vision_block(**changes):
    return lambda model: vision(block=dataclasses.replace(model.vision.block, **changes))(model)


def vision_rope(**changes):
    return lambda model: vision(rope=dataclasses.replace(model.vision.rope, **changes))(model)


def rope(**changes):
    def mutate(model):
        changed = dataclasses.replace(model.language.ropes[0], **changes)
        return model.clone(language=model.language.clone(ropes=(changed,)))

    return mutate


MUTATIONS = [
    ("qwen2_5_vl", "theta", rope(theta=1010.0)),
    ("qwen2_5_vl", "order of sections", rope(sections=(3, 2, 3))),
    ("qwen2_5_vl", "sections that take turns", rope(interleaved=True)),
    ("qwen2_5_vl", "theta of the tower", vision_rope(theta=10_100.0)),
    ("qwen2_5_vl", "edge of windows", vision(window=6)),
    ("qwen2_5_vl", "no windows", vision(window=None)),
    ("qwen2_5_vl", "full layers", vision(full_layers=(2,))),
    ("qwen2_5_vl", "activation", vision_block(activation="gelu")),
    ("qwen2_5_vl", "epsilon", vision_block(epsilon=1e-3)),
    ("qwen3_vl", "theta", rope(theta=1010.0)),
    ("qwen3_vl", "order of sections", rope(sections=(4, 1, 3))),
    ("qwen3_vl", "sections side by side", rope(interleaved=False)),
    ("qwen3_vl", "theta of the tower", vision_rope(theta=10_100.0)),
    ("qwen3_vl", "layers of deepstack", vision(deepstack=(0, 1))),
    ("qwen3_vl", "activation", vision_block(activation="gelu")),
    ("qwen3_vl", "epsilon", vision_block(epsilon=1e-3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mutate"),
    [(n, m) for n, _, m in MUTATIONS],
    ids=[f"{n}: {what}" for n, what, _ in MUTATIONS],
)
def test_a_mutation_is_noticed(name, mutate, directory):
    _, (model, params, _) = pair(name, directory)
    assert np.max(errors(name, directory, mutate(model), params)) > 1e-4


def exchanged(params, one, other):
    """Returns the parameters with the arrays at two paths exchanged."""
    leaves = {
        tuple(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    swap = {tuple(one.split("/")): leaves[tuple(other.split("/"))]}
    swap[tuple(other.split("/"))] = leaves[tuple(one.split("/"))]
    return jax.tree_util.tree_map_with_path(
        lambda path, x: swap.get(tuple(key.key for key in path), x), params
    )


BIASES = "params/vision/stack/block_1/attention/{}/bias"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("qwen2_5_vl", BIASES.format("query"), BIASES.format("key")),
        ("qwen3_vl", BIASES.format("query"), BIASES.format("key")),
        (
            "qwen2_5_vl",
            "params/vision/merger/norm/scale",
            "params/vision/stack/block_0/mlp_norm/scale",
        ),
        (
            "qwen3_vl",
            "params/vision/deep_merger_0/norm/scale",
            "params/vision/deep_merger_1/norm/scale",
        ),
    ],
)
def test_exchanged_parameters_are_noticed(name, one, other, directory):
    _, (model, params, _) = pair(name, directory)
    assert np.max(errors(name, directory, model, exchanged(params, one, other))) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_exchanged_frames_are_noticed(name, directory):
    _, (model, params, _) = pair(name, directory)
    packed = images()[1]
    frames = np.split(packed.patches, FRAMES, axis=-1)
    packed = packed._replace(patches=np.concatenate(frames[::-1], axis=-1))
    assert np.max(errors(name, directory, model, params, packed)) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_another_activation_of_the_merger_is_noticed(name, directory, monkeypatch):
    _, (model, params, _) = pair(name, directory)
    approximate = qwen_vision.ACTIVATIONS["gelu_tanh"]
    monkeypatch.setitem(qwen_vision.ACTIVATIONS, "gelu", approximate)
    assert np.max(errors(name, directory, model, params)) > 1e-4


def test_positions_interpolated_between_edges_are_noticed(directory, monkeypatch):
    def hat(index, count, side):
        place = jnp.clip((index + 0.5) * side / count - 0.5, 0, side - 1)
        return jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(side)), 0)

    _, (model, params, _) = pair("qwen3_vl", directory)
    monkeypatch.setattr(qwen_vision, "hat", hat)
    assert np.max(errors("qwen3_vl", directory, model, params)) > 1e-4


WORDS = ["<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS += ["<unk>", "what", "is", "left", "of", "?"]
START, END = "<|vision_start|>", "<|vision_end|>"
TEXTS = [
    f"what is {START}<|image_pad|>{END} left of {START}<|image_pad|>{END}?",
    "what is left?",
    f"{START}<|image_pad|>{END} is left",
]
SHAPES = [[(20, 33), (50, 41)], [], [(5, 61)]]  # To be made smaller, larger, or only divisible.


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Returns a directory, and transformers' image processor and tokenizer saved in it."""
    path = tmp_path_factory.mktemp("processor")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    pictures = their_processing.Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 500, "longest_edge": 1200}
    )
    tokenizer.save_pretrained(path)
    pictures.save_pretrained(path)
    return path, tokenizer, pictures


def noise(height, width):
    return np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)


def photograph(height, width):
    """Returns a smooth image with a little noise."""
    y, x, color = np.mgrid[:height, :width, :3]
    image = 128 + 70 * np.sin(0.3 * y + color) * np.cos(0.4 * x - color)
    return np.uint8(image + noise(height, width) / 16)


def photographs():
    return [[photograph(*shape) for shape in shapes] for shapes in SHAPES]


@pytest.mark.parametrize("size", [(16, 32), (24, 16), (40, 96), (40, 24)])
def test_noise_is_resized_as_pillow_does_it(size):
    height, width = size
    found = processing.resize(jnp.asarray(noise(20, 33), jnp.float32)[None], size, "bicubic")[0]
    image = PIL.Image.fromarray(noise(20, 33))
    # One axis at a time, for Pillow 13 sometimes begins with the height, others never.
    for shape in ((width, 20), (width, height)):
        image = image.resize(shape, PIL.Image.BICUBIC)
    levels = np.abs(np.asarray(found) - np.asarray(image, np.float32))
    assert levels.max() <= 1  # Where a sum is half way between two levels.
    assert (levels > 0).mean() < 0.002


def test_sizes_are_transformers_s():
    rng = np.random.default_rng(3)
    spec = qwen_processing.PixelSpec(14, 2, 2, 56 * 56, 28 * 28 * 64, (0, 0, 0), (1, 1, 1))
    for height, width in rng.integers(10, 1500, (300, 2)).tolist():
        expected = their_processing.smart_resize(height, width, 28, spec.smallest, spec.largest)
        assert qwen_processing.smart_resize(height, width, spec) == expected


@pytest.mark.parametrize("kind", ["Qwen2_5_VLProcessor", "Qwen3VLProcessor"])
def test_prompts_and_patches_are_transformers_s(kind, processors, monkeypatch):
    path, tokenizer, pictures = processors
    # A processor of videos needs torchvision, and we have no videos.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
    theirs = getattr(transformers, kind)(pictures, tokenizer, None)
    expected = theirs(text=TEXTS, images=photographs(), padding=True, return_tensors="np")
    length = expected["input_ids"].shape[1]
    prompts = qwen_processing.load_processor(path)(TEXTS, photographs(), length=length, patches=160)
    np.testing.assert_array_equal(prompts.tokens, expected["input_ids"])
    np.testing.assert_array_equal(prompts.present, expected["attention_mask"])
    there = prompts.images.segment >= 0
    patches = prompts.images.patches[there].reshape(-1, FRAMES, PATCH, PATCH, 3)
    patches = patches.transpose(0, 4, 1, 2, 3).reshape(len(patches), -1)
    levels = np.abs(patches - expected["pixel_values"]) * 255 * min(pictures.image_std)
    assert levels.max() < 1.01
    assert (levels > 0.01).mean() < 0.1  # Most are of where Pillow 13 begins with the height.
    grids = [
        [*(x[b][prompts.images.segment[b] == i].max() + 1 for x in prompts.images[2:])]
        for b, shapes in enumerate(SHAPES)
        for i in range(len(shapes))
    ]
    np.testing.assert_array_equal(grids, expected["image_grid_thw"][:, 1:])


def test_a_processor_of_the_hub_s_older_and_newer_configs_is_the_same(processors, tmp_path):
    path, tokenizer, _ = processors
    loaded = qwen_processing.load_processor(path)
    config = json.loads((path / "preprocessor_config.json").read_text())
    tokenizer.save_pretrained(tmp_path)
    newer = tmp_path / "processor_config.json"
    newer.write_text(json.dumps({"image_processor": config}))
    assert qwen_processing.load_processor(tmp_path).pixels == loaded.pixels
    newer.unlink()
    del config["size"]
    config |= {"min_pixels": 500, "max_pixels": 1200}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert qwen_processing.load_processor(tmp_path).pixels == loaded.pixels


def test_a_processor_refuses_what_it_cannot_do(processors, tmp_path):
    process = qwen_processing.load_processor(processors[0])
    image, text = photograph(24, 24), "what is <|image_pad|>"
    enough = {"length": 30, "patches": 100}
    with pytest.raises(ValueError, match="Videos"):
        process(["<|video_pad|> what"], [[]], **enough)
    with pytest.raises(ValueError, match="2 images for 1"):
        process([text], [[image, image]], **enough)
    with pytest.raises(ValueError, match="11 tokens, more than length=10"):
        process([text], [[image]], length=10, patches=100)  # 3 x 3 features, what, is.
    with pytest.raises(ValueError, match="36 patches, more than patches=32"):
        process([text], [[image]], length=30, patches=32)
    with pytest.raises(ValueError, match="elongated"):
        process([text], [[photograph(2, 402)]], **enough)
    with pytest.raises(ValueError, match="neither"):
        qwen_processing.load_processor(tmp_path)


def test_image_tokens_that_are_no_features_are_refused(processors, monkeypatch):
    process, pack = qwen_processing.load_processor(processors[0]), qwen_processing.pack
    monkeypatch.setattr(qwen_processing, "pack", lambda images, *rest: pack([[]], *rest))
    with pytest.raises(ValueError, match="9 image tokens, but its images have 0 features"):
        process(["what is <|image_pad|>"], [[photograph(24, 24)]], length=30, patches=100)


def test_names_of_either_time_are_loaded(directory, tmp_path):
    _, (_, params, _) = pair("qwen2_5_vl", directory)
    source = directory / "qwen2_5_vl"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    renamed = {re.sub("^(?=visual)", "model.", name): x for name, x in tensors.items()}
    renamed = {
        re.sub(r"^model\.(?!visual)", "model.language_model.", name): x
        for name, x in renamed.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, ours.load_vision_language_model(tmp_path).params, params
    )


def test_other_models_are_refused(tmp_path):
    transformers.Qwen3VLMoeConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'qwen3_vl_moe' is not supported"):
        ours.load_vision_language_model(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_in_spite_of_padding(name, directory):
    _, (_, params, _) = pair(name, directory)
    model = ours.load_vision_language_model(directory / name, remat=True).model
    tokens, present = prompts()
    positions = qwen_processing.axial_positions(tokens == IMAGE, present, images()[1], 2)
    inputs = jax.tree.map(jnp.asarray, (tokens, present, images()[1], positions))

    @jax.jit
    def loss(params):
        logits = model.apply(params, *inputs)
        return jnp.sum(jnp.where(inputs[1][..., None], jax.nn.log_softmax(logits), 0)[..., 7])

    for path, x in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
        assert np.isfinite(x).all(), path
        assert np.abs(x).max() > 0, path


def test_positions_of_several_axes_must_be_given(directory):
    _, (model, params, _) = pair("qwen3_vl", directory)
    tokens, present = prompts()
    with pytest.raises(ValueError, match="positions=None"):
        model.apply(params, jnp.asarray(tokens), jnp.asarray(present), images()[1])


def test_axes_take_pairs_side_by_side_or_in_turns():
    # Turns of 0, 1, 2 until 1 and 2 have had theirs; the rest is the first one's.
    assert Rope(1.0, 16, sections=(2, 3, 3)).axes().tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    turns = Rope(1.0, 16, sections=(4, 2, 2), interleaved=True).axes()
    assert turns.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    with pytest.raises(ValueError, match="7 pairs in all, but a head of 16 has 8"):
        Rope(1.0, 16, sections=(2, 3, 2)).axes()


def test_positions_by_hand():
    # Two words, an image of 1 x 2 features, a word: the image starts at 2 and is 2 wide.
    images = PatchImages(None, np.zeros((1, 8), np.int32), *qwen_processing.grid(2, 4, 2)[:, None])
    present = np.array([[False, True, True, True, True, True]])
    is_image = np.array([[False, False, False, True, True, False]])
    positions = qwen_processing.axial_positions(is_image, present, images, 2)
    expected = [[[0, 0, 1, 2, 2, 4], [0, 0, 1, 2, 2, 4], [0, 0, 1, 2, 3, 4]]]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(next_position(positions, present), [5])
