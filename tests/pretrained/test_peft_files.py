"""Tests of adapters of unused layers, and of unreadable adapter files."""

import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from mmrl_jax.models import lora as lora_lib
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained.peft_format import load_adapter
from mmrl_jax.pretrained.weights import WeightMismatch
from tests.pretrained import test_pretrained_vlm as vlms

UNREAD = "model.vision_tower.encoder.layers.2.self_attn"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Writes a LLaVA that uses two of its tower's three layers, and an adapter of PEFT."""
    path = tmp_path_factory.mktemp("llava")
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**vlms.FAMILIES["llava"][1])
    )
    model.save_pretrained(path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    peft.get_peft_model(model, config).save_pretrained(path / "adapter")
    return path


@pytest.fixture(scope="module")
def plan(directory):
    return ours.read_blueprint(
        "vision_language_model", directory / "base", dtype=jnp.float32, remat=False
    )


def rewritten(directory, target, change):
    """Returns a copy of the adapter with other tensors."""
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    target.mkdir()
    config = (directory / "adapter" / "adapter_config.json").read_text()
    (target / "adapter_config.json").write_text(config)
    save_file(change(tensors), target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def loaded_paths(lora):
    return sorted(lora_lib.adapters(lora))


READ = sorted(
    [f"vision/tower/stack/block_{i}/attention/{x}" for i in (0, 1) for x in ("query", "value")]
    + [f"language/stack/block_{i}/attention/{x}" for i in (0, 1, 2) for x in ("query", "value")]
)


def test_adapters_of_layers_that_are_never_read_are_left_out_with_a_message(
    directory, plan, capsys
):
    lora = load_adapter(directory / "adapter", plan.shapes(jnp.float32), plan.keys)
    assert loaded_paths(lora) == READ
    message = capsys.readouterr().err
    assert message.count("Skipped 2 adapters") == 1
    assert f"{UNREAD}.q_proj, {UNREAD}.v_proj" in message


def ones(tensors):
    """Returns adapters none of which adds zero."""
    return {name: np.ones_like(x) for name, x in tensors.items()}


def test_they_are_left_out_whatever_their_values_are(directory, plan, tmp_path, capsys):
    adapter = rewritten(directory, tmp_path / "a", ones)
    shapes = plan.shapes(jnp.float32)
    lora = load_adapter(adapter, shapes, plan.keys, ignored=plan.ignored)
    assert loaded_paths(lora) == READ
    assert "Skipped 2 adapters" in capsys.readouterr().err
    # Nothing says that the layer is never read.
    with pytest.raises(WeightMismatch, match=r"unexpected: .*layers\.2\.self_attn\.q_proj\.lora_A"):
        load_adapter(adapter, shapes, plan.keys)


def test_adapters_of_layers_that_the_model_does_not_have_are_refused(directory, plan, tmp_path):
    def deeper(tensors):
        return {
            name.replace("language_model.layers.2.", "language_model.layers.7."): x
            for name, x in ones(tensors).items()
        }

    adapter = rewritten(directory, tmp_path / "a", deeper)
    with pytest.raises(WeightMismatch, match=r"unexpected: .*language_model\.layers\.7\."):
        load_adapter(adapter, plan.shapes(jnp.float32), plan.keys, ignored=plan.ignored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config[:40], "no config of an adapter.*download it again"),
        (lambda config: "[]", "no config of an adapter"),
        (lambda config: json.dumps({"peft_type": "LORA"}), "KeyError: 'r'"),
        (lambda config: json.dumps(json.loads(config) | {"r": 0}), "positive integers, not"),
        (lambda config: json.dumps(json.loads(config) | {"lora_alpha": "8"}), "numbers, not"),
    ],
)
def test_a_damaged_config_is_named(change, message, directory, plan, tmp_path):
    adapter = rewritten(directory, tmp_path / "a", dict)
    path = adapter / "adapter_config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"adapter_config\.json(.|\n)*{message}"):
        load_adapter(adapter, plan.shapes(jnp.float32), plan.keys)


def test_damaged_tensors_are_named(directory, plan, tmp_path):
    shapes = plan.shapes(jnp.float32)

    def spoiled(tensors):
        return {name: np.full_like(x, np.nan) for name, x in tensors.items()}

    adapter = rewritten(directory, tmp_path / "nan", spoiled)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*q_proj.* NaN"):
        load_adapter(adapter, shapes, plan.keys)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a readable.*again"):
        load_adapter(adapter, shapes, plan.keys)
