"""Compares the precedence of processor files, and their defaults, with transformers."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from mmrl_jax.pretrained import processing, processor_files, qwen_processing
from tests import processors

LIMITS = {"shortest_edge": 500, "longest_edge": 1200}
COARSE = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)


def picture(size):
    return np.asarray(Image.fromarray(COARSE).resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Returns a directory with a tokenizer without chat template."""
    path = tmp_path_factory.mktemp("words")
    processors.tokenizer().save_pretrained(path)
    return path


def copied(source, path):
    shutil.copytree(source, path, dirs_exist_ok=True)
    return path


def write(path, name, content):
    (path / name).write_text(json.dumps(content))


@pytest.fixture
def qwen(words, tmp_path):
    """Returns a directory of a Qwen-VL, and its preprocessor_config.json."""
    copied(words, tmp_path)
    made = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=LIMITS)
    made.save_pretrained(tmp_path)
    return tmp_path, json.loads((tmp_path / "preprocessor_config.json").read_text())


def test_the_nested_image_processor_goes_before_the_file_of_its_own(qwen):
    path, config = qwen
    other = config | {"size": LIMITS | {"longest_edge": 5000}}
    for nested, expected in ((other, 5000), ({**config}, 1200), (None, 1200)):
        write(path, "processor_config.json", {"image_processor": nested})
        theirs = Qwen2VLImageProcessorPil.from_pretrained(path)
        found = qwen_processing.load_processor(path).pixels.largest
        assert found == theirs.size.longest_edge == expected


TEMPLATES = ("processor_config.json", "chat_template.json", "chat_template.jinja")


@pytest.mark.parametrize("pair", [("tokenizer", x) for x in TEMPLATES] + [
    (first, second) for i, first in enumerate(TEMPLATES) for second in TEMPLATES[:i]
])  # fmt: skip
def test_the_chat_template_is_the_one_that_transformers_s_processor_takes(pair, qwen):
    path, _ = qwen
    for name in pair:
        if name == "tokenizer":
            config = json.loads((path / "tokenizer_config.json").read_text())
            write(path, "tokenizer_config.json", config | {"chat_template": name})
        elif name == "chat_template.jinja":
            (path / name).write_text(name)
        else:
            write(path, name, {"chat_template": name})
    theirs, _ = ProcessorMixin.get_processor_dict(path)
    found = qwen_processing.load_processor(path).tokenizer.chat_template
    assert found == theirs["chat_template"] == pair[1]


def test_a_tokenizer_s_own_template_serves_where_the_processor_has_none(qwen):
    path, _ = qwen
    config = json.loads((path / "tokenizer_config.json").read_text())
    write(path, "tokenizer_config.json", config | {"chat_template": "own"})
    assert qwen_processing.load_processor(path).tokenizer.chat_template == "own"


CHANGES = {
    "do_normalize": {"do_normalize": False},
    "do_rescale": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "resample": {"resample": 2},
    "one mean for all": {"image_mean": 0.5, "image_std": [0.5, 0.4, 0.3]},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_pixels_of_qwen_vl_follow_the_config(changes, qwen):
    path, config = qwen
    write(path, "preprocessor_config.json", config | changes)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(path)
    image = picture((33, 50))
    want = theirs(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"]
    spec = qwen_processing.load_processor(path).pixels
    found = np.asarray(qwen_processing.cut_image(jnp.asarray(image), spec))
    found = found.reshape(len(found), spec.frames, spec.patch, spec.patch, 3)
    found = found.transpose(0, 4, 1, 2, 3).reshape(len(found), -1)
    assert_levels(found, want, np.ptp(picture((33, 50))))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    processor, config = processors.llava()
    processor.save_pretrained(path)
    config.save_pretrained(path)
    return path


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_pixels_of_llava_follow_the_config(changes, llava, tmp_path):
    path = copied(llava, tmp_path)
    config = json.loads((path / "processor_config.json").read_text())
    config["image_processor"] |= changes
    write(path, "processor_config.json", config)
    theirs = CLIPImageProcessorPil(**config["image_processor"])
    image = picture((40, 33))
    want = theirs(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"]
    found = processing.load_processor(path).pixels(image[None, None]).pixels[0]
    assert_levels(np.moveaxis(np.asarray(found), -1, 1), want, np.ptp(image))


def assert_levels(found, want, contrast):
    """Asserts that images are equal, except for few values that differ by one level of 255."""
    assert found.shape == want.shape
    level = np.ptp(want) / contrast
    assert np.ptp(want) > 0 and np.abs(found - want).max() < 1.5 * level
    assert np.mean(np.abs(found - want) > 0.1 * level) < 0.1


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("size", {"max_pixels": 200_000}),
        ("size", {"size": None}),
        *((x, {}) for x in ("size", "image_mean", "image_std", "patch_size", "merge_size")),
        *((x, {}) for x in ("temporal_patch_size", "resample", "image_processor_type")),
    ],
)
def test_a_key_of_qwen_vl_that_is_left_out_has_transformers_s_default(key, changes, qwen):
    path, config = qwen
    config.pop(key)
    write(path, "preprocessor_config.json", config | changes)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(path)
    spec = qwen_processing.load_processor(path).pixels
    assert (spec.patch, spec.merge, spec.frames) == (
        theirs.patch_size,
        theirs.merge_size,
        theirs.temporal_patch_size,
    )
    assert (spec.smallest, spec.largest) == (theirs.size.shortest_edge, theirs.size.longest_edge)
    assert (spec.mean, spec.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert spec.method == "bicubic"


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        ("llava", LlavaImageProcessorPil()),
        ("paligemma", SiglipImageProcessorPil(image_seq_length=4)),
        ("idefics3", transformers.Idefics3ImageProcessorPil()),
        ("smolvlm", transformers.SmolVLMImageProcessorPil()),
        ("llava_onevision", transformers.LlavaOnevisionImageProcessorPil()),
        ("siglip_vision_model", SiglipImageProcessorPil()),
        ("clip_vision_model", CLIPImageProcessorPil()),
    ],
)
def test_an_empty_config_is_all_defaults(kind, defaults, tmp_path):
    write(tmp_path, "preprocessor_config.json", {"image_seq_length": 4})
    found = processor_files.read_image_processor(tmp_path, kind)
    for key in ("size", "crop_size", "resample", "do_center_crop", "do_image_splitting"):
        theirs = getattr(defaults, key, None)
        assert found.get(key) == (dict(theirs) if key.endswith("size") and theirs else theirs), key
    assert found["image_mean"] == tuple(defaults.image_mean)
    assert found["image_std"] == tuple(defaults.image_std)


def test_sizes_have_every_form_that_transformers_reads(tmp_path):
    write(tmp_path, "preprocessor_config.json", {"size": 32, "crop_size": 24})
    found = processor_files.read_image_processor(tmp_path, "llava")
    assert found["size"] == {"shortest_edge": 32}  # As CLIP's first configs have it.
    assert found["crop_size"] == {"height": 24, "width": 24}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "preprocessor_config.json: do_resize=False .* default True is"),
        ({"do_center_crop": True}, "do_center_crop=True .* default None is"),
        ({"resample": 0}, "resample=0"),
        ({"patch_size": 14.5}, "patch_size=14.5"),
        ({"size": {"height": 4, "width": 4}}, "size=.*longest_edge.*shortest_edge"),
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported"),
    ],
)
def test_what_qwen_vl_does_not_follow_is_refused(changes, message, qwen):
    path, config = qwen
    write(path, "preprocessor_config.json", config | changes)
    with pytest.raises(ValueError, match=message):
        qwen_processing.load_processor(path)


def test_keys_without_effect_here_may_be_anything(qwen):
    path, config = qwen
    idle = {"do_convert_rgb": False, "data_format": "channels_last", "do_pad": False, "device": "x"}
    write(path, "preprocessor_config.json", config | idle | {"video_sampling": {"fps": 1}})
    qwen_processing.load_processor(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("processor_config.json", b'{"image_pro', "processor_config.json.* cannot be read"),
        ("processor_config.json", b"[]", "processor_config.json.* cannot be read"),
        ("chat_template.json", b"{}", "chat_template.json.* cannot be read: KeyError"),
        ("preprocessor_config.json", b'{"size"', "preprocessor_config.json.*cannot be read"),
        ("preprocessor_config.json", b"\xff", "preprocessor_config.json.*cannot be read"),
        ("preprocessor_config.json", b"[1]", "preprocessor_config.json.*cannot be read"),
        ("tokenizer.json", b'{"version"', "has no supported tokenizer"),
    ],
)
def test_a_damaged_file_is_named(file, content, message, qwen):
    path, _ = qwen
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        qwen_processing.load_processor(path)


def test_what_prompts_depend_on_has_a_default_or_is_asked_for(llava, tmp_path):
    path = copied(llava, tmp_path)
    config = json.loads((path / "processor_config.json").read_text())
    assert config.pop("num_additional_image_tokens") == 1
    write(path, "processor_config.json", config)
    assert processing.load_processor(path).config["num_additional_image_tokens"] == 0
    del config["patch_size"]
    write(path, "processor_config.json", config)
    with pytest.raises(ValueError, match="processor_config.json has no patch_size"):
        processing.load_processor(path)
    assert processor_files.FAMILIES["smolvlm"].prompts == ("image_seq_len",)
