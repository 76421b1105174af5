"""Tests that policies learn small tasks. They take minutes each and are all slow."""

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.envs.brax_api import State
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.evaluate import Episodes, Evaluator
from mmrl_jax.rollouts.unroll import ActorOutput, deterministic_output
from mmrl_jax.runs import train

pytestmark = pytest.mark.slow
EPISODES = 128


def trained_episodes(config, workdir) -> Episodes:
    """Trains with a config, and evaluates the deterministic policy."""
    trained = train(config, workdir)
    evaluator = trained.problem.evaluator(jax.random.PRNGKey(1), episodes=EPISODES)
    return evaluator(trained.variables, "train")


def random_episodes(config) -> Episodes:
    """Evaluates uniformly random actions."""
    env = problems.make(config).env

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        return deterministic_output(
            jax.random.uniform(rng, (EPISODES, env.action_size), minval=-1, maxval=1)
        )

    evaluator = Evaluator(lambda _: env, lambda _: policy, jax.random.PRNGKey(1), episodes=EPISODES)
    return evaluator(None, "train")


def interval(values: np.ndarray) -> tuple[float, float, float]:
    return statistics.bootstrap_interval(values, confidence=0.99, resamples=2000, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_mlp_solves_inverted_pendulum(seed, tmp_path):
    config = mmrl_jax.get_config("mlp_ppo", {"seed": seed})
    # The pole stands for 1000 steps, which is all there are, at a reward of 1 each.
    assert np.mean(trained_episodes(config, tmp_path).episode_return) > 950


@pytest.mark.parametrize("spec", ["locomotion_ppo", "pixels_ppo"])
def test_twenty_updates_beat_random_actions(spec, tmp_path):
    config = mmrl_jax.get_config(spec, {"ppo": {"num_updates": 20, "eval_interval": 20}})
    trained = interval(trained_episodes(config, tmp_path).episode_return)
    random = interval(random_episodes(config).episode_return)
    print(f"{spec}: {trained} trained, {random} random")
    assert trained[1] > random[2]


def test_recall_needs_its_history(tmp_path):
    success = {}
    for frames in (4, 1):
        config = mmrl_jax.get_config("recall_ppo", {"env": {"history": frames}})
        episodes = trained_episodes(config, tmp_path / str(frames))
        success[frames] = float(np.mean(episodes.success))
    # Four colors: without a memory the best there is is one in four, here of 128 episodes, whose
    # standard deviation is 0.038.
    assert success[4] > 0.95
    assert success[1] < 0.25 + 4 * 0.038
