"""Tests of mmrl_jax.pretrained.stand_in: a config.json alone gives the shapes of a model."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from mmrl_jax.pretrained import chat, hub, stand_in, vision_chat
from tests import processors

SIZE = (48, 32)
SHAPES = {"splitting": False, "dtype": jnp.float32, "remat": False}


def images_of(spec):
    images = jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.uint8)
    inputs = jax.eval_shape(spec.preprocess_images, images)
    return jax.tree.map(lambda x: (x.shape, x.dtype), inputs)


@pytest.mark.parametrize("family", [name for name in processors.CHATS if name != "idefics3_whole"])
def test_a_config_alone_has_the_images_and_parameters_of_the_whole_directory(family, tmp_path):
    whole = tmp_path / "whole"
    processors.save_chat(family, whole)
    shutil.copyfile(whole / "config.json", tmp_path / "any_name.json")
    alone = stand_in.complete(tmp_path / "any_name.json", tmp_path / "alone")
    ours, theirs = (vision_chat.read_spec(path, SIZE, **SHAPES) for path in (alone, whole))
    # Qwen's limits on the size of images are its processor's, here tiny, and not in config.json.
    if not family.startswith("qwen"):
        assert ours.image_tokens == theirs.image_tokens
        assert images_of(ours) == images_of(theirs)
    assert ours.model == theirs.model
    ids = ours.chat.encode_prompt("How many?", images=ours.image_tokens)
    assert ids.count(ours.model.image_token) == ours.image_tokens
    assert max(ids) < ours.model.language.vocabulary


def test_what_a_directory_has_is_kept(tmp_path):
    whole = processors.save_decoder(tmp_path / "whole")
    (whole / "model.safetensors").unlink()
    made = stand_in.complete(whole, tmp_path / "made")
    assert (made / "tokenizer.json").resolve() == (whole / "tokenizer.json").resolve()
    plan = hub.read_blueprint("language_model", made, dtype=jnp.float32, remat=False)
    vocabulary = json.loads((whole / "config.json").read_text())["vocab_size"]
    assert plan.model.vocabulary == vocabulary
    assert chat.read_chat(made, vocabulary).encode_completion("two")


def test_a_missing_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="neither a config.json nor a directory that has one"):
        stand_in.complete(tmp_path / "absent", tmp_path / "made")
