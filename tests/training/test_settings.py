"""Tests that common settings of JAX are supported or rejected."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mmrl_jax import problems
from mmrl_jax.training import checkpoint, loop
from tests import tiny
from tests.training.test_loop import rows, toy

CONFIGS = [
    lambda: tiny.config("mlp_ppo", **tiny.FAST),
    tiny.token_config,
    tiny.agent_config,
]


@pytest.mark.parametrize("make", CONFIGS)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (lambda: jax.enable_x64(True), "Unset JAX_ENABLE_X64"),
        (lambda: jax.numpy_dtype_promotion("strict"), "Unset JAX_NUMPY_DTYPE_PROMOTION"),
    ],
)
def test_settings_that_are_not_supported_are_refused(make, setting, message, tmp_path):
    with setting():
        with pytest.raises(ValueError, match=message):
            problems.make(make())
        with pytest.raises(ValueError, match=message):
            loop.run(toy(), workdir=tmp_path, config={})


def test_keys_of_rbg_go_through_environments_and_updates():
    with jax.default_prng_impl("rbg"):
        config = tiny.config("mlp_ppo", **tiny.FAST)
        stage = problems.make(config).stage("ppo")
        carry = jax.eval_shape(stage.init)
        after, _ = jax.eval_shape(stage.update, carry, stage.constants)
    assert carry.rng.shape == (4,) and carry.env_state.info["key"].shape == (8, 4)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, carry)


def test_a_run_is_not_resumed_with_keys_of_another_kind(tmp_path):
    loop.run(toy(num_updates=2), workdir=tmp_path, config={})
    with jax.default_prng_impl("rbg"):
        with pytest.raises(checkpoint.CheckpointMismatch, match="jax_default_prng_impl is 'rbg' n"):
            loop.run(toy(), workdir=tmp_path, config={})


def test_metrics_of_nothing_are_no_nan_for_debug_nans(tmp_path):
    with jax.debug_nans(True):
        no_end = toy(lambda n, w: {"episode/return": jnp.nan * n})
        loop.run(no_end, workdir=tmp_path / "a", config={})
        no_step = {"optimizer/steps": jnp.float32(0), "optimizer/skipped_steps": jnp.float32(1)}
        with pytest.raises(FloatingPointError, match="diverged in updates 1 to 1"):
            loop.run(toy(lambda n, w: no_step), workdir=tmp_path / "b", config={})
    assert len(rows(tmp_path / "a")) == 4
    assert all("episode/return" not in row for row in rows(tmp_path / "a"))
    (row,) = rows(tmp_path / "b")
    assert row["loss/total"] is None  # Of no step.


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["JAX_DEFAULT_PRNG_IMPL=rbg", "JAX_DEBUG_NANS=1"])
@pytest.mark.parametrize(
    "config", ["config('mlp_ppo', **tiny.FAST)", "config('recall_ppo')", "token_config()"]
)
def test_whole_runs_under_settings_of_jax(setting, config, tmp_path):
    code = (
        "from mmrl_jax import train\nfrom tests import tiny\n"
        f"config = tiny.{config}\n"
        "config[config.stages[-1]].optimizer.schedule = 'constant'\n"  # Such a run can be extended.
        f"assert train(config, {str(tmp_path)!r}).last.updates == 4\n"
        "config[config.stages[-1]].num_updates = 5\n"
        f"assert train(config, {str(tmp_path)!r}).last.updates == 5\n"
    )
    name, value = setting.split("=")
    subprocess.run([sys.executable, "-c", code], env=os.environ | {name: value}, check=True)
