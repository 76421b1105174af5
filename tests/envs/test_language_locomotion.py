import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.envs import language_locomotion as locomotion
from mmrl_jax.envs.brax_api import get_environment
from mmrl_jax.envs.language_locomotion import LanguageLocomotion
from mmrl_jax.rendering import project, render

EPISODES = 2000


@pytest.fixture(scope="module")
def env():
    return LanguageLocomotion(episode_length=3)


@pytest.fixture(scope="module")
def stepper(env):
    """Reset and step of two ants at once, compiled once."""
    return jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))


@pytest.fixture(scope="module")
def resets():
    """What `EPISODES` episodes of a split draw: a function of the split, numpy [N, ...]."""
    drawn = {}

    def draw(split):
        if split not in drawn:
            env = LanguageLocomotion(split=split)
            keys = jax.random.split(jax.random.PRNGKey(7), EPISODES)
            # Without the pipeline state the physics need not be compiled.
            info = jax.jit(jax.vmap(lambda key: env.reset(key).info))(keys)
            drawn[split] = jax.tree.map(np.asarray, info)
        return drawn[split]

    return draw


def keys(n, seed=0):
    return jax.random.split(jax.random.PRNGKey(seed), n)


def commands(info):
    return set(zip(info["direction"].tolist(), info["speed"].tolist(), strict=True))


def sentences(info):
    """The templates of the instructions: slots in place of the words that fill them."""
    slot = {w: "{direction}" for w in locomotion.DIRECTIONS}
    slot |= {w: "{pace}" for w in locomotion.PACES} | {w: "{manner}" for w in locomotion.MANNERS}
    decode = locomotion.TEMPLATES.vocabulary.decode
    texts = [decode(t).split() for t in np.unique(info["tokens"], axis=0)]
    return {" ".join(slot.get(w, w) for w in words) for words in texts}


# --- Splits.


def test_heldout_commands_are_disjoint(resets):
    held = {(d, s) for d, s in np.argwhere(locomotion.HELDOUT).tolist()}
    everything = {(d, s) for d in range(8) for s in range(3)}
    for split in set(locomotion.SPLITS) - {"heldout_direction_speed"}:
        assert commands(resets(split)) == everything - held
    assert commands(resets("heldout_direction_speed")) == held
    # Every direction and every speed by itself is trained.
    assert {d for d, _ in everything - held} == set(range(8))
    assert {s for _, s in everything - held} == set(range(3))


def test_heldout_sentences_are_disjoint(resets):
    assert not set(locomotion.SENTENCES) & set(locomotion.HELDOUT_SENTENCES)
    for split in set(locomotion.SPLITS) - {"heldout_paraphrase"}:
        assert sentences(resets(split)) == set(locomotion.SENTENCES)
    assert sentences(resets("heldout_paraphrase")) == set(locomotion.HELDOUT_SENTENCES)


def test_no_word_is_new_in_a_heldout_sentence():
    def words(templates):
        return {w for t in templates for w in t.split()}

    assert words(locomotion.HELDOUT_SENTENCES) <= words(locomotion.SENTENCES)


def test_physics_factors_are_disjoint(resets):
    for split in set(locomotion.SPLITS) - {"heldout_physics"}:
        for factor in resets(split)["physics"]:
            assert factor.min() >= 0.9 and factor.max() <= 1.1
            assert factor.std() > 0.03
    held = resets("heldout_physics")["physics"]
    assert held.mass.min() > 1.3 and held.friction.max() < 0.7 and held.gain.max() < 0.8


def test_the_camera_turns_in_its_split_only(resets):
    for split in set(locomotion.SPLITS) - {"heldout_camera"}:
        assert (resets(split)["camera"] == locomotion.CAMERA_OFFSET).all()
    x, y, z = resets("heldout_camera")["camera"].T
    # Nominal is from the south, (0, -1): turned by 20 to 40 degrees to either side.
    angle = np.rad2deg(np.arctan2(x, -y))
    assert np.abs(angle).min() >= 19.9 and np.abs(angle).max() <= 40.1
    assert (angle > 0).any() and (angle < 0).any()
    np.testing.assert_allclose(z, locomotion.CAMERA_OFFSET[2])


# --- Commands.


@pytest.mark.parametrize("split", locomotion.SPLITS)
def test_the_words_say_the_command(resets, split):
    info = resets(split)
    vocabulary = locomotion.TEMPLATES.vocabulary
    velocity = {"east": (1, 0), "north": (0, 1), "west": (-1, 0), "south": (0, -1)}
    velocity = {d: np.array(v, float) for d, v in velocity.items()}
    for ns in ("north", "south"):
        for ew in ("east", "west"):
            velocity[ns + ew] = (velocity[ns] + velocity[ew]) / np.sqrt(2)
    speed = {"walk": 1.0, "slowly": 1.0, "trot": 2.0, "steadily": 2.0, "run": 3.0, "quickly": 3.0}
    for tokens, command in list(zip(info["tokens"], info["command"], strict=True))[:300]:
        words = vocabulary.decode(tokens).split()
        (direction,) = [velocity[w] for w in words if w in velocity]
        speeds = {speed[w] for w in words if w in speed}
        assert len(speeds) == 1, words
        np.testing.assert_allclose(command, speeds.pop() * direction, atol=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split='test'"):
        LanguageLocomotion(split="test")
    with pytest.raises(ValueError, match="episode_length=0"):
        LanguageLocomotion(episode_length=0)


# --- What it looks like.


def standing(env, place):
    """A state without dynamics: the ant at rest at `place` [3] of its torso."""
    x = jax.eval_shape(env.reset, jax.random.PRNGKey(0)).pipeline_state.x
    links = x.pos.shape[0]
    # Links are spread along x, each turned by nothing; enough for a picture.
    pos = jnp.asarray(place) + 0.2 * jnp.arange(links)[:, None] * jnp.array([1.0, 0, 0])
    rot = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), (links, 4))

    class Physics:
        pass

    class Bare:
        pass

    Physics.x = x.replace(pos=pos, rot=rot)
    Bare.pipeline_state = Physics
    Bare.info = {"camera": jnp.asarray(locomotion.CAMERA_OFFSET)}
    return Bare


def test_the_camera_follows(env):
    @jax.jit
    def picture(place):
        return render(*env.scene(standing(env, place)), height=48, width=48)

    pictures = [np.asarray(picture(jnp.array(p))) for p in ([0.0, 0.0, 0.5], [4.0, -2.0, 0.5])]
    # The squares of the floor repeat every 2 m, so that after 4 m and 2 m all looks the same.
    assert (pictures[0] != pictures[1]).mean() < 0.01
    # The ant is orange, the floor is not.
    orange = pictures[0][..., 0].astype(int) - pictures[0][..., 2] > 60
    assert 0.02 < orange.mean() < 0.6
    # Half a square further the floor has moved, but not the ant.
    moved = np.asarray(picture(jnp.array([0.5, 0.0, 0.5])))
    assert ((moved != pictures[0]).any(-1) & ~orange).mean() > 0.05
    orange_moved = moved[..., 0].astype(int) - moved[..., 2] > 60
    assert (orange_moved != orange).mean() < 0.01


def test_up_in_the_picture_is_north(env):
    _, camera = env.scene(standing(env, [0.0, 0.0, 0.5]))
    east, north = (project(camera, jnp.array(p)) for p in ([1.0, 0, 0.5], [0, 1.0, 0.5]))
    center = project(camera, jnp.array([0.0, 0.0, 0.5]))
    assert east[0] > center[0] + 0.1 and abs(east[1] - center[1]) < 0.01
    assert north[1] < center[1] - 0.1 and abs(north[0] - center[0]) < 0.01


# --- Dynamics.


def test_reward_truncation_and_fall(env, stepper):
    reset, step = stepper
    state = first = reset(keys(2))
    assert env.observation_size == jax.tree.map(lambda x: x.shape[1:], state.obs)
    assert (env.action_size, env.action_kind) == (8, "continuous")
    action = jnp.full((2, 8), 0.5)
    for t in range(1, 4):
        before, state = state, step(state, action)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), first
        )
        # A control step is 0.05 s; 0.1 |a|^2 is 0.1 * 8 * 0.25.
        place, place_before = (np.asarray(s.pipeline_state.x.pos[:, 0]) for s in (state, before))
        velocity = (place - place_before)[:, :2] / 0.05
        command = np.asarray(state.info["command"])
        miss = np.linalg.norm(velocity - command, axis=-1)
        want = np.linalg.norm(command, axis=-1) - miss + 1.0 - 0.2
        np.testing.assert_allclose(state.reward, want, atol=1e-3)
        np.testing.assert_array_equal(state.done, float(t == 3))
        np.testing.assert_array_equal(state.info["truncation"], float(t == 3))
        np.testing.assert_array_equal(state.obs["proprio"][:, 0], place[:, 2])

    # One of the two taken off into the air: a fall ends the task, at the limit as well.
    for steps in (0.0, 2.0):
        x = first.pipeline_state.x
        up = jnp.array([0.0, 3.0])[:, None] * jnp.array([0.0, 0.0, 1.0])
        lifted = first.pipeline_state.replace(
            x=x.replace(pos=x.pos + up[:, None]),
            x_i=first.pipeline_state.x_i.replace(pos=first.pipeline_state.x_i.pos + up[:, None]),
        )
        state = first.replace(
            pipeline_state=lifted, info=first.info | {"steps": jnp.full(2, steps)}
        )
        state = step(state, action)
        limit = float(steps == 2)
        np.testing.assert_array_equal(state.done, [limit, 1])
        np.testing.assert_array_equal(state.info["truncation"], [limit, 0])
        assert state.metrics["success"][1] == 0


def test_proprioception_does_not_know_the_command(env, stepper):
    reset, step = stepper
    state = reset(keys(2))
    swapped = {k: state.info[k][::-1] for k in ("command", "tokens", "direction", "speed")}
    swapped["privileged"] = jax.tree.map(lambda x: x + 1.0, state.info["privileged"])
    action = jnp.full((2, 8), 0.5)
    after = step(state, action)
    other = step(state.replace(info=state.info | swapped), action)
    np.testing.assert_array_equal(after.obs["proprio"], other.obs["proprio"])
    assert not np.array_equal(after.reward, other.reward)


def test_success_is_the_mean_velocity(env, stepper):
    reset, step = stepper
    state = reset(keys(2))
    # The mean velocity is already the commanded one for the first ant, and opposite for the other;
    # one step at (almost) rest leaves it at 0.9 of that: within 30 %.
    command = state.info["command"]
    told = state.replace(info=state.info | {"velocity": command * jnp.array([[1.0], [-1.0]])})
    after = step(told, jnp.zeros((2, 8)))
    np.testing.assert_array_equal(after.metrics["success"], [1, 0])


@pytest.mark.slow
def test_nominal_physics_are_those_of_brax_ant():
    env, ant = LanguageLocomotion(), get_environment("ant", backend="spring")
    physics = locomotion.Physics(jnp.ones(()), jnp.ones(()), jnp.ones(()))
    state = jax.jit(env.reset)(jax.random.PRNGKey(0))
    state = state.replace(info=state.info | {"physics": physics})
    theirs = jax.jit(ant.reset)(jax.random.PRNGKey(0))
    init = jax.jit(ant.pipeline_init)
    theirs = theirs.replace(pipeline_state=init(state.pipeline_state.q, state.pipeline_state.qd))
    state = state.replace(
        pipeline_state=env._pipeline.init(env.sys, state.pipeline_state.q, state.pipeline_state.qd)
    )
    step, their_step = jax.jit(env.step), jax.jit(ant.step)
    for t in range(10):
        action = jnp.sin(t + jnp.arange(8.0))
        state, theirs = step(state, action), their_step(theirs, action)
        np.testing.assert_allclose(
            state.pipeline_state.q, theirs.pipeline_state.q, atol=2e-3 * (t + 1)
        )
        np.testing.assert_allclose(state.obs["proprio"], theirs.obs, atol=2e-2 * (t + 1))


@pytest.mark.slow
def test_each_physics_factor_matters(env):
    def run(**factors):
        nominal = {"mass": 1.0, "friction": 1.0, "gain": 1.0} | factors
        physics = locomotion.Physics(*(jnp.asarray(nominal[k]) for k in locomotion.Physics._fields))
        state = reset(jax.random.PRNGKey(0))
        state = state.replace(info=state.info | {"physics": physics})
        for t in range(10):
            state = step(state, jnp.sin(t + jnp.arange(8.0)))
        return np.asarray(state.pipeline_state.q)

    reset, step = jax.jit(env.reset), jax.jit(env.step)
    for factor in ("mass", "friction", "gain"):
        assert np.abs(run(**{factor: 0.7}) - run()).max() > 1e-2


@pytest.mark.slow
def test_with_pixels_and_auto_reset():
    env = envs.create(
        "language_locomotion", split="train", height=16, width=16, history=1, episode_length=2
    )
    state = jax.jit(env.reset)(keys(2))
    step = jax.jit(env.step)
    for _ in range(3):
        state = step(state, jnp.zeros((2, 8)))
    assert (state.info["was_reset"] == 1).all()
    assert state.obs["pixels"].shape == (2, 16, 16, 3)
