"""Tests of failures of rewards, records, evaluations and reports."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import runs
from mmrl_jax.commands import common
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.problems.control import Control
from mmrl_jax.reporting import report
from mmrl_jax.training import checkpoint, dispatch, loop
from mmrl_jax.training.stage import HostUpdate
from tests import tiny
from tests.training.test_loop import kill, rows, run, stored, toy


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(dispatch, "RETRY_AFTER_S", (0.0, 0.0, 0.0))


def hosted(fail=lambda call, update: None, **changes):
    """The toy stage with an update on the host: parameters grow by what its number draws.

    `fail` is called with the number of the call, from 0 on, and of the update, from 1 on.
    """
    calls = []

    def collect(carry, data):
        update = int(jax.device_get(carry.updates)) + 1
        calls.append(update)
        fail(len(calls) - 1, update)
        return jax.device_put(np.random.default_rng(update).uniform(size=2).astype(np.float32))

    def learn(carry, data, batch):
        learner: LearnerState = carry.learner
        learner = learner.replace(params={"w": learner.params["w"] + batch})
        n = carry.updates + 1
        logged = {
            "loss/total": jnp.float32(n),
            "optimizer/steps": 1.0,
            "optimizer/skipped_steps": 0.0,
        }
        return carry.replace(learner=learner, updates=n), jax.tree.map(jnp.float32, logged)

    def on_host(carry, data):
        metrics = {
            name: jax.ShapeDtypeStruct((), jnp.float32)
            for name in ("loss/total", "optimizer/steps", "optimizer/skipped_steps")
        }
        return HostUpdate(collect, jax.jit(learn, donate_argnums=0), metrics)

    return toy(update=None, on_host=on_host, **changes), calls


def weights(result):
    return jax.device_get(result.carry.learner.params["w"])


def never(update_that_fails, error):
    def fail(call, update):
        if update == update_that_fails:
            raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("no reward"), ValueError("no record")], ids=str)
def test_an_outage_changes_nothing(error, tmp_path, capsys):
    whole = run(hosted(num_updates=6, updates_per_dispatch=3)[0], tmp_path / "whole")

    def fail(call, update):
        if call in (1, 2):  # Of update 2, and of its second try.
            raise error

    stage, calls = hosted(fail, num_updates=6, updates_per_dispatch=3)
    result = run(stage, tmp_path / "outage")
    np.testing.assert_array_equal(weights(result), weights(whole))
    # The same update is retried, and none is skipped.
    assert calls == [1, 2, 2, 2, 3, 4, 5, 6]
    first, second = rows(tmp_path / "outage")
    assert first["optimizer/retries"] == 2 and "optimizer/retries" not in second
    assert capsys.readouterr().err.count(f"is retried: {type(error).__name__}: {error}") == 2


def test_what_fails_each_time_stops_with_all_that_was_learned(tmp_path):
    whole = run(hosted(num_updates=6, updates_per_dispatch=3)[0], tmp_path / "whole")
    stage, calls = hosted(
        never(5, RuntimeError("the judge is away")), num_updates=6, updates_per_dispatch=3
    )
    with pytest.raises(loop.HostFailed, match=r"update 5 failed 4 times: the judge is away\nUpdat"):
        run(stage, tmp_path / "run")
    assert loop.HostFailed in common.FAILURES
    assert calls == [1, 2, 3, 4, 5, 5, 5, 5]
    # In the middle of a dispatch, far from an interval: update 4 is saved and logged.
    assert checkpoint.saved_steps(tmp_path / "run") == [4]
    assert [row["step"] for row in rows(tmp_path / "run")] == [3, 4]
    assert rows(tmp_path / "run")[1]["loss/total"] == 4
    resumed = run(hosted(num_updates=6, updates_per_dispatch=3)[0], tmp_path / "run")
    assert resumed.updates == 6
    np.testing.assert_array_equal(weights(resumed), weights(whole))


def test_at_the_first_update_there_is_nothing_to_save(tmp_path):
    with pytest.raises(loop.HostFailed, match="No update was completed yet"):
        run(hosted(never(1, OSError("gone")))[0], tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [] and rows(tmp_path) == []


def test_a_fault_of_the_code_is_not_tried_again_and_keeps_its_stack(tmp_path):
    stage, calls = hosted(never(3, TypeError("a fault")))
    with pytest.raises(TypeError, match="a fault"):
        run(stage, tmp_path)
    assert calls == [1, 2, 3] and checkpoint.saved_steps(tmp_path) == [2]


def test_a_sigterm_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "RETRY_AFTER_S", (600.0,))

    def fail(call, update):
        if update == 3:
            kill()
            raise RuntimeError("no reward")

    result = run(hosted(fail)[0], tmp_path)
    assert result.interrupted and result.updates == 2
    assert checkpoint.saved_steps(tmp_path) == [2]


def test_an_evaluation_that_fails_does_not_end_a_run(tmp_path, capsys):
    def evaluate(learner):
        n = int(learner.params["w"][0])
        if n in (2, 4):
            raise RuntimeError(f"no reward at {n}")
        return {"eval/train/return": float(n)}

    stage = toy(num_updates=8, evaluate=evaluate, best_metric="eval/train/return")
    assert run(stage, tmp_path).updates == 8
    logged = {row["step"]: row for row in rows(tmp_path)}
    assert "eval/failed" not in logged[1] and logged[2]["eval/failed"] == 1
    assert logged[8]["eval/failed"] == 2 and logged[8]["eval/train/return"] == 8
    assert "eval/train/return" not in logged[4]
    assert stored(tmp_path, "best") == (8.0, 8)
    text = capsys.readouterr().err
    assert "toy: the evaluation at update 2 failed, and the run continues without it: R" in text


def test_reports_that_fail_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no font")

    stage = toy(evaluate=fail)
    monkeypatch.setattr(Control, "stage", lambda *_, **__: stage)
    monkeypatch.setattr(report, "learning_curves", fail)
    config = tiny.config("reach_ppo_scratch")
    trained = mmrl_jax.train(config, tmp_path)
    assert trained.last.updates == 4 and not trained.interrupted
    text = capsys.readouterr().err
    assert "Drawing learning_curves.png failed, and the run continues without it: OSError" in text
    # No evaluation was logged, and the summary has the rest.
    assert "summary.json has no final evaluation" in text
    assert set(json.loads((tmp_path / "summary.json").read_text())) == {
        "wall_s", "compile_s", "env_steps", "env_steps_per_s"
    }  # fmt: skip
    monkeypatch.setattr(runs.summary_lib, "write_json", fail)
    assert mmrl_jax.train(config, tmp_path).last.updates == 4
    assert "Writing summary.json failed" in capsys.readouterr().err
