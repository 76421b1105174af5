"""Compares images and prompts with transformers' processors."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
import transformers
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from mmrl_jax.pretrained import hub, processing
from mmrl_jax.pretrained.families import vlm
from tests import hub as tests_hub
from tests import processors

FAMILIES = processors.FAMILIES | {"llava_onevision_several": processors.llava_onevision}
RESIZE = processing.resize
SIZES = [(48, 80), (80, 60), (32, 32), (21, 96)]
CASES = [(family, size) for family in FAMILIES for size in SIZES]
CASES += [("llava_onevision", (60, 80)), ("llava_onevision_several", (90, 20))]
# Which of the images there are, and prompts.
MIXED = (
    np.array([[True, True], [False, True], [True, False]]),
    ["<image>left, <image>right?\n", "What is this?<image>", "a<image>\n\nball"],
)
LONE = np.ones((3, 1), bool), ["<image>left, right?\n", "What is this?<image>", "a<image>\n\nball"]
SEVERAL = (
    np.array([[True, True, False], [False, True, True], [True, True, True]]),
    [
        "<image>left, <image>right?\n",
        "What<image> is this?<image>",
        "<image><image>a<image>\n\nball",
    ],
)
PROMPTS = {"llava_onevision": LONE, "llava_onevision_several": SEVERAL}


@functools.cache
def pair(family, directory):
    """Returns transformers' processor, and ours loaded from its files."""
    theirs, config = FAMILIES[family]()
    theirs.save_pretrained(directory / family)
    config.save_pretrained(directory / family)
    return theirs, processing.load_processor(directory / family)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def batch(size, family=None):
    """Returns images with edges and noise, their mask, and prompts."""
    present, texts = PROMPTS.get(family, MIXED)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (*present.shape, 5, 5, 3), dtype=np.uint8)
    images = np.zeros((*present.shape, *size, 3), np.uint8)
    for i, j in np.ndindex(present.shape):
        smooth = Image.fromarray(coarse[i, j]).resize(size[::-1], Image.Resampling.BICUBIC)
        images[i, j] = np.clip(np.asarray(smooth) + rng.normal(0, 8, (*size, 3)), 0, 255)
        images[i, j, : size[0] // 3, : size[1] // 2] = 255 * (i == 1)
    return images, present, texts


def rectangles(size, family):
    """Like `batch`, with few levels, so that no value is rounded differently."""
    images, present, texts = batch(size, family)
    rng = np.random.default_rng(10)
    for i, j in np.ndindex(present.shape):
        images[i, j], inside = rng.integers(0, 256, (2, 3))
        images[i, j, size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = inside
    return images, present, texts


def expected(theirs, images, present, texts, side):
    pictures = [
        [Image.fromarray(image) for image, there in zip(*sample, strict=True) if there]
        for sample in zip(images, present, strict=True)
    ]
    return theirs(
        images=pictures, text=list(texts), padding=True, padding_side=side, return_tensors="np"
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "size"), CASES)
def test_prompts_are_transformers_s(family, size, side, directory):
    theirs, processor = pair(family, directory)
    images, present, texts = batch(size, family)
    out = expected(theirs, images, present, texts, side)
    length = out["input_ids"].shape[1]
    tokens, there = processor.prompts(texts, present, size, length=length, side=side)
    np.testing.assert_array_equal(tokens, out["input_ids"])
    np.testing.assert_array_equal(there, out["attention_mask"])


def levels(processor, pixels):
    """Returns values in levels of 0 to 255."""
    return (pixels * processor.image["image_std"] + processor.image["image_mean"]) * 255


def differences(family, size, directory):
    """Returns the differences of all values of all tiles in levels."""
    theirs, processor = pair(family, directory)
    images, present, texts = batch(size, family)
    out = expected(theirs, images, present, texts, "left")
    made = jax.jit(processor.pixels)(images, present)
    pixels, there, want = made.pixels, made.present, out["pixel_values"]
    if "pixel_attention_mask" in out:
        real = out["pixel_attention_mask"].any(axis=(2, 3))
        np.testing.assert_array_equal(np.sum(there, axis=1), np.sum(real, axis=1))
        want = want[real]
    if "image_sizes" in out:
        assert made.size == size and (out["image_sizes"] == size).all()
    want = np.moveaxis(want, -3, -1)
    return np.abs(levels(processor, np.asarray(pixels)[there]) - levels(processor, want))


@pytest.mark.parametrize(("family", "size"), CASES)
def test_pixels_are_transformers_s_but_for_rounding(family, size, directory):
    found = differences(family, size, directory)
    assert found.max() < 1.01  # One level, where PIL's fixed-point sums round another way,
    assert np.mean(found > 0.01) < 0.002  # and of these few.


def columns_first(images, size, method):
    images = RESIZE(jnp.swapaxes(images, 1, 2), size[::-1], method)
    return jnp.swapaxes(images, 1, 2)


def test_only_the_order_of_passes_differs_for_tall_images_of_pillow_13(directory, monkeypatch):
    # Pillow before 13, and torchvision, always resize rows first; so do we.
    assert differences("paligemma", (100, 60), directory).max() < 16
    monkeypatch.setattr(processing, "resize", columns_first)
    assert differences("paligemma", (100, 60), directory).max() < 1.01


@pytest.mark.parametrize(
    "other",
    [
        columns_first,
        lambda images, size, method: RESIZE(images, size, "linear"),
        lambda images, size, method: jax.image.resize(images, (len(images), *size, 3), method),
    ],
    ids=["columns first", "another method", "without rounding between"],
)
def test_another_way_of_resizing_is_noticed(other, directory, monkeypatch):
    monkeypatch.setattr(processing, "resize", other)
    assert np.mean(differences("idefics3", (48, 80), directory) > 0.01) > 0.02


@pytest.mark.parametrize("family", ["idefics3", "paligemma", "llava"])
def test_a_model_reads_what_a_processor_makes_inside_jit(family, directory):
    _, processor = pair(family, directory)
    images, present, texts = batch((48, 80))
    length = 400
    tokens, there = processor.prompts(texts, present, (48, 80), length=length, side="left")
    config = hub.read_config(directory / family)
    model = vlm.FAMILIES[config["model_type"]](config, (), jnp.float32, False).model
    params = model.init(jax.random.key(0), tokens, there, processor.pixels(images, present))

    @jax.jit
    def logits(params, images):
        return model.apply(params, tokens, there, processor.pixels(images, present))

    assert np.isfinite(logits(params, images)).all()


@pytest.fixture(scope="module")
def onevision(directory):
    """Returns the torch model, and our model loaded from its files."""
    path = processors.save_model("llava_onevision", directory / "onevision")
    kind = transformers.LlavaOnevisionForConditionalGeneration
    theirs = kind.from_pretrained(path, attn_implementation="eager").eval()
    return theirs, hub.load_vision_language_model(path)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("llava_onevision", (50, 90)),
        ("llava_onevision", (60, 80)),
        ("llava_onevision_several", (48, 80)),
    ],
)
def test_logits_of_what_it_makes_are_torch_s(family, size, directory, onevision):
    theirs, (model, params, _) = onevision
    processor = pair(family, directory)[1]
    images, present, texts = rectangles(size, family)
    out = expected(pair(family, directory)[0], images, present, texts, "left")
    tokens, there = processor.prompts(texts, present, size, length=None, side="left")

    @jax.jit
    def logits(params, images):
        return model.apply(params, tokens, there, processor.pixels(images, present))

    with torch.no_grad():
        want = theirs(**out.convert_to_tensors("pt")).logits
    assert tests_hub.error(logits(params, images), want, there) < 1e-5


def test_the_number_of_image_tokens_is_transformers_s_for_any_size(directory):
    _, processor = pair("llava_onevision", directory)
    images = LlavaOnevisionImageProcessorPil()  # Up to 6x6 tiles of 384 pixels, as released.
    theirs = processors.WithoutVideos(
        images, processors.tokenizer(), num_image_tokens=729, vision_feature_select_strategy="full"
    )
    image = {"size": dict(images.size), "image_grid_pinpoints": images.image_grid_pinpoints}
    config = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}
    config["vision_aspect_ratio"] = "anyres_max_9"
    for size in np.random.default_rng(0).integers(20, 3000, (200, 2)).tolist():
        plan = processor.family.plan(image, size, 1)
        found = len(processor.family.expand(config, image, plan, "x"))
        assert found == theirs._get_number_of_features(*size, 384, 384), size


def test_prompts_with_one_image_and_with_several_are_not_mixed(directory):
    _, processor = pair("llava_onevision", directory)
    present, texts = MIXED
    with pytest.raises(ValueError, match="Prompt 1 has 1 of at most 2 images, but this model"):
        processor.prompts(texts, present, (48, 80), length=None, side="left")
    # Nothing differs where there is none at all.
    present, texts = np.array([[True, True], [False, False]]), ["<image><image>", "a"]
    tokens, _ = processor.prompts(texts, present, (48, 80), length=None, side="left")
    is_image = tokens == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert is_image.sum(axis=1).tolist() == [2 * (16 + 1), 0]


def test_prompts_that_do_not_fit_raise(directory):
    _, processor = pair("llava", directory)
    _, present, texts = batch((32, 32))
    with pytest.raises(ValueError, match="Prompt 0 has 1 marks '<image>', but 2 images"):
        processor.prompts(["<image>", *texts[1:]], present, (32, 32), length=99, side="left")
    with pytest.raises(ValueError, match="Prompt 0 has .* more than length=9"):
        processor.prompts(texts, present, (32, 32), length=9, side="left")
    other = dataclasses.replace(processor, config=processor.config | {"patch_size": 16})
    with pytest.raises(ValueError, match="Sample 0 has 8 image tokens.* 32 features"):
        other.prompts(texts, present, (32, 32), length=99, side="left")
    with pytest.raises(ValueError, match="Images are float32"):
        processor.pixels(np.zeros((1, 1, 32, 32, 3), np.float32))


def test_files_of_before_transformers_5_are_read(directory, tmp_path):
    _, processor = pair("llava", directory)
    shutil.copytree(directory / "llava", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    image = config.pop("image_processor")
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    before = processing.load_processor(tmp_path)
    assert before.image == processor.image
    chat = [{"role": "user", "content": "<image>Which?"}]
    assert before.tokenizer.apply_chat_template(chat, tokenize=False) == "<image>Which?!"


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        ("llava", "do_pad", True, "do_pad=True"),
        ("llava", "do_resize", False, "do_resize=False .* default True is"),
        ("llava", "pad_size", 40, "pad_size=.* default None is"),
        ("llava", "resample", 0, "resample=0"),
        ("llava", "size", {"longest_edge": 5000}, "size=.*give whole numbers"),
        ("llava", "size", {"height": 32, "width": 0}, "size=.*give whole numbers"),
        ("llava", "rescale_factor", "1/255", "rescale_factor='1/255'"),
        ("llava", "image_std", 0, "image_std=0.* must not be 0"),
        ("llava", "image_mean", [0.5, 0.5], r"image_mean=.*\(0.5, 0.5\)"),
        ("llava", "image_processor_type", "ViTImageProcessor", "'ViTImageProcessor' is not supp"),
        ("llava", "size", "large", "cannot be read: ValueError"),
        ("idefics3", "size", {"longest_edge": 5000}, "the maximum is 4096"),
        ("idefics3", "size", {"shortest_edge": 50}, "size=.*give whole numbers"),
        ("idefics3", "max_image_size", 32, "max_image_size=32.*{'longest_edge': '...'}"),
        ("paligemma", "image_seq_length", None, "image_seq_length=None"),
        ("llava_onevision", "do_center_crop", True, "do_center_crop=True"),
        ("llava_onevision", "crop_size", 32, "crop_size=.* default None is"),
        ("llava_onevision", "size", {"shortest_edge": 32}, "size=.*give whole numbers"),
        ("llava_onevision", "size", {"height": 32, "width": 64}, "height and width must be equal"),
        ("llava_onevision", "image_grid_pinpoints", [[32, 40]], r"\[\[32, 40\]\] is not supported"),
    ],
)
def test_what_is_not_supported_is_named(family, name, value, message, directory, tmp_path):
    pair(family, directory)
    shutil.copytree(directory / family, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"][name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        processing.load_processor(tmp_path)


def test_an_image_token_that_is_not_the_model_s_raises(directory, tmp_path):
    pair("llava", directory)
    shutil.copytree(directory / "llava", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_index": 7}))
    with pytest.raises(ValueError, match="'<image>' is token .*, but the model's is 7"):
        processing.load_processor(tmp_path)
