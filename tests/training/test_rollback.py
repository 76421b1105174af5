"""Rollbacks of stages that diverge: what is restored, what differs, and resuming afterwards."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import problems
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.reporting import summary
from mmrl_jax.rl import normalization
from mmrl_jax.stability import learning_rate
from mmrl_jax.stability.divergence import RollbackOptions
from mmrl_jax.training import checkpoint, loop, rollback
from mmrl_jax.training.stage import HostUpdate
from tests import tiny
from tests.training.test_loop import bitwise_equal, kill, rows, run, stored, toy

OPTIONS = RollbackOptions(max_retries=3)
STREAM = 2**31  # Added to the number of a rollback, see `rollback.RETRIES`.


def walker(nan=lambda n, scale: False, loss=lambda n: 1.0, on_host=False, **changes):
    """Returns a stage that adds learning rate * normal(fold_in(key, n)) in update n, from 1 on.

    The parameters become NaN in the updates for which `nan`, of their number and of the factor of
    the learning rate, is true.
    """

    def init():
        scale = learning_rate.LearningRateScale(jnp.ones((), jnp.float32))
        learner = LearnerState({"w": jnp.zeros(2)}, scale, normalization.init(1), jnp.int32(0))
        return loop.Carry(learner, None, jax.random.PRNGKey(0), jnp.int32(0))

    def step(carry, data):
        n, learner = carry.updates + 1, carry.learner
        scale = learner.opt_state.scale
        w = learner.params["w"] + scale * jax.random.normal(jax.random.fold_in(carry.rng, n), 2)
        w = jnp.where(nan(n, scale), jnp.nan, w)
        logged = {
            "loss/total": jnp.float32(loss(n)),
            "optimizer/steps": jnp.float32(1),
            "optimizer/skipped_steps": jnp.float32(0),
            "lr": 0.1 * scale,
        }
        return carry.replace(learner=learner.replace(params={"w": w}), updates=n), logged

    def compiled(carry, data):
        metrics = jax.eval_shape(step, carry, data)[1]

        def collect(carry, data):
            batches.append(int(jax.device_get(carry.updates)) + 1)

        learn = jax.jit(lambda carry, data, batch: step(carry, data), donate_argnums=0)
        return HostUpdate(collect, learn, metrics)

    batches = []
    stage = toy(**{"num_updates": 8, "checkpoint_interval": 2, "rollback": OPTIONS} | changes)
    host = {"update": None, "on_host": compiled} if on_host else {"update": step}
    return dataclasses.replace(stage, init=init, **host), batches


def walked(key, scale, first, last):
    steps = [jax.random.normal(jax.random.fold_in(key, n), 2) for n in range(first, last + 1)]
    return scale * np.sum(steps, axis=0)


def fresh(key, *retries):
    for retry in retries:
        key = jax.random.fold_in(key, np.uint32(STREAM + retry))
    return key


def weights(result):
    return jax.device_get(result.carry.learner.params["w"])


def incidents(workdir):
    return [json.loads(line) for line in (workdir / "incidents.jsonl").read_text().splitlines()]


def untimed(row):
    return {name: x for name, x in row.items() if not name.startswith("time/")}


@pytest.mark.parametrize("on_host", [False, True], ids=["traced", "host"])
def test_a_divergence_is_followed_by_a_rollback(on_host, tmp_path, capsys):
    stage, batches = walker(lambda n, scale: (n == 5) & (scale == 1), on_host=on_host)
    result = run(stage, tmp_path)
    assert (result.updates, result.rollbacks) == (8, 1)
    assert summary.totals([result], 0.0)["rollbacks"] == 1
    key = jax.random.PRNGKey(0)
    expected = walked(key, 1.0, 1, 4) + walked(fresh(key, 1), 0.5, 5, 8)
    np.testing.assert_allclose(weights(result), expected, rtol=1e-5)
    (incident,) = incidents(tmp_path)
    assert [incident[x] for x in ("retry", "update", "restored_step")] == [1, 5, 4]
    assert incident["learning_rate"] == pytest.approx(0.05)
    assert incident["metrics"]["loss/total"] == 1 and "a parameter is not fin" in incident["reason"]
    # The row of the discarded update is gone, and is written once.
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 9))
    assert [row.get("optimizer/rollbacks") for row in logged] == [None] * 4 + [1] * 4
    assert [row["lr"] for row in logged] == pytest.approx([0.1] * 4 + [0.05] * 4)
    assert "Rollback 1 of at most 3 to update 4, with 0.5 times" in capsys.readouterr().err
    if on_host:
        assert batches == [1, 2, 3, 4, 5, 5, 6, 7, 8]


def test_what_diverges_each_time_stops_with_the_error_of_today(tmp_path):
    stage, _ = walker(lambda n, scale: n == 5)
    for _ in range(2):  # The same command does not try three times again.
        with pytest.raises(
            FloatingPointError,
            match=r"'toy' diverged in updates 5 to 5, after 3 rollbacks: .*fresh workd",
        ):
            run(stage, tmp_path)
        found = incidents(tmp_path)
        assert [(x["retry"], x["restored_step"]) for x in found] == [(1, 4), (2, 4), (3, 4)]
        assert [x["learning_rate"] for x in found] == pytest.approx([0.05, 0.025, 0.0125])
        assert checkpoint.saved_steps(tmp_path) == [2, 4]
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_before_the_first_interval_the_start_is_restored(tmp_path):
    stage, _ = walker(
        lambda n, scale: (n == 2) & (scale > 0.25),
        checkpoint_interval=100,
        evaluate=lambda learner: {"eval/train/return": -float(jnp.abs(learner.params["w"]).sum())},
        best_metric="eval/train/return",
    )
    result = run(stage, tmp_path)
    expected = walked(fresh(jax.random.PRNGKey(0), 1, 2), 0.25, 1, 8)
    np.testing.assert_allclose(weights(result), expected, rtol=1e-5)
    assert [x["restored_step"] for x in incidents(tmp_path)] == [0, 0]
    assert [row["step"] for row in rows(tmp_path)] == list(range(9))
    # The start has the best evaluation, but no score.
    assert stored(tmp_path, "best")[1] > 0


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved."""


@pytest.mark.parametrize("ending", ["sigterm", "killed"])
def test_a_run_that_is_stopped_after_a_rollback_resumes_bitwise(ending, tmp_path):
    # Checkpoints are due at 4 and 8. The first divergence is in update 6. The run is stopped in
    # update 5 after the rollback, and the second divergence, in 7, goes back to 4, not to 5.
    def diverges(n, scale):
        return ((n == 6) & (scale == 1)) | ((n == 7) & (scale == 0.5))

    def evaluate(learner):
        if learner.opt_state.scale == 0.5 and not stopped:
            stopped.append(True)
            if ending == "killed":
                raise Killed
            kill()
        return {"eval/train/return": 1.0}

    def stage():
        return walker(
            diverges, num_updates=10, checkpoint_interval=4, evaluate=evaluate, eval_interval=5
        )[0]

    stopped = [True]
    whole = run(stage(), tmp_path / "whole")
    assert whole.updates == 10
    stopped.clear()
    if ending == "killed":
        with pytest.raises(Killed):
            run(stage(), tmp_path / "parts")
    else:
        assert run(stage(), tmp_path / "parts").interrupted
    assert len(incidents(tmp_path / "parts")) == 1
    parts = run(stage(), tmp_path / "parts")
    bitwise_equal(whole.carry, parts.carry)
    assert parts.carry.learner.opt_state.scale == 0.25
    found = [incidents(tmp_path / name) for name in ("whole", "parts")]
    for each in (x for lines in found for x in lines):
        each["metrics"], each["counters"] = untimed(each["metrics"]), None
    assert found[0] == found[1]
    assert [x["restored_step"] for x in found[0]] == [4, 4]
    logged = [[untimed(row) for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert logged[0] == logged[1]


def test_a_high_loss_goes_back_to_before_it(tmp_path):
    # From update 13 on the loss is high; the third such row is a divergence. No checkpoint of an
    # update with a high loss is restored, although one is due after each update, also not those of
    # the cool-down, which lasts until update 12 + 20.
    def loss(n):
        return jnp.where(n < 13, 1.0, 5.0)

    stage, _ = walker(loss=loss, num_updates=40, checkpoint_interval=1)
    with pytest.raises(
        FloatingPointError, match="after 3 rollbacks: the absolute loss, now 5, was"
    ):
        run(stage, tmp_path)
    found = [(x["update"], x["restored_step"]) for x in incidents(tmp_path)]
    assert found == [(15, 12), (33, 12), (33, 12)]
    assert checkpoint.saved_steps(tmp_path) == [11, 12]  # None of an update with a high loss.


def test_without_retries_nothing_differs(tmp_path):
    with_off, _ = walker(rollback=RollbackOptions(), checkpoint_interval=100)
    run(with_off, tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [8] and not (tmp_path / "incidents.jsonl").exists()
    directory = tmp_path / "checkpoints"
    assert "watch" not in checkpoint._read_record(directory, 8)["extra"]


def test_the_incidents_of_a_run_without_checkpoints_are_removed(tmp_path):
    (tmp_path / "incidents.jsonl").write_text("{}\n")
    result = run(walker()[0], tmp_path)
    assert (result.updates, result.rollbacks) == (8, 0)
    assert "rollbacks" not in summary.totals([result], 0.0)
    assert (tmp_path / "incidents.jsonl").read_text() == ""


def diverging(config):
    """Returns the last stage of a config, which diverges in update 3 of its first attempt."""
    stage = problems.make(config).stage(config.stages[-1])
    update = stage.update

    def broken(carry, constants):
        carry, metrics = update(carry, constants)
        nan = (carry.updates == 3) & (metrics["lr"] > 0.9 * rate)
        learner = carry.learner
        params = jax.tree.map(lambda x: jnp.where(nan, jnp.nan, x), learner.params)
        return carry.replace(learner=learner.replace(params=params)), metrics

    rate = config[config.stages[-1]].optimizer.learning_rate
    return dataclasses.replace(stage, update=broken)


@pytest.mark.parametrize("kind", ["control", "token"])
def test_both_kinds_of_policies_roll_back_and_resume_bitwise(kind, tmp_path):
    optimizer = {"schedule": "constant", "skip_spikes": 6.0}
    changes = {"last__optimizer": optimizer, "last__rollback": {"max_retries": 1}}
    if kind == "control":
        config = tiny.config("mlp_ppo", mesh__data=8, **changes, **tiny.FAST)
    else:
        config = tiny.token_config(stages=("grpo",), mesh__fsdp=2, **changes)

    def trained(workdir, updates):
        config[config.stages[-1]].num_updates = updates
        may_change = problems.may_change(config)
        return loop.run(diverging(config), workdir=workdir, config=config, may_change=may_change)

    whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "parts", 3)
    parts = trained(tmp_path / "parts", 4)
    bitwise_equal(whole.carry, parts.carry)
    assert learning_rate.scale_of(whole.carry.learner.opt_state) == 0.5
    assert [x["restored_step"] for x in incidents(tmp_path / "whole")] == [2]
    start = problems.make(config).stage(config.stages[-1]).init()
    np.testing.assert_array_equal(whole.carry.rng, fresh(start.rng, 1))
    if kind == "control":  # Later episodes are others too.
        keys = jax.vmap(lambda key: fresh(key, 1))(start.env_state.info["key"])
        np.testing.assert_array_equal(whole.carry.env_state.info["key"], keys)
    assert rollback.read(tmp_path / "whole")[0].learning_rate > 0
