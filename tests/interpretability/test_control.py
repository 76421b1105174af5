"""Shapley values of the modalities of a control policy that is known."""

import jax.numpy as jnp
import numpy as np

from mmrl_jax.interpretability import control
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl.distributions import TanhNormal


def test_a_modality_that_the_policy_ignores_has_no_share():
    def predict(observation):
        # The instruction is not used, and pixels and proprioception are worth the same.
        mean = observation["pixels"] + observation["proprio"]
        distribution = TanhNormal(mean, jnp.zeros_like(mean))
        return PolicyOutput(distribution, value=mean[:, 0], auxiliary={})

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32)
    observation = {"pixels": x, "instruction": jnp.ones((3, 5)), "proprio": x}
    played = control.Played(observation, 2 * x, jnp.ones((3, 5)))
    players = control.modalities(observation)
    for target in ("behavior", "prediction", "contrast"):
        found = control.contributions(predict, played, players, target=target, backgrounds=2)
        np.testing.assert_allclose(found.share, [0.5, 0, 0.5], atol=1e-5)
        np.testing.assert_allclose(found.phi.sum(0), found.difference, atol=1e-4)
    # The value is linear, so that its modalities do not interact.
    prediction = control.contributions(predict, played, players, target="prediction", backgrounds=2)
    np.testing.assert_allclose(prediction.interaction, 0, atol=1e-5)
