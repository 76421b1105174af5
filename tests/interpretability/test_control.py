"""Shapley values of the modalities of a control policy that is known."""

import jax.numpy as jnp
import numpy as np

from mmrl_jax.interpretability import control
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl.distributions import Categorical, TanhNormal


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


def test_another_instruction_changes_the_actions_that_depend_on_it():
    # One step of three episodes, whose pixels are 0.5, 0 and 0, and whose instructions 0, 1 and 1.
    pixels = jnp.asarray([[[0.5], [0.0], [0.0]]])
    tokens = jnp.asarray([[[0], [1], [1]]])
    observation = {"pixels": pixels, "instruction": {"tokens": tokens}}
    played = control.Played(observation, pixels, jnp.ones((1, 3)))

    def swap(distribution):
        def predict(observation):
            x, token = observation["pixels"], observation["instruction"]["tokens"][:, 0]
            return PolicyOutput(distribution(x, token), value=x[:, 0], auxiliary={})

        return control.swap_instructions(predict, played)

    found = swap(lambda x, token: TanhNormal(x + token[:, None], jnp.zeros_like(x)))
    np.testing.assert_array_equal(found.differs, [True, False, True])
    # Episode 0: tanh(0.5) to tanh(1.5); 1 keeps its instruction; 2: tanh(1) to tanh(0).
    np.testing.assert_allclose(found.change, [[0.443031, 0, 0.761594]], atol=1e-5)
    # The actions of the episodes are tanh(0.5), tanh(1) and tanh(1).
    np.testing.assert_allclose(found.spread, [[0.299477, 0, 0.299477]], atol=1e-5)
    np.testing.assert_allclose(found.played.action, [[[1.5], [1.0], [0.0]]])
    ignored = swap(lambda x, token: TanhNormal(x, jnp.zeros_like(x)))
    np.testing.assert_allclose(ignored.change, 0)
    discrete = swap(lambda x, token: Categorical(jnp.stack([1 - token, token], -1).astype(float)))
    np.testing.assert_array_equal(discrete.change, [[1, 0, 1]])
    np.testing.assert_array_equal(discrete.swapped_action, [[1, 1, 0]])
