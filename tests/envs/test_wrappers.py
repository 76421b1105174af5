import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.envs.wrappers import AutoReset, History, Pixels
from mmrl_jax.rendering import Scene, look_at


class Counter(Env):
    """Draws a number at reset and counts; its episode ends after 2 to 4 steps."""

    action_kind = "continuous"
    observation_size = {"proprio": (2,)}
    action_size = 1
    backend = "none"

    def reset(self, rng):
        k_number, k_length = jax.random.split(rng)
        number = jax.random.uniform(k_number)
        zero = jnp.zeros(())
        info = {
            "steps": zero,
            "truncation": zero,
            "number": number,
            "length": jax.random.randint(k_length, (), 2, 5).astype(jnp.float32),
            "privileged": {},
        }
        return State(None, {"proprio": jnp.stack([number, zero])}, zero, zero, {}, info)

    def step(self, state, action):
        steps = state.info["steps"] + 1
        ended = (steps >= state.info["length"]).astype(jnp.float32)
        return state.replace(
            obs={"proprio": jnp.stack([state.info["number"], steps])},
            reward=action[0],
            done=ended,
            info=state.info | {"steps": steps, "truncation": ended},
        )

    def scene(self, state):
        # A sphere whose red grows with the steps, so large that it fills the picture.
        steps = state.info["steps"]
        batch = steps.shape
        scene = Scene(
            kind=("sphere",),
            position=jnp.zeros((*batch, 1, 3)),
            rotation=jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), (*batch, 1, 4)),
            size=jnp.full((*batch, 1, 3), 2.0),
            color=steps[..., None, None] * jnp.array([0.2, 0.0, 0.0]),
        )
        return scene, look_at(jnp.broadcast_to(jnp.array([0.0, -3.0, 0.0]), (*batch, 3)), (0, 0, 0))


def run(env, keys, steps):
    """States [steps + 1, B, ...] under an action of 0.5."""
    state = jax.jit(env.reset)(keys)
    action = jnp.full((keys.shape[0], 1), 0.5)

    def step(state, _):
        state = env.step(state, action)
        return state, state

    _, rest = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(state)
    return jax.tree.map(lambda a, b: np.concatenate([np.asarray(a)[None], b]), state, rest)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.PRNGKey(0), 8)


@pytest.fixture(scope="module")
def states(keys):
    return run(AutoReset(Counter()), keys, 40)


def test_a_reset_follows_each_end_and_nothing_else(states):
    done, was_reset = states.done, states.info["was_reset"]
    np.testing.assert_array_equal(was_reset[0], 0)
    np.testing.assert_array_equal(was_reset[1:], done[:-1])
    np.testing.assert_array_equal(states.info["steps"][was_reset > 0], 0)
    np.testing.assert_array_equal(states.done[was_reset > 0], 0)
    np.testing.assert_array_equal(states.info["truncation"][was_reset > 0], 0)
    # 40 steps hold at least 8 episodes of at most 4 steps and the step that resets.
    assert (was_reset.sum(axis=0) >= 8).all()


def test_the_last_state_of_an_episode_is_left_as_it_is(states):
    ended = states.done > 0
    np.testing.assert_array_equal(states.info["steps"][ended], states.info["length"][ended])
    np.testing.assert_array_equal(states.obs["proprio"][ended][:, 1], states.info["length"][ended])


def test_return_and_length_count_the_steps_that_were_decided(states):
    # Every decided step is rewarded with 0.5, the step that resets with nothing.
    np.testing.assert_array_equal(states.metrics["episode_length"], states.info["steps"])
    np.testing.assert_allclose(states.metrics["episode_return"], 0.5 * states.info["steps"])
    np.testing.assert_array_equal(states.reward[states.info["was_reset"] > 0], 0)


def test_an_environment_does_not_depend_on_the_batch(keys, states):
    four = run(AutoReset(Counter()), keys[:4], 40)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, :4]), four, states)


def test_the_same_keys_give_the_same_episodes(keys, states):
    again = run(AutoReset(Counter()), keys, 40)
    jax.tree.map(np.testing.assert_array_equal, again, states)


def test_every_episode_is_drawn_afresh(states):
    first = (states.info["was_reset"] > 0) | (np.arange(41)[:, None] == 0)
    numbers = states.info["number"][first]
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("what", ["obs", "reward"])
def test_an_environment_that_breaks_is_reset_alone(keys, states, what):
    class Fragile(Counter):
        """Breaks in the first step of an episode whose number is above 0.9."""

        def step(self, state, action):
            state = super().step(state, action)
            breaks = (state.info["number"] > 0.9) & (state.info["steps"] == 1)
            worse = jax.tree.map(lambda x: jnp.where(breaks, jnp.nan, x), getattr(state, what))
            return state.replace(**{what: worse})

    after = run(AutoReset(Fragile()), keys, 40)
    broken = after.metrics["broken"]
    assert 3 < broken.sum() < 40
    assert all(np.isfinite(x).all() for x in (after.obs["proprio"], after.reward))
    # In the very step stands the first state of another episode, of which nothing is decided yet.
    was_reset = broken > 0
    assert (after.info["was_reset"][was_reset] == 1).all()
    for name, x in (("done", after.done), ("steps", after.info["steps"]), ("reward", after.reward)):
        np.testing.assert_array_equal(x[was_reset], 0, err_msg=name)
    np.testing.assert_array_equal(after.metrics["episode_return"][was_reset], 0)
    np.testing.assert_array_equal(after.info["was_reset"][1:], after.done[:-1] + broken[1:])
    assert (after.info["number"][:-1][broken[1:] > 0] > 0.9).all()
    numbers = after.info["number"][(after.info["was_reset"] > 0) | (np.arange(41)[:, None] == 0)]
    assert len(np.unique(numbers)) == len(numbers)
    # Those that never broke are as they would have been.
    whole = broken.sum(axis=0) == 0
    np.testing.assert_array_equal(after.obs["proprio"][:, whole], states.obs["proprio"][:, whole])
    assert whole.any()


def test_pixels_show_the_state_that_is_returned(keys):
    env = Pixels(AutoReset(Counter()), height=4, width=6)
    states = run(env, keys, 10)
    pixels, steps = states.obs["pixels"], states.info["steps"]
    assert pixels.shape == (11, 8, 4, 6, 3)
    assert pixels.dtype == np.uint8
    # Red is proportional to the steps: 0 at the start of an episode.
    red = pixels[..., 2, 3, 0].astype(float)
    assert (red[steps == 0] == 0).all()
    slope = red[steps > 0] / steps[steps > 0]
    assert slope.min() > 10 and slope.max() - slope.min() <= 1
    assert env.observation_size == {"proprio": (2,), "pixels": (4, 6, 3)}


def test_history_holds_the_frames_of_this_episode_only(keys):
    env = History(Pixels(AutoReset(Counter()), height=4, width=6), frames=3)
    states = run(env, keys, 20)
    assert states.obs["pixels"].shape == (21, 8, 3, 4, 6, 3)
    assert states.obs["proprio"].shape == (21, 8, 3, 2)
    assert env.observation_size == {"proprio": (3, 2), "pixels": (3, 4, 6, 3)}
    # At step s of an episode the three frames are of steps s - 2, s - 1 and s, or of step 0 where
    # that is before its start; the episode's own number stands in all of them.
    want = np.maximum(states.info["steps"][..., None] + np.array([-2, -1, 0]), 0)
    np.testing.assert_array_equal(states.obs["proprio"][..., 1], want)
    number = np.broadcast_to(states.info["number"][..., None], want.shape)
    np.testing.assert_array_equal(states.obs["proprio"][..., 0], number)
    red = states.obs["pixels"][..., 2, 3, 0].astype(float)
    assert (red[want == 0] == 0).all() and (red[want > 0] > 0).all()
    assert (np.diff(red, axis=-1)[np.diff(want, axis=-1) > 0] > 0).all()


def test_history_leaves_the_environment_as_it_is(keys, states):
    with_history = run(History(AutoReset(Counter()), frames=4), keys, 40)
    np.testing.assert_array_equal(with_history.obs["proprio"][:, :, -1], states.obs["proprio"])
    np.testing.assert_array_equal(with_history.info["number"], states.info["number"])


def test_history_of_one_environment_without_auto_reset():
    env = History(Counter(), frames=2)
    state = env.reset(jax.random.PRNGKey(3))
    for step in range(1, 3):
        state = env.step(state, jnp.zeros(1))
        np.testing.assert_array_equal(state.obs["proprio"][:, 1], [step - 1, step])


def test_history_needs_a_frame():
    with pytest.raises(ValueError, match="frames=0"):
        History(Counter(), frames=0)
