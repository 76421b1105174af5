"""Tests of unreadable files in the Orbax format."""

import jax
import jax.numpy as jnp
import pytest
import transformers

from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained import orbax_format
from tests import hub
from tests.pretrained import test_pretrained_decoders as decoders


@pytest.fixture
def directory(tmp_path):
    hub.save(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoders.TINY)), tmp_path / "hub"
    )
    orbax_format.save(
        ours.load_language_model(tmp_path / "hub"), tmp_path / "ours", tmp_path / "hub"
    )
    return tmp_path / "ours"


def refused(directory, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*experiments\.convert_hf"):
        orbax_format.load(directory)


def test_files_that_are_damaged_are_named(directory):
    record = (directory / "model.json").read_text()
    for text in ("", "{}", "[]", record.replace("language_model", "another"), record[:-9]):
        (directory / "model.json").write_text(text)
        refused(directory, r"model\.json is damaged")
    (directory / "model.json").write_text(record)
    orbax_format.load(directory)
    for path in (directory / "params").rglob("*"):
        if path.is_file() and "manifest" in path.name:
            path.write_bytes(b"nothing")
    refused(directory, "params cannot be read")


def test_values_that_are_not_finite_are_refused_by_name(directory, tmp_path):
    loaded = orbax_format.load(directory)
    params = loaded.params["params"]
    table = params["table"].at[3, 2].set(jnp.nan)
    spoiled = loaded._replace(params={"params": params | {"table": table}})
    orbax_format.save(spoiled, tmp_path / "spoiled", tmp_path / "hub")
    refused(tmp_path / "spoiled", "params: table has values that are NaN")
    assert jax.tree.structure(orbax_format.load(directory).params) == jax.tree.structure(
        loaded.params
    )
