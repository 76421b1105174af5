"""Tests of the training loop: resuming, recompilation, transfers, meshes, other platforms."""

import dataclasses
import json
import os
import pathlib
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs, problems, runs
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import control_models, problem
from mmrl_jax.problems.control import Control
from mmrl_jax.rl import normalization
from mmrl_jax.runs import train
from mmrl_jax.training import checkpoint, loop
from mmrl_jax.training.preemption import PreemptionGuard
from tests import live_arrays, processors, tiny


def stage_of(config, devices: int = 1) -> loop.Stage:
    config.mesh.data = devices
    return problems.make(config).stage(config.stages[-1])


def toy(update=lambda n, w: {}, **changes) -> loop.Stage:
    """A stage that counts: its parameters are the updates done. It compiles in no time.

    `update` gets n, the number of the update, from 1 on, and may return other metrics, or another
    'w' for the parameters.
    """

    def init() -> loop.Carry:
        learner = LearnerState({"w": jnp.zeros(2)}, (), normalization.init(1), jnp.int32(0))
        return loop.Carry(learner, None, jax.random.PRNGKey(0), jnp.int32(0))

    def step(carry: loop.Carry, data: None) -> tuple:
        n, w = carry.updates + 1, carry.learner.params["w"] + 1
        logged = {"loss/total": 1.0 / n, "optimizer/steps": 1.0, "optimizer/skipped_steps": 0.0}
        logged = jax.tree.map(jnp.float32, logged) | update(n, w)
        learner = carry.learner.replace(params={"w": logged.pop("w", w)})
        return carry.replace(learner=learner, updates=n), logged

    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = {
        "name": "toy",
        "init": init,
        "update": step,
        "constants": None,
        "num_updates": 4,
        "updates_per_dispatch": 1,
        "env_steps_per_update": 0,
        "samples_per_update": 1,
        "evaluate": None,
        "eval_interval": 2,
        "checkpoint_interval": 100,
        "max_to_keep": 2,
        "best_metric": None,
        "console": (),
        "shardings": lambda carry: jax.tree.map(lambda _: one_device, carry),
    }
    return loop.Stage(**(arguments | changes))


def run(stage: loop.Stage, workdir, **arguments) -> loop.Result:
    return loop.run(stage, workdir=workdir, config={"seed": 0}, **arguments)


def stored(workdir, which) -> tuple[float, int]:
    """Returns the parameter in a checkpoint of a toy stage, and its step."""
    like = {"learner/params": {"w": jnp.zeros(2)}}
    parts, step = checkpoint.restore_parts(workdir, like, which=which)
    return float(parts["learner/params"]["w"][0]), step


def rows(workdir) -> list[dict]:
    return metrics.read_jsonl(workdir / "metrics.jsonl")


def claim(config, workdir) -> None:
    """Claims a directory for a run and releases its lock."""
    with runs.claim(problems.make(config), workdir):
        pass


def kill() -> dict:
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


def killing_evaluation():
    """Returns an evaluation that kills the run in its second call, the first after an update."""
    calls = []

    def evaluate(learner) -> dict:
        calls.append(learner)
        return kill() if len(calls) == 2 else {}

    return evaluate


def bitwise_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# Other tests train such models faster: test_vlm_policy.py, test_control_encoders.py, and
# `test_two_plus_two_updates_are_four`.
SLOW = (
    "reach_ppo",
    "reach_bc",
    "reach_vlm",
    "reach_minilm",
    "reach_ppo_scratch",
    "locomotion_ppo",
    "pixels_ppo",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in tiny.CONFIGS],
)
def test_every_config_trains(name, tmp_path):
    config = tiny.config(name)
    if config.model.kind == "vlm":
        config.model.checkpoint = processors.save_model("smolvlm", tmp_path / "model")
    trained = train(config, tmp_path)
    result = trained.last
    assert result.updates == 4 and not result.interrupted
    last = rows(tmp_path)[-1]
    assert last["progress/updates"] == 4 and np.isfinite(last["loss/total"])
    # Only an environment of our own knows success; of the others it is not claimed to be 0.
    score = "success" if config.env.name in envs.NAMES else "return"
    assert ("eval/train/success" in last) == (score == "success")
    assert last["eval/train/return_lo"] <= last["eval/train/return_hi"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    ends = {f"final/train/{score}{end}" for end in ("", "_lo", "_hi")}
    assert set(summary) == ends | {"wall_s", "compile_s", "env_steps", "env_steps_per_s"}
    assert summary[f"final/train/{score}"] == last[f"eval/train/{score}"]
    # 4 updates of 8 environments for 4 steps; those that only reset are not counted.
    resets = 128 - summary["env_steps"] if config.stages[-1] == "ppo" else 0
    assert 0 <= resets <= 8 * 4
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())
    # The parameters have moved from where they started.
    made, key = trained.problem, problem.stream(config, problem.PARAMETERS)
    fresh = control_models.init_params(made.network, made.env, config.model, key)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), fresh, result.carry.learner.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.parametrize(
    ("name", "devices", "changes"),
    [
        ("reach_ppo", 1, {}),
        ("mlp_ppo", 8, tiny.FAST),
        # With everything that an algorithm has beside the policy.
        ("deep_sea_rnd", 2, {"rnd__entropy_target": 0.5}),
        (
            "recall_ppo",  # Actor and critic share its trunk.
            1,
            {
                "ppo__desired_kl": 0.01,
                "ppo__optimizer": {"learning_rate": 1e-3},
                "ppo__popart": True,
                "ppo__advantage_scaling": "percentile",
                "ppo__gradient_surgery": "pcgrad",
            },
        ),
    ],
)
def test_two_plus_two_updates_are_four(name, devices, changes, tmp_path):
    # A linear schedule depends on where the run ends, so that 2 updates are no half of 4.
    config = tiny.config(name, mesh__data=devices, last__optimizer__schedule="constant", **changes)
    last = config[config.stages[-1]]
    whole = train(config, tmp_path / "whole")
    with live_arrays.shares_of_runs() as shares:
        last.num_updates = 2
        train(config, tmp_path / "parts")
        last.num_updates = 4
        parts = train(config, tmp_path / "parts")
    if name == "reach_ppo":  # The other carry is smaller than its environment's constants.
        assert {stage for stage, _ in shares} == {"bc", "ppo"}
        assert max(share for _, share in shares) <= 1.1, shares
    assert parts.last.updates == 4
    bitwise_equal(whole.last.carry, parts.last.carry)
    placed = parts.last.carry.env_state.reward.sharding
    assert len(placed.device_set) == devices


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    runs = [
        train(tiny.config("reach_ppo_scratch", seed=s), tmp_path / n).last.carry.learner.params
        for n, s in (("a", 3), ("b", 3), ("c", 4))
    ]
    bitwise_equal(runs[0], runs[1])
    with pytest.raises(AssertionError):
        bitwise_equal(runs[0], runs[2])


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    config = tiny.config("reach_ppo_scratch")
    whole = train(config, tmp_path / "whole")
    stage = stage_of(config)
    killed = loop.run(
        dataclasses.replace(stage, evaluate=killing_evaluation()),
        workdir=tmp_path / "killed",
        config=config,
    )
    assert killed.interrupted and killed.updates == 2
    resumed = train(config, tmp_path / "killed")
    assert resumed.last.updates == 4
    bitwise_equal(whole.last.carry, resumed.last.carry)


def test_the_best_evaluated_update_can_be_restored(tmp_path):
    # Evaluated after updates 2, 4, 6, 8 and 9; checkpoints are due after 5 only, and at the end.
    scores = {2: 0.1, 4: 0.9, 6: 0.2, 8: 0.3, 9: 0.4}
    stage = toy(
        num_updates=9,
        checkpoint_interval=5,
        evaluate=lambda learner: {"eval/train/return": scores[int(learner.params["w"][0])]},
        best_metric="eval/train/return",
    )
    run(stage, tmp_path)
    assert stored(tmp_path, "best") == (4.0, 4)
    assert stored(tmp_path, "latest") == (9.0, 9)


def test_a_fresh_stage_is_evaluated_before_its_first_update(tmp_path):
    evaluated = []

    def evaluate(learner):
        evaluated.append(int(learner.params["w"][0]))
        return {"eval/train/return": 9.0 - evaluated[-1]}

    stage = toy(evaluate=evaluate, best_metric="eval/train/return")
    run(stage, tmp_path)
    first, *others = rows(tmp_path)
    expected = {"step": 0, "progress/updates": 0, "progress/env_steps": 0, "time/wall_s": 0}
    assert first.items() >= (expected | {"eval/train/return": 9}).items()
    assert not any(name.startswith(("loss/", "optimizer/")) for name in first)
    assert [row["step"] for row in others] == [1, 2, 3, 4]
    # 9 before the first update is better than 7 and 5, but has no checkpoint.
    assert stored(tmp_path, "best") == (2.0, 2)
    run(dataclasses.replace(stage, num_updates=5), tmp_path)
    assert evaluated == [0, 2, 4, 5]
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_run_killed_before_its_first_checkpoint_gives_the_same_rows_again(tmp_path):
    class Killed(BaseException):
        pass

    def evaluate(learner):
        n = int(learner.params["w"][0])
        if n == 2 and not killed:
            killed.append(n)
            raise Killed
        return {"eval/train/return": float(n)}

    killed = []
    with pytest.raises(Killed):
        run(toy(evaluate=evaluate), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]
    run(toy(evaluate=evaluate), tmp_path)
    logged = {row["step"]: row.get("eval/train/return") for row in rows(tmp_path)}
    assert logged == {0: 0, 1: None, 2: 2, 3: None, 4: 4} and len(rows(tmp_path)) == 5


def test_alarms_do_not_see_what_nothing_was_learned_before(tmp_path):
    # Images are of no use at step 0 either; two evaluations of what has learned tell.
    blind = {"eval/train/accuracy_lo": 0.1, "eval/train/shuffled_image/accuracy": 0.2}
    stage = toy(evaluate=lambda _: blind)
    run(dataclasses.replace(stage, num_updates=2), tmp_path)
    run(dataclasses.replace(stage, num_updates=3), tmp_path)
    told = {row["step"]: row.get("alarm/images_unused") for row in rows(tmp_path)}
    assert told == {0: None, 1: None, 2: None, 3: 1}


def skipping(*numbers):
    """Returns metrics of updates with one optimizer step each, skipped in the given updates."""

    def update(n, w):
        skipped = jnp.isin(n, jnp.array(numbers)).astype(jnp.float32)
        loss = jnp.where(skipped > 0, jnp.nan, 1.0 * n)
        return {
            "loss/total": loss,
            "optimizer/steps": 1 - skipped,
            "optimizer/skipped_steps": skipped,
        }

    return update


@pytest.mark.parametrize(
    "update",
    [
        lambda n, w: {"w": w + jnp.where(n == 5, jnp.array([0.0, jnp.nan]), 0.0)},
        skipping(4, 6),
    ],
    ids=["parameter", "skipped"],
)
def test_a_run_that_diverged_is_not_saved(update, tmp_path):
    # In the dispatch of updates 4 to 6.
    stage = toy(update, num_updates=9, updates_per_dispatch=3, checkpoint_interval=1)
    with pytest.raises(FloatingPointError, match=r"'toy' diverged in updates 4 to 6.*fresh workd"):
        run(stage, tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [3]
    # What led to it can be looked at.
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]


def test_few_skipped_steps_are_counted_and_do_no_harm(tmp_path):
    run(toy(skipping(4), num_updates=6, updates_per_dispatch=3), tmp_path)
    first, second = rows(tmp_path)
    assert (first["optimizer/skipped_steps"], first["loss/total"]) == (0, 2)
    # Means over the updates 4, 5 and 6, and of the loss over 5 and 6.
    assert second["optimizer/skipped_steps"] == pytest.approx(1 / 3) and second["loss/total"] == 5.5


def test_only_episode_metrics_may_have_nothing_to_report(tmp_path):
    def update(n, w):
        values = {"episode/return": 5.0, "episode/length": jnp.nan, "rollout/reward": 5.0}
        return {name: jnp.where(n == 1, jnp.nan, x) for name, x in values.items()}

    # Update 1 says nothing, update 2 says 5, and no episode's length is known.
    run(toy(update, num_updates=2, updates_per_dispatch=2), tmp_path)
    (row,) = rows(tmp_path)
    assert row["episode/return"] == 5 and "episode/length" not in row
    assert row["rollout/reward"] is None


def test_a_sigterm_in_the_last_update_is_not_lost(tmp_path, monkeypatch):
    result = run(toy(evaluate=killing_evaluation(), eval_interval=4), tmp_path / "toy")
    assert result.interrupted and result.updates == 4
    assert stored(tmp_path / "toy", "latest") == (4.0, 4)
    # After the warm start no PPO begins.
    make = Control.stage

    def killed(*arguments, **keywords) -> loop.Stage:
        stage = make(*arguments, **keywords)
        return dataclasses.replace(stage, evaluate=killing_evaluation(), eval_interval=4)

    monkeypatch.setattr(Control, "stage", killed)
    config = tiny.config(stages=("bc", "ppo"))
    trained = train(config, tmp_path / "run")
    assert trained.interrupted and list(trained.results) == ["bc"] and trained.last.updates == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_sigterm_during_the_compile_stops_before_the_first_update(tmp_path, monkeypatch):
    # Tracing calls the update.
    stage = toy(lambda n, w: kill())
    monkeypatch.setattr(Control, "stage", lambda *_, **__: stage)
    trained = train(tiny.config("reach_ppo_scratch"), tmp_path)
    assert trained.interrupted and trained.last.updates == 0
    assert not (tmp_path / "learning_curves.png").exists()


def test_the_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with PreemptionGuard() as terminated:
        assert not terminated()
        os.kill(os.getpid(), signal.SIGINT)
        assert terminated()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stage_ends_where_it_should_whatever_the_size_of_its_dispatches(tmp_path):
    run(toy(num_updates=3), tmp_path)
    # From 3 on in dispatches of 3: to 6, and one of 1 to 7.
    result = run(toy(num_updates=7, updates_per_dispatch=3), tmp_path)
    assert result.updates == 7 and float(result.carry.learner.params["w"][0]) == 7
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 6, 7]


def test_a_finished_stage_compiles_nothing(tmp_path):
    run(toy(), tmp_path)

    def never(n, w):
        raise AssertionError("traced")

    result = run(toy(never), tmp_path)
    assert result.updates == 4 and float(result.carry.learner.params["w"][0]) == 4
    # With another limit it is not finished, and is compiled.
    with pytest.raises(AssertionError, match="traced"):
        run(toy(never, num_updates=5), tmp_path)


def test_a_learning_rate_that_falls_to_the_end_of_a_run_keeps_its_end(tmp_path):
    linear = tiny.config("mlp_ppo", ppo__optimizer__schedule="linear", **tiny.FAST)
    for updates in (4, 8):  # Nothing is learned yet: the end may still move.
        linear.ppo.num_updates = updates
        claim(linear, tmp_path / "linear")
    (tmp_path / "linear" / "checkpoints" / "6").mkdir(parents=True)
    for updates in (6, 16):
        linear.ppo.num_updates = updates
        with pytest.raises(
            ValueError, match=f"8 there, {updates} now; ppo.optimizer.schedule='lin.*constant"
        ):
            claim(linear, tmp_path / "linear")
    linear.ppo.num_updates, linear.ppo.eval_interval = 8, 3
    claim(linear, tmp_path / "linear")
    constant = tiny.config("mlp_ppo", ppo__optimizer__schedule="constant", **tiny.FAST)
    (tmp_path / "constant" / "checkpoints" / "4").mkdir(parents=True)
    for updates in (4, 8):
        constant.ppo.num_updates = updates
        claim(constant, tmp_path / "constant")
    tokens = tiny.token_config(last__optimizer__schedule="linear")
    assert list(runs.fixed_on_resume(tokens, ["sft", "grpo"])) == [
        "grpo.num_updates",
        "sft.num_updates",  # The variables that it trains are part of those of GRPO.
    ]
    assert not runs.fixed_on_resume(tokens, ["sft"])


def test_counters_go_on_after_a_resume(tmp_path):
    # A quarter of the 16 steps of an update only reset.
    changes = {"env_steps_per_update": 16, "updates_per_dispatch": 2}
    valid = {"rollout/valid_fraction": jnp.float32(0.75)}
    first = run(toy(lambda n, w: valid, **changes), tmp_path)
    second = run(toy(lambda n, w: valid, num_updates=8, **changes), tmp_path)
    again = run(toy(lambda n, w: valid, num_updates=8, **changes), tmp_path)
    assert first.counters.env_steps == 4 * 12 and first.earlier_s == 0
    assert [row["progress/env_steps"] for row in rows(tmp_path)] == [24, 48, 72, 96]
    assert second.counters.env_steps == again.counters.env_steps == 96
    # Both processes compiled.
    assert second.counters.compile_s > first.counters.compile_s > 0
    assert second.wall_s > first.wall_s > 0
    # What the first spent, up to its last checkpoint, is in what the second knows of.
    assert 0 < second.earlier_s <= first.counters.total_s < second.counters.total_s
    assert again.wall_s == second.wall_s and again.counters.compile_s == second.counters.compile_s
    assert again.earlier_s == again.counters.total_s <= second.counters.total_s


def test_a_limit_of_time_ends_a_stage_with_an_evaluation(tmp_path, capsys):
    stage = toy(
        num_updates=10**6, evaluate=lambda _: {"eval/train/return": 1.0}, eval_interval=10**6
    )
    result = run(stage, tmp_path, max_seconds=1e-9)
    assert result.updates == 1 and not result.interrupted
    assert rows(tmp_path)[-1]["eval/train/return"] == 1.0
    assert stored(tmp_path, "latest") == (1.0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "toy: compiling ..." and lines[1].startswith("toy: compiled in ")
    # Time is what ended it, not one update of a million.
    assert "100 % 0:00/0:00, update 1" in lines[3]
    # Again it has nothing to do.
    assert run(stage, tmp_path, max_seconds=1e-9).updates == 1


def test_nothing_recompiles_and_nothing_is_transferred():
    stage = stage_of(tiny.config("reach_ppo_scratch"))
    carry, shardings = loop.start(stage)
    traces = []
    counted = loop.make_dispatch(
        lambda c, d: (traces.append(1), stage.update(c, d))[1], 1, shardings
    )
    carry, _ = counted(carry, stage.constants)
    traced = len(traces)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            carry, metrics = counted(carry, stage.constants)
            jax.block_until_ready(metrics)
    assert len(traces) == traced
    assert counted._cache_size() == 1


def test_the_carry_is_donated():
    stage = stage_of(tiny.config("reach_ppo_scratch"))
    carry, shardings = loop.start(stage)
    loop.make_dispatch(stage.update, 1, shardings)(carry, stage.constants)
    assert all(x.is_deleted() for x in jax.tree.leaves(carry.learner.params))


@pytest.mark.slow
def test_eight_devices_start_and_draw_as_one():
    """Environment i is the same environment on every mesh: states, observations, actions."""
    config = tiny.config("reach_ppo_scratch")
    outcomes = []
    for devices in (1, 8):
        stage = stage_of(config, devices)
        carry, shardings = loop.start(stage)
        outcomes.append(jax.device_get(carry.env_state))
        assert len(carry.env_state.reward.sharding.device_set) == devices
        carry, metrics = loop.make_dispatch(stage.update, 2, shardings)(carry, stage.constants)
        outcomes.append(jax.device_get((carry.learner.params, metrics)))
    bitwise_equal(outcomes[0], outcomes[2])
    chex.assert_trees_all_close(outcomes[1], outcomes[3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["reach_ppo_scratch", "recall_ppo", "reach_bc"])
def test_the_whole_update_lowers_for_accelerators(name):
    config = tiny.config(name)
    stage = stage_of(config)
    carry = jax.eval_shape(stage.init)
    for platform in ("tpu", "cuda"):
        exported = jax.export.export(jax.jit(stage.update), platforms=[platform])(
            carry, stage.constants
        )
        assert exported.platforms == (platform,)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny.config(
        "reach_ppo_scratch", ppo__optimizer__learning_rate=1e30, ppo__optimizer__max_grad_norm=1e30
    )
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(config, tmp_path)
    assert checkpoint.saved_steps(tmp_path) == []


def test_a_workdir_of_another_config_is_refused(tmp_path):
    train(tiny.config("reach_ppo_scratch"), tmp_path)
    with pytest.raises(ValueError, match=r"ppo\.clip.*0\.2.*0\.1"):
        train(tiny.config("reach_ppo_scratch", ppo__clip=0.1), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"model__patch": 5}, "model.patch=5"),
        ({"model__heads": 3}, "model.heads=3"),
        ({"ppo__num_minibatches": 5}, "ppo.num_minibatches=5"),
        ({"mesh__data": 9}, "mesh.data=9"),
        ({"mesh__data": 8, "ppo__num_envs": 12, "ppo__unroll_length": 2}, "ppo.num_envs = 12"),
        ({"ppo__updates_per_dispatch": 0}, "ppo.updates_per_dispatch"),
        ({"env__split": "heldout_colours"}, "heldout_colours"),
        ({"env__height": 0}, "env.height=0"),
        (
            {"model__kind": "mlp"},
            "model.kind='mlp' does not use model.attention='auto', model.aux",
        ),
        ({"model__auxiliary": (("place", 2),)}, "names 'place' of shape"),
        ({"model__auxiliary": (("target_place", 1),)}, r"'target_place' of shape \(1,\)"),
        ({"model__auxiliary": ("target_place",)}, "must have pairs"),
        ({"model__pointing": "goal"}, "names 'goal'"),
        ({"mesh__data": 8, "bc__batch_size": 12}, "bc.batch_size = 12"),
        ({"mesh__data": 8, "ppo__num_minibatches": 8}, "the minibatch .* = 4"),
        ({"ppo__clip": -0.1}, "ppo.clip"),
        ({"ppo__clip": "wide"}, "ppo.clip"),
        ({"stages": ("dpo",)}, "'stages' is"),
        ({"seed": -1}, "seed"),
        ({"mesh__data": -1}, "mesh.data"),
        ({"stages": ("bc",), "bc__num_updates": 0}, "'bc.num_updates' is 0"),
        ({"env__name": "language_rech"}, "Did you mean 'language_reach'"),
        ({"env__name": "brax:antt"}, "Did you mean 'brax:ant'"),
        ({"env__name": "recall", "env__options": {}}, "no scripted expert"),
        ({"env__history": 0}, "env.history"),
        ({"env__height": 16.0}, "env.height"),
        ({"env__width": 20}, "env.width=20"),
        ({"env__options": {"reward": "danse"}}, "reward='danse'"),
        ({"env__options": {"rewards": "dense"}}, "Did you mean 'reward'"),
        ({"env__options": {"episode_length": 8}}, "episode_length=8"),
        ({"model__kind": "transformer"}, "model.kind"),
        ({"model__width": 18}, "model.width=18"),
        ({"model__layers": 0}, "model.layers"),
        ({"model__patch_margin": -1}, "model.patch_margin"),
        ({"model__film": 1}, "model.film"),
        ({"model__dtype": "float8"}, "model.dtype"),
        ({"model__pointing": 3}, "model.pointing"),
        ({"bc__episodes": 0}, "bc.episodes"),
        ({"bc__expert__undershoot": 1.5}, "bc.expert.undershoot"),
        ({"bc__expert__gain": 0.0}, "bc.expert.gain"),
        ({"bc__expert__gian": 1.0}, "Did you mean 'bc.expert.gain'"),
        ({"bc__optimizer__learning_rate": 0.0}, "bc.optimizer.learning_rate"),
        ({"bc__updates_per_dispatch": -1}, "bc.updates_per_dispatch"),
        ({"ppo__discount": 1.01}, "ppo.discount"),
        ({"ppo__gae_lambda": float("nan")}, "ppo.gae_lambda"),
        ({"ppo__optimizer__schedule": "cosinus"}, "ppo.optimizer.schedule"),
        ({"ppo__value_clip": 0.0}, "ppo.value_clip"),
        ({"ppo__target_kl": -0.1}, "ppo.target_kl"),
        ({"ppo__num_epochs": 0}, "ppo.num_epochs"),
        ({"ppo__num_envs": True}, "ppo.num_envs"),
        ({"ppo__clp": 0.1}, "Did you mean 'ppo.clip'"),
        ({"run__eval_episodes": 0}, "run.eval_episodes"),
        ({"run__max_to_keep": 0}, "run.max_to_keep"),
    ],
)
def test_impossible_configs_are_refused_before_any_compile(override, message, tmp_path):
    config = tiny.config()
    for key, value in override.items():
        *groups, field = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        with node.unlocked(), node.ignore_type():
            node[field] = value
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        train(config, pathlib.Path(tmp_path) / "never")
    assert not (tmp_path / "never").exists()
