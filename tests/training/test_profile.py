"""Tests of the traces of a few dispatches."""

import gzip
import json
import pathlib

import jax
import pytest

from mmrl_jax import problems, runs
from mmrl_jax.training import profile
from tests import tiny
from tests.training.test_loop import bitwise_equal, run, toy


def scoped(n, w):
    with jax.named_scope("learning_scope"):
        return {"w": w * 2}


def trace(workdir: pathlib.Path) -> tuple[pathlib.Path, list[dict]]:
    """Returns the directory of the only trace of a stage, and its events."""
    (path,) = (workdir / "profile").glob("plugins/profile/*/*.trace.json.gz")
    return path.parent, json.loads(gzip.open(path).read())["traceEvents"]


def dispatches(workdir: pathlib.Path) -> list[int]:
    """Returns the numbers of completed updates before the dispatches in a trace."""
    steps = (e for e in trace(workdir)[1] if e.get("name") == "dispatch")
    return sorted(int(e["args"]["step_num"]) for e in steps)


def test_it_has_three_dispatches_after_the_first_two(tmp_path, capsys):
    evaluations = {"evaluate": lambda learner: {}, "eval_interval": 4}
    stage = toy(scoped, num_updates=14, updates_per_dispatch=2, **evaluations)
    result = run(stage, tmp_path / "traced", profile=True)
    assert dispatches(tmp_path / "traced") == [4, 6, 8]
    directory, events = trace(tmp_path / "traced")
    modules = {e["args"]["hlo_module"] for e in events if "hlo_module" in e.get("args", {})}
    assert "jit_dispatch" in modules
    assert "the evaluation" in {e.get("name") for e in events}
    (planes,) = directory.glob("*.xplane.pb")  # TensorBoard's file has the program.
    assert b"learning_scope" in planes.read_bytes()
    said = capsys.readouterr().err
    assert f"Open {directory}" in said and "https://ui.perfetto.dev" in said
    assert f"tensorboard --logdir {tmp_path / 'traced' / 'profile'}" in said
    # What is learned is the same, and without the flag nothing is written.
    plain = run(stage, tmp_path / "plain")
    bitwise_equal(result.carry, plain.carry)
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_short_stage_is_traced_from_its_start(tmp_path):
    # The third dispatch has one update, and is compiled after the second one.
    run(toy(num_updates=5, updates_per_dispatch=2), tmp_path / "two", profile=True)
    assert dispatches(tmp_path / "two") == [0, 2]
    run(toy(num_updates=1, updates_per_dispatch=2), tmp_path / "one", profile=True)
    assert dispatches(tmp_path / "one") == [0]


def test_long_dispatches_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "TRACED_S", 0.0)
    run(toy(num_updates=9), tmp_path, profile=True)
    assert dispatches(tmp_path) == [2]


def test_a_resumed_run_does_not_trace_again(tmp_path, capsys):
    run(toy(num_updates=4), tmp_path, profile=True)
    assert dispatches(tmp_path) == [1, 2, 3]
    run(toy(num_updates=8), tmp_path, profile=True)
    assert dispatches(tmp_path) == [1, 2, 3]
    assert f"remove {tmp_path / 'profile'}" in capsys.readouterr().err


def test_a_stage_that_diverges_writes_its_trace(tmp_path):
    stage = toy(lambda n, w: {"w": w / (3 - n)}, num_updates=9)  # 1 / 0 in the third update.
    with pytest.raises(FloatingPointError, match="diverged in updates 3"):
        run(stage, tmp_path, profile=True)
    assert dispatches(tmp_path) == [2]


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path, capsys):
    with jax.profiler.trace(tmp_path / "other"):  # There can be one trace at a time.
        assert run(toy(), tmp_path, profile=True).updates == 4
    said = capsys.readouterr().err
    assert "The profile failed" in said and "already been started" in said
    assert not (tmp_path / profile.DIRECTORY).exists()


def test_every_stage_of_a_run_has_its_trace(tmp_path):
    config = tiny.config("mlp_ppo", **tiny.FAST)
    runs.train(config, tmp_path, profile=True)
    assert dispatches(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("config", "scopes"),
    [
        (
            lambda: tiny.config("recall_ppo"),
            ("rollout/", '"policy/', '"env_step/', "/render/", "learning/advantages", "optimizer/"),
        ),
        (
            tiny.token_config,
            ("rollout/generate", "rollout/rewards", "learning/advantages", "/log_probs"),
        ),
    ],
)
def test_the_parts_of_an_update_are_named(config, scopes):
    problem = problems.make(config())
    stage = problem.stage(problem.config.stages[-1])
    lowered = jax.jit(stage.update).trace(stage.init(), stage.constants).lower()
    text = lowered.as_text(debug_info=True)
    assert [scope for scope in scopes if scope not in text] == []
