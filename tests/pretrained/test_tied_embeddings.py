"""Tests whether the output layer is tied, by config and tensors, as in transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained import orbax_format
from tests import hub
from tests.pretrained import test_pretrained_decoders as decoders
from tests.pretrained import test_pretrained_vlm as vlms

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIES = {
    "embeddings alone": (True, lambda table, head: {TABLE: table}),
    "output layer alone": (True, lambda table, head: {HEAD: head}),
    "both, equal": (True, lambda table, head: {TABLE: table, HEAD: table}),
    "both, different": (True, lambda table, head: {TABLE: table, HEAD: head}),
    "both, the config says untied": (False, lambda table, head: {TABLE: table, HEAD: head}),
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """Returns a Llama with a separate output layer."""
    directory = tmp_path_factory.mktemp("untied")
    config = transformers.LlamaConfig(**decoders.TINY, tie_word_embeddings=False)
    hub.save(transformers.LlamaForCausalLM(config), directory)
    return directory


def lay(untied, directory, tied, choose):
    """Writes a directory with given tensors, and a config that says whether they are tied."""
    directory.mkdir()
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(untied / "model.safetensors")
    kept = choose(tensors.pop(TABLE), tensors.pop(HEAD))
    save_file(tensors | kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def embeddings(loaded):
    """Returns our token embeddings, and those of the output layer."""
    params = loaded.params["params"]
    assert ("head" in params) == (not loaded.model.tied)
    return params["table"], params["table"] if loaded.model.tied else params["head"].T


def assert_as_in_transformers(loaded, directory):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    table, head = embeddings(loaded)
    assert np.array_equal(table, theirs.get_input_embeddings().weight.detach())
    assert np.array_equal(head, theirs.get_output_embeddings().weight.detach())


@pytest.mark.parametrize("case", TIES)
def test_the_output_layer_is_the_one_that_transformers_takes(case, untied, tmp_path):
    source = lay(untied, tmp_path / "source", *TIES[case])
    loaded = ours.load_language_model(source)
    assert_as_in_transformers(loaded, source)
    ours.export(loaded, tmp_path / "out", source)
    assert_as_in_transformers(loaded, tmp_path / "out")
    orbax_format.save(loaded, tmp_path / "ours", source)
    again = orbax_format.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    ours.export(again, tmp_path / "back", source)
    assert_as_in_transformers(loaded, tmp_path / "back")


def test_what_is_exported_with_its_own_output_layer_says_so(untied, tmp_path):
    source = lay(untied, tmp_path / "source", *TIES["both, different"])
    ours.export(ours.load_language_model(source), tmp_path / "out", source)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_an_output_layer_that_is_missing_is_not_drawn_at_random(untied, tmp_path):
    source = lay(untied, tmp_path / "source", False, TIES["embeddings alone"][1])
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        ours.load_language_model(source)


@pytest.mark.parametrize("family", ["idefics3", "paligemma"])
def test_a_vision_language_model_is_untied_too(family, tmp_path):
    name, changes = vlms.FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**changes | {"tie_word_embeddings": False})
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    hub.save(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    plan = ours.read_blueprint("vision_language_model", tmp_path, dtype=jnp.float32, remat=False)
    assert not plan.model.language.tied and plan.config["tie_word_embeddings"] is False
    theirs = type(model).from_pretrained(tmp_path)
    assert not torch.equal(
        theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    )
