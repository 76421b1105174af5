"""What a run depends on beside its config: changes are named where it is used again."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import evaluate
from experiments import train as train_script
from mmrl_jax.pretrained import bundled_weights
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import factory, fingerprints, folder_factory, host_rewards, token_models
from mmrl_jax.training import workdir as workdir_lib
from tests import processors, tiny
from tests.test_folder import folder

SOURCE = "def letters(*, completion, **columns):\n    return float(len(completion))\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return processors.save_decoder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """The config and the workdir of a run that has a checkpoint, of files that may be changed."""
    images = folder(tmp_path / "images", count=8)
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    config = config_lib.load_config("configs/folder_grpo.py")
    config.folder.update(
        directory=str(images), height=16, width=16, prompt_tokens=64, answer_tokens=4,
        validation_size=2, test_size=2,
    )  # fmt: skip
    config.rewards.update(functions=("my_rewards:letters",), weights=(1.0,), workers=1)
    config.model.update(
        pretrained=str(tmp_path / "model"), width=16, heads=2, patch_hidden=16, vision_layers=0
    )
    config.rl.update(questions=4, group=4, minibatches=1, accumulate=1)
    workdir = workdir_lib.as_path(tmp_path / "run")
    train_script.prepare(config, workdir)
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    return config, workdir


def change_records(tmp_path):
    lines = (tmp_path / "images/metadata.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "images/metadata.jsonl").write_text("".join(lines[::-1]))


def change_image(tmp_path):
    images = sorted((tmp_path / "images").rglob("*.png"))
    images[0].write_bytes(images[1].read_bytes())
    host_rewards.open_split.cache_clear()  # As in another process: the table is the same.


def change_rewards(tmp_path):
    (tmp_path / "my_rewards.py").write_text(SOURCE.replace("float(", "-float("))


def change_weights(tmp_path):
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = np.nextafter(tensors[name], np.float32(1))
    save_file(tensors, path)


CHANGES = {
    "records": change_records,
    "image": change_image,
    "reward_functions": change_rewards,
    "base_weights": change_weights,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_named_and_refused(kind, run, tmp_path):
    config, workdir = run
    with train_script.prepare(config, workdir):  # Nothing has changed.
        pass
    CHANGES[kind](tmp_path)
    name = "records" if kind == "image" else kind
    with pytest.raises(ValueError, match=rf"has changed since it began:\n  {name}: ") as caught:
        train_script.prepare(config, workdir)
    assert str(caught.value).count("\n  ") == 1
    with pytest.raises(ValueError, match=rf"has changed since it began:\n  {name}: "):
        evaluate.measures(workdir, "latest", 2, trust_modules=True)
    if name == "base_weights":
        assert "--accept" not in str(caught.value)
        with pytest.raises(ValueError, match="--accept_changes=base_weights: only chat_template"):
            train_script.prepare(config, workdir, accept=("base_weights",))
        # The policy alone, which is restored and exported, depends on nothing else.
        with pytest.raises(ValueError, match="base_weights"):
            evaluate.restore_tokens(workdir, "latest", trust_modules=True)
        return
    assert f"--accept_changes={name}" in str(caught.value)
    # With the policy alone nothing is wrong, but that there is no checkpoint.
    with pytest.raises(ValueError, match="can be read"):
        evaluate.restore_tokens(workdir, "latest", trust_modules=True)
    # What is meant is kept, and not asked for again.
    train_script.prepare(config, workdir, accept=(name,))
    train_script.prepare(config, workdir)


def test_what_has_trained_nothing_may_change(run, tmp_path):
    config, workdir = run
    (workdir / "checkpoints" / "1").rmdir()
    before = fingerprints.read(workdir).fingerprints["reward_functions"]
    change_rewards(tmp_path)
    train_script.prepare(config, workdir)
    assert fingerprints.read(workdir).fingerprints["reward_functions"] != before


def test_tokens_and_template_are_part_of_the_prompts(run):
    config, _ = run
    now = folder_factory.dependencies(config)
    assert set(now) == {"base_weights", "chat_template", "records", "reward_functions"}
    assert set(now) < set(fingerprints.MEANINGS)
    chat = folder_factory.make_parts(config).chat
    other = chat.template._replace(before=chat.template.before + " ")
    changed = token_models.dependencies(config.model, dataclasses.replace(chat, template=other))
    assert changed["chat_template"] != now["chat_template"]
    assert changed["base_weights"] == now["base_weights"]


def test_modules_that_a_run_names_are_imported_only_if_trusted(run, tmp_path):
    _, workdir = run
    marker = tmp_path / "imported"
    (tmp_path / "my_rewards.py").write_text(f"open({str(marker)!r}, 'w').close()\n{SOURCE}")
    sys.modules.pop("my_rewards")
    with pytest.raises(ValueError, match=r"functions of my_rewards, which .*--trust_modules"):
        evaluate.evaluate(workdir, which="latest", split="all", episodes=2)
    assert not marker.exists()
    with pytest.raises(ValueError, match="has changed"):
        evaluate.evaluate(workdir, which="latest", split="all", episodes=2, trust_modules=True)
    assert marker.exists()


def test_a_stage_is_known_by_what_it_says_not_by_its_name(tmp_path):
    named = workdir_lib.as_path(tmp_path / "sft")
    # Of an earlier version: a directory of this name is the stage before the one above.
    assert not evaluate.is_fine_tuning(named)
    workdir_lib.claim_workdir(tmp_path, {"seed": 0})
    assert evaluate.is_fine_tuning(named)
    fingerprints.write(named, fingerprints.Run("rl", {}))
    assert not evaluate.is_fine_tuning(named)
    fingerprints.write(named, fingerprints.Run("sft", {}))
    shutil.move(named, tmp_path / "other")
    assert evaluate.is_fine_tuning(workdir_lib.as_path(tmp_path / "other"))


def test_a_record_that_is_damaged_compares_nothing(tmp_path):
    for content in ("", "[]", '{"stage": "rl"}', '{"stage": "rl", "fingerprints": [1]}'):
        (tmp_path / "run.json").write_text(content)
        assert fingerprints.read(tmp_path) is None
        fingerprints.check(tmp_path, {"records": "a"})


def test_control_policies_depend_on_what_reads_their_instructions(monkeypatch, tmp_path):
    assert factory.dependencies(tiny.config("mlp_ppo")) == {}
    config = tiny.config("reach_ppo")
    assert factory.dependencies(config) == {}
    config.model.text_encoder = "minilm"
    before = factory.dependencies(config)
    shutil.copytree(bundled_weights.minilm(), tmp_path / "minilm")
    with config.unlocked():
        config.model.text_encoder = str(tmp_path / "minilm")
    assert factory.dependencies(config) == before and list(before) == ["text_encoder"]
