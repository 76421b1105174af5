"""Images and prompts against transformers' own processors."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from mmrl_jax.pretrained import hub, processing
from mmrl_jax.pretrained.families import vlm
from tests.processors import FAMILIES

RESIZE = processing.resize
SIZES = [(48, 80), (80, 60), (32, 32), (21, 96)]


@functools.cache
def pair(family, directory):
    """transformers' processor, and ours, loaded from what it saved."""
    theirs, config = FAMILIES[family]()
    theirs.save_pretrained(directory / family)
    config.save_pretrained(directory / family)
    return theirs, processing.load_processor(directory / family)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def batch(size):
    """Images, smooth with edges and some noise, which of them there are, and prompts."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 2, 5, 5, 3), dtype=np.uint8)
    images = np.zeros((3, 2, *size, 3), np.uint8)
    for i, j in np.ndindex(3, 2):
        smooth = Image.fromarray(coarse[i, j]).resize(size[::-1], Image.Resampling.BICUBIC)
        images[i, j] = np.clip(np.asarray(smooth) + rng.normal(0, 8, (*size, 3)), 0, 255)
        images[i, j, : size[0] // 3, : size[1] // 2] = 255 * (i == 1)
    present = np.array([[True, True], [False, True], [True, False]])
    texts = ["<image>left, <image>right?\n", "What is this?<image>", "a<image>\n\nball"]
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
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_transformers_s(family, size, side, directory):
    theirs, processor = pair(family, directory)
    images, present, texts = batch(size)
    out = expected(theirs, images, present, texts, side)
    length = out["input_ids"].shape[1]
    tokens, there = processor.prompts(texts, present, size, length=length, side=side)
    np.testing.assert_array_equal(tokens, out["input_ids"])
    np.testing.assert_array_equal(there, out["attention_mask"])


def levels(processor, pixels):
    """Of 0 to 255."""
    return (pixels * processor.image["image_std"] + processor.image["image_mean"]) * 255


def differences(family, size, directory):
    """In levels, of every value of every tile."""
    theirs, processor = pair(family, directory)
    images, present, texts = batch(size)
    out = expected(theirs, images, present, texts, "left")
    pixels, there = jax.jit(processor.pixels)(images, present)
    want = out["pixel_values"]
    if "pixel_attention_mask" in out:
        real = out["pixel_attention_mask"].any(axis=(2, 3))
        np.testing.assert_array_equal(np.sum(there, axis=1), np.sum(real, axis=1))
        want = want[real]
    want = np.moveaxis(want, 1, -1)
    return np.abs(levels(processor, np.asarray(pixels)[there]) - levels(processor, want))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
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
    config = dict(processor.config)
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
    ("name", "value", "message"),
    [
        ("do_pad", True, "do_pad=True"),
        ("do_normalize", False, "do_normalize=False"),
        ("resample", 0, "resample=0"),
        ("size", {"longest_edge": 5000}, "the most is 4096"),
    ],
)
def test_what_is_not_supported_is_named(name, value, message, directory, tmp_path):
    pair("llava", directory)
    shutil.copytree(directory / "llava", tmp_path, dirs_exist_ok=True)
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
