"""Tests that problems are made once, of what they read, and of the order of their stages."""

import sys

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems, runs
from mmrl_jax.commands import train
from mmrl_jax.config import schema
from mmrl_jax.config.options import options_of
from mmrl_jax.pretrained import hub
from mmrl_jax.problems import control_models, demonstrations, token_options
from tests import processors, tiny


@pytest.fixture
def reads(monkeypatch):
    """Returns the directories whose weights are read, with one entry for each read."""
    directories, load = [], hub.load_language_model

    def counting(directory, *arguments, **options):
        directories.append(directory)
        return load(directory, *arguments, **options)

    monkeypatch.setattr(hub, "load_language_model", counting)
    return directories


def test_pretrained_weights_are_read_once_a_run(reads, tmp_path):
    directory = processors.save_decoder(tmp_path / "llama")
    config = tiny.token_config(
        "smollm2_vqa_grpo",
        model__checkpoint=str(directory),
        sft__num_updates=2,
        grpo__num_updates=2,
        grpo__num_minibatches=1,
    )
    trained = mmrl_jax.train(config, tmp_path / "run")
    assert [result.updates for result in trained.results.values()] == [2, 2]
    assert len(reads) == 1
    # Resumed, it has to be read for what no checkpoint holds, and once again.
    mmrl_jax.train(problems.complete(config, {"grpo": {"num_updates": 3}}), tmp_path / "run")
    assert len(reads) == 2
    mmrl_jax.load(tmp_path / "run")
    assert len(reads) == 3


def test_demonstrations_are_recorded_once(monkeypatch, capsys):
    recorded, record = [], demonstrations.record
    monkeypatch.setattr(
        demonstrations, "record", lambda *a, **k: recorded.append(1) or record(*a, **k)
    )
    problem = problems.make(tiny.config())
    stages = [problem.stage("bc"), problem.stage("bc", name="more_cloning")]
    assert len(recorded) == 1 and capsys.readouterr().out.count("episodes of an expert") == 1
    jax.tree.map(np.testing.assert_array_equal, *(stage.constants for stage in stages))


@pytest.mark.parametrize(
    "config",
    [
        lambda: tiny.config(stages=("ppo", "bc"), ppo__num_updates=2, bc__num_updates=2),
        lambda: tiny.config(
            stages=("awr", "ppo"), awr__num_updates=2, awr__discount=0.95, ppo__num_updates=2
        ),
        lambda: tiny.token_config(stages=("dpo", "sft"), dpo__num_updates=2, sft__num_updates=2),
    ],
)
def test_a_stage_begins_where_the_one_before_ended(config, tmp_path, monkeypatch):
    config, starts = config(), []
    problem = problems.make(config)
    make_stage = problem.stage

    def recording(name, *, start=None):
        starts.append(jax.device_get(start))
        return make_stage(name, start=start)

    monkeypatch.setattr(problem, "stage", recording)
    first, last = config.stages
    with runs.claim(problem, tmp_path):
        trained = runs.train_stages(problem, tmp_path)
    assert list(trained.results) == [first, last] and starts[0] is None
    before = mmrl_jax.load(tmp_path / first).variables
    parameters = [getattr(x, "params", x) for x in (starts[1], before, trained.variables)]
    jax.tree.map(np.testing.assert_array_equal, *parameters[:2])
    changed = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), *parameters[1:]
    )
    assert any(jax.tree.leaves(changed))


def test_keys_that_a_config_lacks_have_their_defaults_and_unused_groups_are_left_out():
    config = problems.complete(
        {
            "problem": "control",
            "stages": ("ppo",),
            "env": {"name": "recall"},
            "bc": {"num_updates": 7},
        }
    )
    assert "bc" not in config and config.ppo.discount == 0.99 and config.ppo.target_kl is None
    assert config.run.eval_episodes == 512
    # One that is stored by an earlier version lacks a key.
    del config.ppo["clip"]
    assert problems.complete(config).ppo.clip == 0.2


_REACH = {"problem": "control", "stages": ("ppo",), "env": {"name": "recall"}}
_COUNT = {"problem": "task", "stages": ("sft",)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            _COUNT | {"model": {"kind": "decoder", "image_splitting": True}},
            "model.kind='decoder' does not use model.image_splitting=True.*of model.kind='vlm'",
        ),
        (
            _COUNT | {"model": {"fusion": "joint"}},
            "'model.fusion', which is a key of 'control' problems; .* has problem='task'",
        ),
        (
            _REACH | {"dataset": {"directory": "images"}},
            "'dataset', which is a key of 'dataset' problems; .* has problem='control'",
        ),
        (_REACH | {"envs": {"name": "recall"}}, "'envs'. Did you mean 'env'"),
    ],
)
def test_a_key_of_another_kind_is_answered_with_the_kind(config, message):
    with pytest.raises(ValueError, match=message):
        problems.make(problems.complete(config))


@pytest.mark.parametrize(
    ("spec", "key", "message"),
    [
        ("reach_vlm", "model.patch", "a key of 'multimodal' models; .* has model.kind='vlm'"),
        ("vlm_grpo", "model.heads", "a key of 'scratch', 'decoder' models; .*kind='vlm'"),
        ("reach_bc", "ppo.clip", r"a key of the stage 'ppo'; .* has stages=\('bc',\)"),
        ("reach_bc", "sft.batch_size", "a key of 'text_agent', 'task', 'dataset' problems"),
    ],
)
def test_the_command_line_is_answered_so_too(spec, key, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", f"--config={spec}", f"--config.{key}=1"])
    with pytest.raises(SystemExit, match=f"Unknown config key '{key}', which is {message}"):
        train.run()


def test_an_option_of_control_and_of_token_policies_is_one_option():
    control, token = (
        schema.flatten_group(options_of(module.MODELS[kind]))
        for module, kind in ((control_models, "multimodal"), (token_options, "scratch"))
    )
    same = set(control) & set(token) - {"kind", "layers", "heads"}
    assert same >= {"width", "mlp_ratio", "patch", "vision_layers", "lora.rank", "dtype", "remat"}
    for name in same:
        assert control[name]._replace(valid=None) == token[name]._replace(valid=None)
    assert (control["heads"].default, token["heads"].default) == (1, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": "ppo"}, "'problem' is None, but must be one of 'control'.*changelog"),
        ({"problem": "control", "stages": ("sft",)}, "'stages' is .'sft',., but must be"),
        ({"problem": "task", "stages": ("sft", "sft")}, "without duplicates"),
        (
            {"problem": "control", "stages": ("ppo",), "ppo": {"minibatches": 4}},
            "'ppo.minibatches' of an earlier version is now 'ppo.num_minibatches'",
        ),
        (
            {"problem": "task", "stages": ("grpo",), "rl": {"group": 4, "questions": 8}},
            "'rl.group' of an earlier version is now '<stage>.num_completions'",
        ),
        (
            {"problem": "control", "stages": ("ppo",), "devices": 1},
            "'devices' of an earlier version is now 'mesh.data'",
        ),
    ],
)
def test_old_dialects_are_answered_with_the_new_names(config, message):
    with pytest.raises(ValueError, match=message):
        problems.make(problems.complete({"env": {"name": "recall"}} | config))
