"""The probe `gradient_conflict` in a run of two updates, and where it has nothing to measure."""

import math

import numpy as np
import pytest

from mmrl_jax import probes, problems, runs
from mmrl_jax.monitoring import metrics
from mmrl_jax.stability import gradient_surgery
from tests import tiny

PROBED = {
    "run__probes": ("gradient_conflict",),
    "run__probe_interval": 2,
    "last__num_updates": 2,
    "last__eval_interval": 2,
}


def measured(config, workdir):
    runs.train(config, workdir)
    (row,) = [x for x in metrics.read_jsonl(workdir / "metrics.jsonl") if found(x)]
    return found(row)


def found(row):
    prefix = "gradient_conflict/"
    return {name.removeprefix(prefix): x for name, x in row.items() if name.startswith(prefix)}


def test_a_perceptron_whose_actor_and_critic_share_nothing(tmp_path):
    config = tiny.config("mlp_ppo", ppo__entropy_coef=0.0, **tiny.FAST, **PROBED)
    # Both gradients are 0 on the parameters that they share, of which there are none. JSON has null
    # for NaN.
    assert measured(config, tmp_path) == {
        "cosine/policy_value": None,
        "norm_ratio/policy_value": None,
    }


def test_a_ratio_is_that_of_the_first_part_to_the_second(tmp_path, monkeypatch):
    conflict = gradient_surgery.Conflict(np.array([[1, -0.5], [-0.5, 1]]), np.array([2.0, 4.0]))
    monkeypatch.setattr(probes, "_conflicts", lambda problem, stage: lambda *unused: conflict)
    problem = problems.make(tiny.config("mlp_ppo", ppo__entropy_coef=0.0, **tiny.FAST))
    assert probes.gradient_conflict(probes.ProbeContext(problem, None, 0, tmp_path, "ppo")) == {
        "gradient_conflict/cosine/policy_value": -0.5,
        "gradient_conflict/norm_ratio/policy_value": 0.5,
    }


def test_a_gradient_of_0_has_no_angle_and_another_stage_no_gradients(tmp_path, monkeypatch):
    nothing = gradient_surgery.Conflict(np.ones((2, 2)), np.array([0.0, 4.0]))
    monkeypatch.setattr(probes, "_conflicts", lambda problem, stage: lambda *unused: nothing)
    problem = problems.make(tiny.config("reach_ppo"))
    monkeypatch.setattr(probes.ppo, "rollout_parts", lambda options: ("policy", "value"))
    found = probes.gradient_conflict(probes.ProbeContext(problem, None, 0, tmp_path, "ppo"))
    assert math.isnan(found["gradient_conflict/cosine/policy_value"])
    assert found["gradient_conflict/norm_ratio/policy_value"] == 0
    assert probes.gradient_conflict(probes.ProbeContext(problem, None, 0, tmp_path, "bc")) == {}


@pytest.mark.slow
def test_a_transformer_whose_trunk_is_shared(tmp_path):
    row = measured(tiny.config("reach_ppo_scratch", **PROBED), tmp_path)
    names = [name.removeprefix("cosine/") for name in row if name.startswith("cosine/")]
    assert "policy_value" in names and "auxiliary_pointing" in names
    assert len(row) == 2 * len(names)
    for name in names:
        assert -1.001 <= row[f"cosine/{name}"] <= 1.001 and row[f"cosine/{name}"] != 1
        assert row[f"norm_ratio/{name}"] > 0


def test_a_run_without_ppo_is_told(tmp_path):
    problem = problems.make(tiny.config("reach_bc"))
    message = (
        r"measures the loss of PPO of a control policy, but problem='control' and stages=\('bc'"
    )
    with pytest.raises(ValueError, match=message):
        probes.gradient_conflict(probes.ProbeContext(problem, None, 0, tmp_path, "bc"))
