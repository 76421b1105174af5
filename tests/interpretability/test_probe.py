"""The probe `modality_shares` in a run of two updates."""

import jax.numpy as jnp
import numpy as np

from mmrl_jax import probes, problems
from mmrl_jax.interpretability import control
from mmrl_jax.monitoring import metrics
from mmrl_jax.training.loop import run
from tests import tiny


def test_shares_are_logged_and_sum_to_one(tmp_path):
    # The environment has one instruction, on which nothing can depend.
    config = tiny.config(
        "recall_ppo",
        run__probes=("modality_shares",),
        run__probe_interval=1,
        last__num_updates=2,
    )
    problem = problems.make(config)
    stage = probes.attach(problem, problem.stage("ppo"), tmp_path)
    run(stage, workdir=tmp_path, config=config)
    rows = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)
    for row in rows[-2:]:
        for target in ("behaviour", "prediction"):
            shares = [row[f"modality_share/{target}/{name}"] for name in control.MODALITIES]
            assert abs(sum(shares) - 1) < 1e-5
            pixels, instruction, proprio = shares
            assert instruction < 1e-4 and pixels > 0.01 and proprio > 0
    assert "alarm/modality_unused" not in rows[-2]
    assert rows[-1]["alarm/modality_unused"] == 1


def test_a_modality_that_the_policy_ignores_has_no_share():
    from mmrl_jax.models.heads import PolicyOutput
    from mmrl_jax.rl.distributions import TanhNormal

    def predict(observation):
        # The instruction is not used, and pixels and proprioception are worth the same.
        mean = observation["pixels"] + observation["proprio"]
        distribution = TanhNormal(mean, jnp.zeros_like(mean))
        return PolicyOutput(distribution, value=mean[:, 0], auxiliary={})

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32)
    observation = {"pixels": x, "instruction": jnp.ones((3, 5)), "proprio": x}
    played = control.Played(observation, 2 * x, jnp.ones((3, 5)))
    for target in ("behaviour", "prediction", "contrast"):
        found = control.modality_contributions(predict, played, target=target, backgrounds=2)
        np.testing.assert_allclose(found.share, [0.5, 0, 0.5], atol=1e-5)
        np.testing.assert_allclose(found.phi.sum(0), found.difference, atol=1e-4)
    # The value is linear, so that its modalities do not interact.
    prediction = control.modality_contributions(predict, played, target="prediction", backgrounds=2)
    np.testing.assert_allclose(prediction.interaction, 0, atol=1e-5)
