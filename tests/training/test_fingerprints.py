"""Tests that changed inputs of a run are reported when the run is used again."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmrl_jax
from mmrl_jax import problems, restoring, runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands import evaluate
from mmrl_jax.pretrained import bundled_weights
from mmrl_jax.problems import token_models
from mmrl_jax.training import fingerprints
from tests import processors, tiny
from tests.tasks.test_folder import folder

SOURCE = "def letters(*, completion, **columns):\n    return float(len(completion))\n"


def claim(config, workdir, **accepted):
    """Claims a directory for a run and releases its lock."""
    with runs.claim(problems.make(config), workdir, **accepted):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return processors.save_decoder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Returns the config and the workdir of a run with a checkpoint."""
    images = folder(tmp_path / "images", count=8)
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    changes = {
        "mesh": {"data": 1},
        "dataset": {
            "directory": str(images), "height": 16, "width": 16, "prompt_tokens": 64,
            "completion_tokens": 4, "validation_size": 2, "test_size": 2,
        },
        "rewards": {"functions": ("my_rewards:letters",), "weights": (1.0,), "workers": 1},
        "model": {
            "checkpoint": str(tmp_path / "model"), "width": 16, "heads": 2, "patch_hidden": 16,
            "vision_layers": 0,
        },
        "grpo": {
            "prompts_per_update": 4, "num_completions": 4, "num_minibatches": 1,
            "grad_accum_steps": 1,
        },
    }  # fmt: skip
    config = mmrl_jax.get_config("folder_grpo", changes)
    workdir = workdir_lib.as_path(tmp_path / "run")
    claim(config, workdir)
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    return config, workdir


def change_records(tmp_path):
    lines = (tmp_path / "images/metadata.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "images/metadata.jsonl").write_text("".join(lines[::-1]))


def change_image(tmp_path):
    images = sorted((tmp_path / "images").rglob("*.png"))
    images[0].write_bytes(images[1].read_bytes())


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
    claim(config, workdir)  # Nothing has changed.
    CHANGES[kind](tmp_path)
    name = "records" if kind == "image" else kind
    with pytest.raises(ValueError, match=rf"has changed since it began:\n  {name}: ") as caught:
        claim(config, workdir)
    assert str(caught.value).count("\n  ") == 1
    with pytest.raises(ValueError, match=rf"has changed since it began:\n  {name}: "):
        evaluate.evaluate(workdir, episodes=2, trust_modules=True)
    if name == "base_weights":
        assert "--accept" not in str(caught.value)
        with pytest.raises(ValueError, match="--accept_changes=base_weights: only chat_template"):
            claim(config, workdir, accept=("base_weights",))
        # The policy alone, which is restored and exported, depends on nothing else.
        with pytest.raises(ValueError, match="base_weights"):
            mmrl_jax.load(workdir, trust_modules=True)
        return
    assert f"--accept_changes={name}" in str(caught.value)
    # With the policy alone nothing is wrong, but that there is no checkpoint.
    with pytest.raises(ValueError, match="can be read"):
        mmrl_jax.load(workdir, trust_modules=True)
    # What is meant is kept, and not asked for again.
    claim(config, workdir, accept=(name,))
    claim(config, workdir)


def test_what_has_trained_nothing_may_change(run, tmp_path):
    config, workdir = run
    (workdir / "checkpoints" / "1").rmdir()
    before = fingerprints.read(workdir).fingerprints["reward_functions"]
    change_rewards(tmp_path)
    claim(config, workdir)
    assert fingerprints.read(workdir).fingerprints["reward_functions"] != before


def test_tokens_and_template_are_part_of_the_prompts(run):
    config, _ = run
    problem = problems.make(config)
    now = problem.dependencies()
    assert set(now) == {"base_weights", "chat_template", "records", "reward_functions"}
    assert set(now) < set(fingerprints.MEANINGS)
    chat = problem.model.texts.tokenizer
    other = chat.template._replace(before=chat.template.before + " ")
    changed = token_models.dependencies(config.model, dataclasses.replace(chat, template=other))
    assert changed["chat_template"] != now["chat_template"]
    assert changed["base_weights"] == now["base_weights"]


def test_modules_that_a_run_names_are_imported_only_if_trusted(run, tmp_path):
    _, workdir = run
    marker = tmp_path / "imported"
    (tmp_path / "my_rewards.py").write_text(f"open({str(marker)!r}, 'w').close()\n{SOURCE}")
    sys.modules.pop("my_rewards")
    with pytest.raises(ValueError, match=r"names my_rewards, which .*--trust_modules"):
        evaluate.evaluate(workdir, which="latest", split="all", episodes=2)
    assert not marker.exists()
    with pytest.raises(ValueError, match="has changed"):
        evaluate.evaluate(workdir, which="latest", split="all", episodes=2, trust_modules=True)
    assert marker.exists()


def test_a_stage_is_known_by_what_it_says_not_by_its_name(tmp_path):
    named = workdir_lib.as_path(tmp_path / "sft")
    workdir_lib.claim_workdir(named, tiny.token_config())
    # Without a record it is the last one of its config.
    assert restoring.read_problem(named)[1] == "grpo"
    fingerprints.write(named, fingerprints.Run("sft", {}))
    assert restoring.read_problem(named)[1] == "sft"
    shutil.move(named, tmp_path / "other")
    assert restoring.read_problem(tmp_path / "other")[1] == "sft"


def test_a_record_that_is_damaged_compares_nothing(tmp_path):
    for content in ("", "[]", '{"stage": "rl"}', '{"stage": "rl", "fingerprints": [1]}'):
        (tmp_path / "run.json").write_text(content)
        assert fingerprints.read(tmp_path) is None
        fingerprints.check(tmp_path, {"records": "a"})


def test_control_policies_depend_on_what_reads_their_instructions(tmp_path):
    def dependencies(config):
        return problems.make(config).dependencies()

    assert dependencies(tiny.config("mlp_ppo", **tiny.FAST)) == {}
    assert dependencies(tiny.config("reach_ppo")) == {}
    before = dependencies(tiny.config("reach_ppo", model__text_encoder="minilm"))
    shutil.copytree(bundled_weights.minilm(), tmp_path / "minilm")
    copied = tiny.config("reach_ppo", model__text_encoder=str(tmp_path / "minilm"))
    assert dependencies(copied) == before and list(before) == ["text_encoder"]
