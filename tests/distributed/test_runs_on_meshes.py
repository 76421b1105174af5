"""Tests of whole runs on meshes of several axes: they resume on another one, and can be loaded."""

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems, restoring
from tests import tiny

SPLIT, OTHER = {"data": 1, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "tensor": 1}


def test_a_run_resumes_on_another_mesh_and_is_loaded(tmp_path, monkeypatch):
    config = tiny.token_config(
        last__optimizer={"name": "sgd", "learning_rate": 0.02, "schedule": "constant"}
    )
    whole = mmrl_jax.train(config, tmp_path / "whole")
    half = problems.complete(config, {"mesh": SPLIT, "grpo": {"num_updates": 2}})
    trained = mmrl_jax.train(half, tmp_path / "parts")
    split = [x for x in jax.tree.leaves(trained.variables) if not x.is_fully_replicated]
    assert len(split) > 5
    # A policy is loaded on the devices that hold one copy of it.
    loaded = mmrl_jax.load(tmp_path / "parts")
    assert dict(loaded.problem.mesh.shape) == SPLIT
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, trained.variables)
    assert 0 <= loaded.evaluate("train", episodes=4)["accuracy"] <= 1
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 3)
        problem, _ = restoring.read_problem(tmp_path / "parts")
    assert dict(problem.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 2}

    resumed = mmrl_jax.train(problems.complete(config, {"mesh": OTHER}), tmp_path / "parts")
    assert resumed.last.updates == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6),
        *jax.device_get((whole.variables, resumed.variables)),
    )


@pytest.mark.slow
def test_demonstrations_and_ppo_on_a_mesh(tmp_path):
    config = problems.complete(tiny.config("reach_ppo", last__num_envs=8), {"mesh": SPLIT})
    trained = mmrl_jax.train(config, tmp_path)
    assert trained.last.updates == 4
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(trained.variables.params))
