"""Tests of mmrl_jax.evaluation.evaluate; expected values derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.distributed.mesh import make_mesh
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation.evaluate import (
    MODALITIES,
    Episodes,
    Evaluator,
    describe,
    evaluate,
    record_video,
    shuffle_modality,
    start,
)
from mmrl_jax.rendering import Scene, look_at
from mmrl_jax.rollouts.unroll import ActorOutput


class Staircase(Env):
    """Environment i ends after i + 1 steps, in the next step resets itself, and so on.

    Reward i + 1 a step, 0 for the reset; success for odd i.
    """

    episode_length = 4
    observation_size = {}
    action_size = 1
    backend = "none"

    def __init__(self, metric: str = "success"):
        self.metric = metric

    def reset(self, rng: jax.Array) -> State:
        zero = jnp.zeros(rng.shape[0])
        info = {"t": zero, "truncation": zero, "was_reset": zero, "privileged": {}}
        return State(None, {}, zero, zero, {self.metric: zero}, info)

    def step(self, state: State, action: jax.Array) -> State:
        i = jnp.arange(state.done.shape[0], dtype=jnp.float32)
        t = jnp.where(state.done > 0, 0.0, state.info["t"] + 1)
        done = (t == i + 1).astype(jnp.float32)
        return state.replace(
            reward=(1 - state.done) * (i + 1),
            done=done,
            metrics={self.metric: done * (i % 2)},
            info=state.info | {"t": t, "was_reset": state.done},
        )


def nothing(state: State, rng: jax.Array) -> ActorOutput:
    zero = jnp.zeros(state.done.shape[0])
    return ActorOutput(zero, zero, zero, zero)


def test_every_environment_counts_for_its_first_episode():
    # In 4 steps environment 0 ends at steps 1 and 3, environment 1 at step 2 and begins anew at
    # step 4, environment 2 ends at 3, environment 3 at 4. Return: (i + 1) steps of reward i + 1.
    env, rng = Staircase(), jax.random.PRNGKey(0)
    episodes = jax.jit(lambda s: evaluate(env, s, nothing, rng))(start(env, rng, episodes=4))
    np.testing.assert_array_equal(episodes.length, [1, 2, 3, 4])
    np.testing.assert_array_equal(episodes.episode_return, [1, 4, 9, 16])
    np.testing.assert_array_equal(episodes.success, [0, 1, 0, 1])


def test_an_environment_that_breaks_has_no_success():
    class Fragile(Staircase):
        """Environment 3, which would succeed at step 4, has a non-finite state at step 3."""

        def step(self, state: State, action: jax.Array) -> State:
            state = super().step(state, action)
            breaks = (jnp.arange(4) == 3) & (state.info["t"] == 3)
            was_reset = jnp.where(breaks, 1.0, state.info["was_reset"])
            info = state.info | {"was_reset": was_reset}
            return state.replace(reward=jnp.where(breaks, 0.0, state.reward), info=info)

    env, rng = Fragile(), jax.random.PRNGKey(0)
    episodes = evaluate(env, start(env, rng, episodes=4), nothing, rng)
    np.testing.assert_array_equal(episodes.length, [1, 2, 3, 2])
    np.testing.assert_array_equal(episodes.episode_return, [1, 4, 9, 8])
    np.testing.assert_array_equal(episodes.success, [0, 1, 0, 0])


def test_a_film_stands_still_once_its_episode_ended():
    class Seen(Staircase):
        """A floor whose redness is the step of the episode."""

        def scene(self, state: State) -> tuple:
            red = state.info["t"][:, None, None] / 4 * jnp.array([1.0, 0, 0])
            unit = jnp.ones((state.done.shape[0], 1, 1))
            turn = unit * jnp.array([1.0, 0, 0, 0])
            return Scene(("plane",), 0 * red, turn, 0 * red, red), look_at((0, 0, 1), (0, 0, 0))

    first, frames = record_video(
        Seen(), nothing, jax.random.PRNGKey(0), episodes=2, height=4, width=4
    )
    assert frames.shape == (5, 2, 4, 4, 3) and (first.info["t"] == 0).all()
    redness = np.asarray(frames[..., 0], float).mean((2, 3))
    # Environment 0 ends at step 1 and environment 1 at step 2; what comes after is not shown.
    assert (redness[0] == 0).all() and (redness[1] > 20).all()
    np.testing.assert_array_equal(redness[1:, 0], redness[1, 0])
    assert redness[2, 1] > 1.5 * redness[1, 1]
    np.testing.assert_array_equal(redness[2:, 1], redness[2, 1])


def test_success_is_not_made_up():
    env, rng = Staircase("height"), jax.random.PRNGKey(0)
    episodes = evaluate(env, start(env, rng, episodes=2), nothing, rng)
    assert episodes.success is None
    assert set(describe(episodes)) == {"return", "return_lo", "return_hi", "length"}


def test_describe():
    # 100 successes in 400: standard deviation of the mean sqrt(0.25 * 0.75 / 400) = 0.02165, so
    # the interval is 0.25 -+ 0.0424. Returns are twice that, lengths have none.
    success = np.repeat([1.0, 0.0], [100, 300])
    described = describe(Episodes(success, 2 * success, np.full(400, 7.0)))
    assert described["success"] == 0.25 and described["return"] == 0.5
    assert described["success_lo"] == pytest.approx(0.2076, abs=0.005)
    assert described["return_hi"] == pytest.approx(2 * 0.2924, abs=0.01)
    assert described["length"] == 7
    # One bad episode makes its numbers unknown, and does not end a training run.
    returns = np.array([1.0, np.nan])
    described = describe(Episodes(np.ones(2), returns, np.ones(2)))
    assert np.isnan([described[f"return{end}"] for end in ("", "_lo", "_hi")]).all()
    assert described["success"] == 1


def observed(batch: int) -> State:
    obs = {
        "pixels": jnp.arange(batch * 12, dtype=jnp.uint8).reshape(batch, 2, 2, 3),
        "instruction": {
            "tokens": jnp.arange(batch * 2).reshape(batch, 2),
            "mask": jnp.arange(batch * 2).reshape(batch, 2) > 2,
        },
        "proprio": jnp.arange(batch * 3.0).reshape(batch, 3),
    }
    return State(None, obs, jnp.zeros(batch), jnp.zeros(batch), {}, {})


@pytest.mark.parametrize("modality", MODALITIES)
def test_hide_swaps_exactly_one_modality(modality):
    seen = []

    def look(state: State, rng: jax.Array) -> ActorOutput:
        seen.append(state.obs)
        return nothing(state, rng)

    state = observed(3)
    for when in (True, False):
        shuffle_modality(look, modality, jnp.bool_(when))(state, jax.random.PRNGKey(0))
    hidden, shown = seen
    jax.tree.map(np.testing.assert_array_equal, shown, state.obs)
    for name, right in state.obs.items():
        # Environment i sees what environment i - 1 should: 2, 0, 1.
        order = np.array([2, 0, 1]) if name == modality else np.arange(3)
        expected = jax.tree.map(lambda x, order=order: np.asarray(x)[order], right)
        jax.tree.map(np.testing.assert_array_equal, hidden[name], expected)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), hidden[name], right)


def test_hide_refuses_what_it_cannot_hide():
    rng = jax.random.PRNGKey(0)
    with pytest.raises(ValueError, match="batch of 1.*at least 2 episodes"):
        shuffle_modality(nothing, "pixels")(observed(1), rng)
    with pytest.raises(ValueError, match="'touch' is not one of"):
        shuffle_modality(nothing, "touch")(observed(2), rng)


class Guess(Staircase):
    """Episodes of one step, with success if the action is the number in the pixels."""

    episode_length = 1

    def __init__(self, split: str):
        super().__init__()
        self.split = split

    def reset(self, rng: jax.Array) -> State:
        number = jnp.arange(rng.shape[0], dtype=jnp.float32) + {"low": 0, "high": 10}[self.split]
        return super().reset(rng).replace(obs={"pixels": number})

    def step(self, state: State, action: jax.Array) -> State:
        right = (action == state.obs["pixels"]).astype(jnp.float32)
        return state.replace(done=jnp.ones_like(right), metrics={"success": right})


def test_one_program_evaluates_all_policies_splits_and_modalities():
    compiled = []

    def see_and_add(added: jax.Array):
        compiled.append(added)

        def policy(state: State, rng: jax.Array) -> ActorOutput:
            return nothing(state, rng)._replace(environment_action=state.obs["pixels"] + added)

        return policy

    evaluator = Evaluator(Guess, see_and_add, jax.random.PRNGKey(0), episodes=3)
    for split in ("low", "high"):
        # Right as it is, wrong by one, and as wrong with another environment's picture.
        np.testing.assert_array_equal(evaluator(jnp.float32(0), split).success, [1, 1, 1])
        np.testing.assert_array_equal(evaluator(jnp.float32(1), split).success, [0, 0, 0])
        np.testing.assert_array_equal(evaluator(jnp.float32(0), split, "pixels").success, [0, 0, 0])
    # Environment i sees i - 1, and adds 1; environment 0 sees the last.
    np.testing.assert_array_equal(evaluator(jnp.float32(1), "low", "pixels").success, [0, 1, 1])
    assert len(compiled) == 1
    with pytest.raises(ValueError, match="'proprio' is not one of"):
        evaluator(jnp.float32(0), "low", "proprio")


def test_an_evaluator_of_one_episode_hides_nothing():
    evaluator = Evaluator(Guess, lambda _: nothing, jax.random.PRNGKey(0), episodes=1)
    np.testing.assert_array_equal(evaluator(None, "low").success, [1])
    with pytest.raises(ValueError, match="batch of 1"):
        evaluator(None, "low", "pixels")


class Drawn(Guess):
    """Episodes of one step, whose reward is the action; the key determines the pixels."""

    def reset(self, rng: jax.Array) -> State:
        return super().reset(rng).replace(obs={"pixels": jax.vmap(jax.random.uniform)(rng)})

    def step(self, state: State, action: jax.Array) -> State:
        return super().step(state, action).replace(reward=action)


def copy(_):
    """A policy that copies the pixels to its action, with many operations per environment."""

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        seen = jnp.broadcast_to(state.obs["pixels"][:, None], (state.done.shape[0], 64))
        same = seen @ (jnp.ones((64, 64)) / 64)
        return nothing(state, rng)._replace(environment_action=same[:, 0])

    return policy


def test_devices_and_chunks_change_no_episode_and_share_the_work():
    rng, work = jax.random.PRNGKey(0), {}
    expected = None
    # 5 episodes: alone; 8 environments on 8 devices; 3 chunks of 2, the last of which has one more.
    for devices, max_batch in ((1, None), (8, None), (2, 2)):
        evaluator = Evaluator(
            lambda _: Drawn("low"), copy, rng, episodes=5, mesh=make_mesh(devices),
            max_batch=max_batch,
        )  # fmt: skip
        found = evaluator(None, "low").episode_return
        if expected is None:
            expected = found
        assert len(set(expected)) == 5
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        if max_batch is None:  # Environment i sees i - 1, and environment 0 the last that counts.
            hidden = evaluator(None, "low", "pixels").episode_return
            np.testing.assert_allclose(hidden, np.roll(expected, 1), rtol=1e-6)
        state = evaluator._starts["low"](rng, first=0)
        arguments = (state, None, rng, jnp.int32(-1), jnp.int32(5))
        work[devices] = evaluator._run.lower(*arguments).compile().cost_analysis()["flops"]
    assert work[8] < work[1] * 2 / 5  # One of 8 environments instead of 5.
