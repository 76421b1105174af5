"""Mistakes of a newcomer at the command line and in Python, each with a message that helps."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import mmrl_jax
from mmrl_jax import config as config_lib
from mmrl_jax import problems, runs, workdir
from mmrl_jax.commands import common, evaluate
from mmrl_jax.training.checkpoint import Checkpointer
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


def overrides_are_refused(config, *arguments):
    return str(
        pytest.raises(
            ValueError,
            config_lib.validate_overrides,
            ["train", *arguments],
            problems.with_env_options(config),
            elsewhere=lambda key: problems.elsewhere(config, key),
        ).value
    )


def test_every_option_of_an_environment_can_be_set(tmp_path):
    config = mmrl_jax.get_config("pixels_ppo")
    assert "fovy" not in config.env.options
    # The config of the run has those options alone that are set.
    extended = problems.with_env_options(config, {"env.options.fovy", "ppo.clip"})
    assert set(extended.env.options) - set(config.env.options) == {"fovy"}
    assert "'env.options.fovy'" in overrides_are_refused(config, "--config.env.options.fovi=30")
    # Keys that decide which others there are come before the others get their defaults.
    deciding = config_lib.loading.override_values(
        ["train", "--config=x", "--config.env.name=recall", "--config.stages", "('bc', 'ppo')"],
        problems.DECIDING,
    )
    assert deciding == {"env": {"name": "recall"}, "stages": ("bc", "ppo")}
    completed = problems.complete(config, {"bc": {"num_updates": 7}}, deciding)
    assert completed.bc.num_updates == 7 and completed.env.name == "recall"
    # The command completes a config that is a plain dictionary, before it reads the override.
    path = tmp_path / "mine.py"
    values = {
        "problem": "control", "stages": ("ppo",), "model": {"kind": "multimodal"},
        "env": {"name": "brax:reacher"},
    }  # fmt: skip
    path.write_text(f"def get_config():\n    return {values!r}\n")
    result = subprocess.run(
        [
            sys.executable, "-m", "experiments.train", f"--config={path}",
            f"--workdir={tmp_path / 'run'}", "--config.env.options.fovy=300",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stderr == "error: fovy=300.0 must be an angle between 0 and 180 degrees.\n"
    assert result.returncode == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mlp_ppo", "count_grpo"])
def test_an_option_that_is_none_can_be_set(name, tmp_path):
    stage = name.rpartition("_")[2]
    none = {"mlp_ppo": ["target_kl=0.5"], "count_grpo": ["importance_weight_cap=2"]}[name]
    set_to = [*none, "optimizer.skip_spikes=6", "rollback.max_kl=0.3", "entropy_target=0.5"]
    result = subprocess.run(
        [
            sys.executable, "-m", "experiments.train", f"--config={name}",
            f"--workdir={tmp_path / 'run'}", "--config.run.eval_episodes=-1",
            *(f"--config.{stage}.{x}" for x in set_to),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    # Of all values, the last one alone is invalid.
    assert result.stderr.startswith("error: Config key 'run.eval_episodes' is -1, but must be")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("reach_ppo", "--config.ppo.gamma=1", "'ppo.gamma', which is 'ppo.discount' here: Disc"),
        (
            "reach_ppo",
            "--config.ppo.num_timesteps=1",
            "'ppo.num_updates' here, in updates",
        ),
        ("reach_ppo", "--ppo.clip=1", "'--ppo.clip=1' sets no key .* --config.ppo.clip=VALUE"),
        ("count_grpo", "--config.grpo.beta=1", "which is 'grpo.kl_coef' here"),
        ("count_grpo", "--config.grpo.lr=1", "which is 'grpo.optimizer.learning_rate' here"),
        ("count_grpo", "--config.grpo.num_generations=2", "which is 'grpo.num_completions' here"),
        (
            "folder_grpo",
            "--config.grpo.max_completion_length=9",
            "'dataset.completion_tokens' here",
        ),
        ("count_grpo", "--config.pixelation=1", "Unknown config key 'pixelation'.$"),
    ],
)
def test_names_of_other_libraries_are_translated(name, argument, message):
    assert re.search(message, overrides_are_refused(mmrl_jax.get_config(name), argument))


def test_a_directory_without_a_checkpoint_belongs_to_no_config(tmp_path):
    settings = {"keep": 1, "best_metric": None, "save_interval": 1}
    for config in ({"clip": 0.1}, {"clip": 0.2}):
        with Checkpointer(tmp_path, config=config, **settings):
            assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"probes": ("modality_share",)}, "did you mean 'modality_shares'"),
        ({"loggers": ("wandb",)}, "'wandb', which is not installed: pip install wandb"),
    ],
)
def test_what_a_run_cannot_use_is_refused_before_it_begins(run, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # An import of it fails.
    problem = problems.make(tiny.config("mlp_ppo", run=run))
    with pytest.raises(ValueError, match=message):
        runs.claim(problem, tmp_path / "run")
    with pytest.raises(ValueError, match="--accept_changes=recrods: only"):
        runs.claim(problems.make(tiny.config("mlp_ppo")), tmp_path / "run", accept=("recrods",))
    assert not (tmp_path / "run").exists()


def test_mistakes_with_a_trained_run(tmp_path):
    config = tiny.config("mlp_ppo", last__num_updates=2)
    trained = mmrl_jax.train(config, tmp_path)
    assert repr(trained) == "Trained(updates={'ppo': 2}, interrupted=False)"
    loaded = mmrl_jax.load(tmp_path)
    assert repr(loaded).startswith("Loaded(stage='ppo', step=2, splits=('train',")
    for episodes in (-3, 0, 1):
        with pytest.raises(ValueError, match=f"episodes={episodes}, but an interval needs"):
            loaded.evaluate("train", episodes=episodes)
    with pytest.raises(ValueError, match="control policy, which completes no prompts"):
        loaded.generate(["a"], [])
    fewer = tiny.config("mlp_ppo", last__num_updates=1)
    with pytest.raises(ValueError, match="ppo.num_updates=1, .* has completed 2 updates"):
        runs.claim(problems.make(fewer), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ppo"]["num_updates"] == 2


def test_a_stage_that_has_not_begun_names_the_one_that_has(tmp_path):
    config = tiny.config("reach_ppo")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    with pytest.raises(ValueError, match=r"The stage 'ppo' .* has no checkpoint yet\.$"):
        mmrl_jax.load(tmp_path)
    (tmp_path / "bc" / "checkpoints" / "125").mkdir(parents=True)
    with pytest.raises(ValueError, match="The stage 'bc' has one at update 125: give .*bc"):
        mmrl_jax.load(tmp_path)


def test_mistakes_in_python(tmp_path):
    with pytest.raises(ValueError, match=r"give mmrl_jax.get_config\('reach_ppo'\)"):
        mmrl_jax.train("reach_ppo", tmp_path)
    with pytest.raises(ValueError, match="write nested dictionaries"):
        mmrl_jax.get_config("reach_ppo", {"ppo.num_updates": 20})
    assert {"get_config", "train", "load"} <= set(dir(mmrl_jax))


def test_a_second_ctrl_c_ends_a_command_without_a_traceback(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.app, "run", interrupt)
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        common.run_command(evaluate.main)
    assert ended.value.code == 130


def test_a_bucket_without_its_packages_is_named_before_anything_is_written(monkeypatch):
    def is_dir(self):
        raise ImportError("no gcsfs")

    monkeypatch.setattr(type(workdir.as_path("gs://b/run")), "is_dir", is_dir)
    with pytest.raises(ValueError, match=r"gs://b/run .*no gcsfs.*pip install gcsfs"):
        workdir.saved_steps("gs://b/run")


def test_a_row_without_an_interval_is_printed():
    assert evaluate._format_row({"accuracy": 0.25}) == "accuracy    0.250"
