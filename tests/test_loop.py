"""The compiled loop as a whole: resume, recompilation, transfers, meshes, other platforms."""

import json
import os
import pathlib
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train import train
from mmrl_jax.training import factory, loop
from tests import tiny


def stage_of(config, devices: int = 1) -> loop.Stage:
    config.devices = devices
    return factory.ppo_stage(config, factory.make_mesh(config))


def start(stage: loop.Stage) -> tuple:
    fresh = stage.init()
    shardings = stage.shardings(fresh)
    return loop.place(fresh, shardings), shardings


def bitwise_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_config_trains(name, tmp_path):
    config = tiny.config(name)
    trained = train(config, tmp_path)
    result = trained.warm_start if config.algorithm == "bc" else trained.ppo
    assert result.updates == 4 and not result.interrupted
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["progress/updates"] == 4
    assert np.isfinite(lines[-1]["loss/total"])
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())
    # The parameters have moved from where they started.
    fresh = factory.fresh_learner(config, factory.make_env(config), factory.adam(1.0, 1.0))
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), fresh.params, result.carry.learner.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_two_plus_two_updates_are_four(tmp_path):
    # A linear schedule depends on where the run ends, so that 2 updates are no half of 4.
    whole = train(tiny.config(ppo__schedule="constant"), tmp_path / "whole")
    train(tiny.config(ppo__schedule="constant", run__updates=2), tmp_path / "parts")
    parts = train(tiny.config(ppo__schedule="constant"), tmp_path / "parts")
    assert parts.ppo.updates == 4
    bitwise_equal(whole.ppo.carry, parts.ppo.carry)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    runs = [
        train(tiny.config("reach_ppo_scratch", seed=s), tmp_path / n).ppo.carry.learner.params
        for n, s in (("a", 3), ("b", 3), ("c", 4))
    ]
    bitwise_equal(runs[0], runs[1])
    with pytest.raises(AssertionError):
        bitwise_equal(runs[0], runs[2])


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    config = tiny.config("reach_ppo_scratch")
    whole = train(config, tmp_path / "whole")
    stage = stage_of(config)
    asked = []

    def evaluate_then_kill(learner):
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(learner)
        return {}

    killed = loop.run(
        loop.dataclasses.replace(stage, evaluate=evaluate_then_kill),
        workdir=tmp_path / "killed",
        config=config,
    )
    assert killed.interrupted and killed.updates == 2
    resumed = train(config, tmp_path / "killed")
    assert resumed.ppo.updates == 4
    bitwise_equal(whole.ppo.carry, resumed.ppo.carry)


def test_nothing_recompiles_and_nothing_is_transferred():
    stage = stage_of(tiny.config("reach_ppo_scratch"))
    carry, shardings = start(stage)
    traces = []
    counted = loop.make_dispatch(
        lambda c, d: (traces.append(1), stage.update(c, d))[1], 1, shardings
    )
    carry, _ = counted(carry, None)
    traced = len(traces)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            carry, metrics = counted(carry, None)
            jax.block_until_ready(metrics)
    assert len(traces) == traced
    assert counted._cache_size() == 1


def test_the_carry_is_donated():
    stage = stage_of(tiny.config("reach_ppo_scratch"))
    carry, shardings = start(stage)
    loop.make_dispatch(stage.update, 1, shardings)(carry, None)
    assert all(x.is_deleted() for x in jax.tree.leaves(carry.learner.params))


def test_eight_devices_start_and_draw_as_one():
    """Environment i is the same environment on every mesh: states, observations, actions."""
    config = tiny.config("reach_ppo_scratch")
    outcomes = []
    for devices in (1, 8):
        stage = stage_of(config, devices)
        carry, shardings = start(stage)
        outcomes.append(jax.device_get(carry.env_state))
        assert len(carry.env_state.reward.sharding.device_set) == devices
        carry, metrics = loop.make_dispatch(stage.update, 2, shardings)(carry, None)
        outcomes.append(jax.device_get((carry.learner.params, metrics)))
    bitwise_equal(outcomes[0], outcomes[2])
    chex.assert_trees_all_close(outcomes[1], outcomes[3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_whole_update_lowers_for_accelerators(platform):
    stage = stage_of(tiny.config("reach_ppo_scratch"))
    carry = jax.eval_shape(stage.init)
    step = jax.jit(lambda c: stage.update(c, None))
    exported = jax.export.export(step, platforms=[platform])(carry)
    assert exported.platforms == (platform,)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny.config("reach_ppo_scratch", ppo__learning_rate=1e30, ppo__max_grad_norm=1e30)
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(config, tmp_path)


def test_a_workdir_of_another_config_is_refused(tmp_path):
    train(tiny.config("reach_ppo_scratch"), tmp_path)
    with pytest.raises(ValueError, match=r"ppo\.clip.*0\.2.*0\.1"):
        train(tiny.config("reach_ppo_scratch", ppo__clip=0.1), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"model__patch": 5}, "model.patch=5"),
        ({"model__heads": 3}, "model.heads=3"),
        ({"ppo__minibatches": 5}, "ppo.minibatches=5"),
        ({"devices": 9}, "devices=9"),
        ({"devices": 8, "ppo__num_envs": 12, "ppo__unroll": 2}, "ppo.num_envs=12"),
        ({"run__updates": 5, "run__updates_per_dispatch": 2}, "updates_per_dispatch=2"),
        ({"env__split": "heldout_colours"}, "heldout_colours"),
        ({"env__height": 0}, "env.height=0"),
        ({"ppo__clip": -0.1}, "ppo.clip"),
        ({"ppo__clip": "wide"}, "ppo.clip"),
        ({"algorithm": "dpo"}, "algorithm"),
    ],
)
def test_impossible_configs_are_refused_before_any_compile(override, message, tmp_path):
    config = tiny.config()
    with config.ignore_type():
        for key, value in override.items():
            group, _, field = key.partition("__")
            if field:
                config[group][field] = value
            else:
                config[group] = value
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        train(config, pathlib.Path(tmp_path) / "never")
    assert not (tmp_path / "never").exists()
