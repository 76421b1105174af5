"""Shapley values: known truths, and the sum over players."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.interpretability import shapley

# Best accuracy of guessing a bit from no input, the first one, the second one, or both, where the
# inputs are two fair bits. AND is guessed right with 3/4 from nothing (always 0) and from one input
# (0 is certain if that bit is 0, and right half of the time if it is 1: 1/2 * 1 + 1/2 * 1/2).
TASKS = {
    "copy": ([0.5, 1.0, 0.5, 1.0], [0.5, 0.0], 0.0),
    "xor": ([0.5, 0.5, 0.5, 1.0], [0.25, 0.25], 0.5),
    "and": ([0.75, 0.75, 0.75, 1.0], [0.125, 0.125], 0.25),
}


@pytest.mark.parametrize("task", TASKS)
def test_known_truth_of_two_modalities(task):
    values, phi, interaction = TASKS[task]
    np.testing.assert_array_equal(shapley.shapley_values(jnp.array(values)), phi)
    expected = [[0, interaction], [interaction, 0]]
    np.testing.assert_array_equal(shapley.interactions(jnp.array(values)), expected)


@pytest.mark.parametrize("players", [1, 3, 4])
def test_values_are_the_mean_over_orders_and_sum_to_the_difference(players):
    values = np.random.default_rng(0).normal(size=(2**players, 5)).astype(np.float32)
    expected = np.zeros((players, 5))
    for order in itertools.permutations(range(players)):
        coalition = 0
        for i in order:
            expected[i] += values[coalition | 1 << i] - values[coalition]
            coalition |= 1 << i
    phi = shapley.shapley_values(jnp.asarray(values))
    np.testing.assert_allclose(phi, expected / math.factorial(players), atol=1e-5)
    np.testing.assert_allclose(phi.sum(0), values[-1] - values[0], atol=1e-5)


def test_interactions_of_three_players():
    # v = x0 x1 + 2 x2: only the pair (0, 1) interacts, by 1.
    rows = shapley.coalitions(3).astype(np.float32)
    found = shapley.interactions(jnp.asarray(rows[:, 0] * rows[:, 1] + 2 * rows[:, 2]))
    np.testing.assert_allclose(found, [[0, 1, 0], [1, 0, 0], [0, 0, 0]], atol=1e-6)


def test_coalitions_of_entries_of_an_observation():
    # The value a b with a background of zeros: no player is worth anything alone.
    observation = {"a": jnp.array([2.0, 3.0]), "b": {"x": jnp.array([5.0, 7.0])}}
    background = {"a": jnp.zeros(2), "b": {"x": jnp.zeros(2)}}
    values = shapley.coalition_values(
        lambda x: x["a"] * x["b"]["x"],
        lambda keep: shapley.modality_players(("a", "b")).mix(observation, background, keep),
        players=2,
        samples=2,
    )
    np.testing.assert_array_equal(values, [[0, 0], [0, 0], [0, 0], [10, 21]])
    phi = shapley.shapley_values(values)
    np.testing.assert_array_equal(phi, [[5, 10.5], [5, 10.5]])
    np.testing.assert_array_equal(shapley.shares(phi), [0.5, 0.5])
    np.testing.assert_array_equal(shapley.shares(jnp.zeros((2, 3))), [0, 0])


def test_frames_are_players():
    observation = {"pixels": jnp.ones((1, 2, 4, 4, 3)), "proprio": jnp.ones((1, 2, 5))}
    background = {name: 0 * x for name, x in observation.items()}
    players = shapley.frame_players(2)
    assert players.names == ("frame 0", "frame 1")
    mixed = players.mix(observation, background, jnp.array([False, True]))
    for x in mixed.values():
        assert (x[:, 0] == 0).all() and (x[:, 1] == 1).all()


def test_backgrounds_are_other_episodes_at_the_same_step():
    steps, episodes = jnp.meshgrid(jnp.arange(3), jnp.arange(4), indexing="ij")
    other_steps, others = shapley.other_episodes((steps, episodes), 1)
    np.testing.assert_array_equal(other_steps, steps)
    assert (others != episodes).all()
    with pytest.raises(ValueError, match="backgrounds=4 with 4 episodes"):
        shapley.check_backgrounds(4, 4)


def test_too_many_players_are_refused():
    with pytest.raises(ValueError, match="players=9"):
        shapley.coalitions(9)
