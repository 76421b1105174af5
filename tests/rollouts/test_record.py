"""Tests of recorded episodes on an environment that counts, whose values are known."""

from brax.envs.base import Env, State
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.data import records
from mmrl_jax.envs.instructions import Templates, instruction
from mmrl_jax.envs.wrappers import AutoReset, History
from mmrl_jax.rollouts.record import Recorder, random_policy, with_noise
from mmrl_jax.rollouts.unroll import deterministic_output

WORDS = Templates(("gehe nach größe",), {}).vocabulary
LIMIT = 5


class Count(Env):
    """Counts its steps, and ends by itself after `length` steps, which the key determines."""

    action_kind, action_size, episode_length = "continuous", 1, LIMIT
    backend, vocabulary = None, WORDS
    observation_size = {"proprio": (2,), "instruction": {"tokens": (3,), "mask": (3,)}}

    def __init__(self, breaks=False):
        self.breaks = breaks

    def observe(self, steps, length):
        tokens = jnp.asarray(WORDS.encode("gehe nach größe"))
        return {"proprio": jnp.stack([steps, length]), "instruction": instruction(tokens)}

    def reset(self, rng):
        length = jnp.asarray(jax.random.randint(rng, (), 2, 9), jnp.float32)
        zero = jnp.zeros(())
        info = {"steps": zero, "length": length, "truncation": zero}
        info["privileged"] = {"steps": zero[None]}
        return State(None, self.observe(zero, length), zero, zero, {"success": zero}, info)

    def step(self, state, action):
        steps, length = state.info["steps"] + 1, state.info["length"]
        ended, limit = steps >= length, steps >= LIMIT
        done = (ended | limit).astype(jnp.float32)
        info = state.info | {"steps": steps, "truncation": (limit & ~ended).astype(jnp.float32)}
        info["privileged"] = {"steps": steps[None]}
        reward = jnp.where(self.breaks & (steps == 2), jnp.nan, 10 * steps + action[0])
        return state.replace(
            obs=self.observe(steps, length),
            reward=reward,
            done=done,
            metrics=state.metrics | {"success": ended.astype(jnp.float32)},
            info=info,
        )


def constant(value):
    return lambda state, rng: deterministic_output(jnp.full((len(state.done), 1), value))


def recorder(env=None, policies=None, history=1, seed=0):
    return Recorder(
        env or AutoReset(Count()),
        policies or {"low": constant(-0.5), "high": constant(0.5)},
        jax.random.PRNGKey(seed),
        seed=seed,
        split="train",
        history=history,
        default_instruction="count",
    )


def test_episodes_have_every_step_and_their_provenance():
    episodes, quarantine = recorder()(range(4, 16), [0, 1] * 6, keep=10)
    assert not quarantine.total and len(episodes) == 10
    lengths = [int(x.observation["proprio"][0, 1]) for x in episodes]
    assert min(lengths) < LIMIT < max(lengths)  # Terminated and truncated ones.
    for i, (x, length) in enumerate(zip(episodes, lengths, strict=True)):
        count, action = min(length, LIMIT), [-0.5, 0.5][i % 2]
        steps = np.arange(count + 1)
        np.testing.assert_array_equal(x.observation["proprio"][:, 0], steps)
        np.testing.assert_array_equal(x.privileged["steps"][:, 0], steps)
        np.testing.assert_array_equal(x.action[:, 0], [action] * count + [0])
        rewards = [10 * (t + 1) + action for t in range(count)]
        np.testing.assert_array_equal(x.reward, [*rewards, 0])
        terminated = length <= LIMIT
        assert x.is_terminal.tolist() == [False] * count + [terminated]
        assert x.is_first.tolist() == [True] + [False] * count
        assert x.is_last.tolist() == [False] * count + [True]
        ends = 0.0 if terminated else 1.0
        assert x.discount.tolist() == [1.0] * (count - 1) + [ends, ends]
        assert list(x.language_instruction) == ["gehe nach größe"] * (count + 1)
        assert x.final_observation and x.actions == count
        expected = records.Provenance(
            policy=["low", "high"][i % 2],
            seed=0,
            split="train",
            number=4 + i,
            episode_return=sum(rewards),
            success=float(terminated),
        )
        assert x.provenance == expected


def test_an_episode_depends_on_its_number_alone():
    one = recorder()(range(6), [0] * 6, keep=6).episodes
    two = recorder()(range(3, 9), [0] * 6, keep=3).episodes
    for x, y in zip(one[3:], two, strict=True):
        for name, value in x.fields().items():
            np.testing.assert_array_equal(value, y.fields()[name], err_msg=name)
    other = recorder(seed=1)(range(6), [0] * 6, keep=6).episodes
    assert [len(x.action) for x in one] != [len(x.action) for x in other]


def test_the_newest_frame_of_a_history_is_recorded():
    env = History(AutoReset(Count()), frames=3)
    one = recorder(env, history=3)(range(3), [0] * 3, keep=3).episodes
    two = recorder()(range(3), [0] * 3, keep=3).episodes
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x.observation["proprio"], y.observation["proprio"])


def test_an_episode_that_breaks_is_counted():
    episodes, quarantine = recorder(AutoReset(Count(breaks=True)))(range(4), [0] * 4, keep=3)
    assert not episodes and quarantine.counts == {"non-finite observation": 3}
    assert "episode 0: non-finite observation: the state" in quarantine.summary()


def test_noise_and_random_actions():
    state = AutoReset(Count()).reset(jax.random.split(jax.random.PRNGKey(0), 2000))
    key = jax.random.PRNGKey(1)
    noisy = with_noise(constant(0.0), 0.1, "continuous", 1)(state, key).environment_action
    # The standard deviation of 2000 samples is within 0.1 +- 5 * 0.1 / sqrt(4000).
    assert noisy.shape == (2000, 1) and abs(float(jnp.std(noisy)) - 0.1) < 0.008
    clipped = with_noise(constant(0.9), 1.0, "continuous", 1)(state, key).environment_action
    assert float(jnp.max(jnp.abs(clipped))) == 1.0
    uniform = random_policy("continuous", 3)(state, key).environment_action
    assert uniform.shape == (2000, 3) and float(uniform.min()) < -0.9 < 0.9 < float(uniform.max())
    moves = random_policy("discrete", 4)(state, key).environment_action
    assert moves.dtype == jnp.int32 and sorted(set(moves.tolist())) == [0, 1, 2, 3]
    still = lambda state, rng: deterministic_output(jnp.full(2000, 2, jnp.int32))  # noqa: E731
    moved = with_noise(still, 0.4, "discrete", 4)(state, key).environment_action
    # A random action is another one in 3 of 4 cases: 0.3, within 5 standard deviations of 0.01.
    assert abs(float(jnp.mean(moved != 2)) - 0.3) < 0.05
    assert moved.dtype == jnp.int32


@pytest.mark.parametrize("keep", [0, 2])
def test_fewer_episodes_may_be_kept(keep):
    assert len(recorder()(range(4), [0] * 4, keep=keep).episodes) == keep
