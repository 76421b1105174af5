import importlib.util

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.envs import from_brax, system_scene
from mmrl_jax.envs.brax_api import Env, State, environment_names, get_environment
from mmrl_jax.envs.from_brax import FromBrax
from mmrl_jax.envs.language_locomotion import LanguageLocomotion
from mmrl_jax.envs.language_reach import LanguageReach
from mmrl_jax.envs.recall import Recall
from mmrl_jax.rendering import project

FLAT = {"height": 0, "width": 0, "history": 1}


def keys(n, seed=0):
    return jax.random.split(jax.random.PRNGKey(seed), n)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


class Stub(Env):
    """An environment that ends after three steps; 'state' of its observation is the step."""

    action_size = 1
    observation_size = 1
    backend = "none"

    def reset(self, rng):
        return State(None, {"state": jnp.zeros(1), "more": jnp.zeros(2)}, *jnp.zeros(2))

    def step(self, state, action):
        obs = {"state": state.obs["state"] + 1, "more": jnp.zeros(2)}
        # A Python number, as some environments return it.
        return state.replace(obs=obs, reward=1.0, done=jnp.where(obs["state"][0] >= 3, 1.0, 0.0))


# --- The registry.


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("language_reech", "language_reach"),
        ("recal", "recall"),
        ("brax:hoper", "brax:hopper"),
        ("brax:", "brax"),
        ("hopper", "brax:hopper"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    for call in (envs.splits, lambda n: envs.create(n, split="train", **FLAT)):
        with pytest.raises(ValueError, match=f"name='{name}'.*{nearest}"):
            call(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "heldout"}, "split='heldout'"),
        ({"height": 16}, "height=16, width=0"),
        ({"height": -1, "width": -1}, "height=-1"),
        ({"history": 0}, "history=0"),
        ({"episode_lenght": 3}, "'episode_lenght'.*'episode_length'"),
        ({"episode_length": 0}, "episode_length=0"),
        ({"env": "ant"}, "'env' is no option"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        envs.create("brax:fast", **({"split": "train"} | FLAT | change))


def goal_env(goal, split="train", noise=0.5):
    """An environment of the user with a required option."""


def test_default_options_are_those_of_the_constructor():
    assert envs.default_options("recall") == {}
    assert envs.default_options("language_grid") == {"rows": 4, "episode_length": 10}
    fast = envs.default_options("brax:fast")
    assert fast["instruction"] == "go fast" and fast["backend"] == "spring" and "env" not in fast
    assert envs.default_options("brax:fast", pixels=False)["instruction"] is None
    assert "backend" not in envs.default_options("playground:CartpoleBalance")
    mine = envs.default_options(f"{__name__}:goal_env")
    assert mine == {"goal": envs.REQUIRED, "noise": 0.5}
    with pytest.raises(ValueError, match="'language_grid'"):
        envs.default_options("language_gird")


def test_every_name_has_train_as_its_first_split():
    for name in (*envs.NAMES, "brax:ant", "playground:CartpoleBalance"):
        assert envs.splits(name)[0] == "train"
    assert set(from_brax.INSTRUCTIONS) == set(environment_names())


@pytest.mark.skipif(
    importlib.util.find_spec("mujoco_playground") is not None, reason="Playground is installed"
)
def test_playground_says_what_to_install():
    with pytest.raises(ValueError, match="pip install playground"):
        envs.create("playground:CartpoleBalance", split="train", **FLAT)


@pytest.mark.slow
def test_a_playground_environment_is_wrapped():
    pytest.importorskip("mujoco_playground")
    name = "playground:CartpoleBalance"
    env = envs.create(name, split="train", height=16, width=16, history=1, episode_length=3)
    state = jax.jit(env.reset)(keys(2))
    before = shapes(state)
    for _ in range(3):
        state = jax.jit(env.step)(state, jnp.zeros((2, 1)))
    assert shapes(state) == before
    np.testing.assert_array_equal(state.info["truncation"], 1)
    assert np.asarray(state.obs["pixels"]).std() > 5


@pytest.fixture(scope="module")
def pendulum():
    """Returns the environment, its initial state, and the states of a constant push."""
    env = envs.create(
        "brax:inverted_pendulum", split="train", height=16, width=16, history=2, episode_length=100
    )
    states, step = [jax.jit(env.reset)(keys(2))], jax.jit(env.step)
    while not (states[-1].done > 0).all():
        assert len(states) < 60, "the poles do not fall"
        states.append(step(states[-1], jnp.ones((2, 1))))
    return env, states


def check_interface(env, state, after, *, proprio, pixels):
    """Checks a batched state and the next one against the interface of the environment."""
    # A scan's carry must not change.
    assert shapes(after) == shapes(state)
    batch = state.done.shape
    for s in (state, after):
        assert s.obs["proprio"].shape == (*batch, *proprio)
        assert s.obs["proprio"].dtype == jnp.float32
        assert s.obs["instruction"]["tokens"].dtype == jnp.int32
        assert s.obs["instruction"]["mask"].dtype == bool
        assert s.reward.shape == s.done.shape == batch
        assert s.reward.dtype == s.done.dtype == s.info["truncation"].dtype == jnp.float32
        assert all(m.shape == batch and m.dtype == jnp.float32 for m in s.metrics.values())
        if pixels:
            assert s.obs["pixels"].shape == (*batch, *pixels)
            assert s.obs["pixels"].dtype == jnp.uint8
    assert env.observation_size == jax.tree.map(lambda x: x.shape[1:], state.obs)
    assert (state.obs["instruction"]["tokens"] < env.vocabulary.size).all()
    assert env.caption(jax.tree.map(lambda x: x[0], state)) == env.vocabulary.decode(
        state.info["tokens"][0]
    )


def test_interface_of_a_flat_environment_with_an_instruction():
    env = envs.create("brax:fast", split="train", **FLAT, instruction="go fast", episode_length=3)
    state = jax.jit(env.reset)(keys(3))
    after = jax.jit(env.step)(state, jnp.zeros((3, 1)))
    check_interface(env, state, after, proprio=(2,), pixels=None)
    assert env.action_kind == "continuous" and env.action_size == 1


def test_interface_of_recall():
    env = envs.create("recall", split="train", height=8, width=6, history=1)
    state = jax.jit(env.reset)(keys(3))
    after = jax.jit(env.step)(state, jnp.zeros(3, jnp.int32))
    check_interface(env, state, after, proprio=(1,), pixels=(8, 6, 3))
    assert env.action_kind == "discrete" and env.action_size == 4


def test_interface_of_a_wrapped_environment(pendulum):
    env, states = pendulum
    check_interface(env, states[0], states[1], proprio=(2, 4), pixels=(2, 16, 16, 3))


# --- Wrapped environments.


def test_without_pixels_a_brax_environment_is_flat():
    env = envs.create("brax:fast", split="train", **FLAT, episode_length=5)
    state = jax.jit(env.reset)(keys(2))
    assert set(state.obs) == {"proprio"}
    # Brax's `fast`: a positive action adds 0.02 m/s a step of 0.02 s, and the reward is the
    # position: 0.02 (0.02 + 0.04) after two steps.
    for _ in range(2):
        state = jax.jit(env.step)(state, jnp.ones((2, 1)))
    np.testing.assert_allclose(state.reward, 0.0012, rtol=1e-5)
    np.testing.assert_allclose(state.obs["proprio"], [[0.0012, 0.04]] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("limit", "steps", "truncation"),
    [
        (2, 2, 1.0),  # The limit comes first.
        (3, 3, 0.0),  # The environment ends at the limit: nothing follows, whatever the limit.
        (9, 3, 0.0),
    ],
)
def test_the_limit_truncates_and_the_environment_terminates(limit, steps, truncation):
    env = FromBrax(Stub(), instruction="wait", episode_length=limit)
    state = env.reset(jax.random.PRNGKey(0))
    before = shapes(state)
    for step in range(1, steps + 1):
        assert state.done == 0
        state = env.step(state, jnp.zeros(1))
        np.testing.assert_array_equal(state.obs["proprio"], [step])
        assert shapes(state) == before
    assert state.done == 1
    assert state.info["truncation"] == truncation


def test_a_pole_that_falls_terminates(pendulum):
    _, states = pendulum
    falls = 0
    for state in states:
        # Brax ends the episode where the pole leans by more than 0.2 rad.
        np.testing.assert_array_equal(state.done, jnp.abs(state.pipeline_state.q[:, 1]) > 0.2)
        np.testing.assert_array_equal(state.info["truncation"], 0)
        falls += int(state.done.sum())
    assert falls >= 2


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(ValueError, match="env='nothing'"):
        FromBrax("nothing", instruction=None)
    with pytest.raises(ValueError, match="'state'"):
        FromBrax(get_environment("fast", obs_mode="dict_pixels"), instruction=None)
    with pytest.raises(ValueError, match="Fast has no bodies"):
        envs.create("brax:fast", split="train", height=8, width=8, history=1).reset(keys(1))


def test_the_camera_follows_and_takes_in_the_bodies(pendulum):
    env, states = pendulum
    state = states[0]
    scene, camera = env.scene(state)
    x = state.pipeline_state.x
    away = state.replace(pipeline_state=state.pipeline_state.replace(x=x.replace(pos=x.pos + 5.0)))
    scene_away, camera_away = env.scene(away)
    assert scene.kind == ("capsule",) * 3
    # The rail belongs to the world and stays; cart and pole move, and the camera with them.
    moved = np.array([[0.0] * 3, [5.0] * 3, [5.0] * 3])
    np.testing.assert_allclose(scene_away.position - scene.position, [moved] * 2, atol=1e-5)
    np.testing.assert_allclose(camera_away.position - camera.position, 5.0, atol=1e-5)
    camera = jax.tree.map(lambda x: x[:, None], camera)
    seen = project(camera, scene.position[:, 1:])
    assert ((seen > 0.05) & (seen < 0.95)).all()
    # The bounding spheres reach from 0.2 m below the cart to 0.65 m above it: the middle of the
    # picture is at 0.22 m.
    middle = project(camera, x.pos[:, :1] + jnp.array([0, 0, 0.225]))
    np.testing.assert_allclose(middle, 0.5, atol=0.01)
    assert np.asarray(state.obs["pixels"]).std() > 5


# --- Models as scenes.

XML = """
<mujoco>
  <asset>
    <texture name="t" type="2d" builtin="flat" rgb1="0.2 0.4 0.6" width="4" height="4"/>
    <material name="m" texture="t" rgba="0.5 1 1 1"/>
  </asset>
  <worldbody>
    <geom type="plane" size="0 0 1" material="m"/>
    <body pos="0.1 0.2 1" euler="20 30 40">
      <freejoint/>
      <geom type="sphere" size="0.3" pos="0.1 0 0" rgba="1 0 0 1"/>
      <geom type="ellipsoid" size="0.1 0.2 0.3" rgba="1 1 1 0"/>
      <geom type="box" size="0.3 0.3 0.3" group="3"/>
      <body pos="0.4 0.1 0.2" euler="10 0 50">
        <joint axis="1 2 3"/>
        <geom type="capsule" fromto="0 0 0 0.1 0.3 0.2" size="0.05" rgba="0 1 0 1"/>
        <geom type="cylinder" size="0.1 0.4" euler="45 30 0" rgba="0 0 1 1"/>
        <geom type="box" size="0.1 0.2 0.3" pos="0.1 0.1 0" euler="0 70 10"/>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
SHOWN = [0, 1, 4, 5, 6]


def test_geoms_stand_where_mujoco_puts_them():
    model = mujoco.MjModel.from_xml_string(XML)
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    poses = []
    for _ in range(2):
        data.qpos[:] = rng.normal(size=model.nq)
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        mujoco.mj_kinematics(model, data)
        poses.append([x.copy() for x in (data.xpos, data.xquat, data.geom_xpos, data.geom_xmat)])
    position, rotation, geom_position, geom_matrix = (np.stack(x) for x in zip(*poses, strict=True))
    geometry = system_scene.geometry(model)
    scene = system_scene.scene(geometry, jnp.asarray(position), jnp.asarray(rotation), checker=2.0)
    assert scene.kind == ("plane", "sphere", "capsule", "cylinder", "box")
    np.testing.assert_allclose(scene.position, geom_position[:, SHOWN], atol=1e-5)
    w, x, y, z = np.moveaxis(np.asarray(scene.rotation), -1, 0)
    # The third column of a quaternion's matrix, and the first.
    third = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)
    first = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], -1)
    matrix = geom_matrix.reshape(2, -1, 3, 3)[:, SHOWN]
    np.testing.assert_allclose(third, matrix[..., 2], atol=1e-5)
    np.testing.assert_allclose(first, matrix[..., 0], atol=1e-5)
    np.testing.assert_allclose(scene.size, [model.geom_size[SHOWN]] * 2)
    assert scene.checker.shape == (2, 5) and (scene.checker == 2).all()
    # The floor: its texture's color times its material's; the box has MuJoCo's own gray.
    colors = [[0.1, 0.4, 0.6], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]]
    np.testing.assert_allclose(scene.color[0], colors, atol=2e-3)


def test_a_visible_geom_that_cannot_be_drawn_is_named():
    shown = XML.replace('"ellipsoid"', '"ellipsoid" name="egg"').replace("1 1 1 0", "1 1 1 1")
    with pytest.raises(ValueError, match="'egg'.*'ellipsoid'"):
        system_scene.geometry(mujoco.MjModel.from_xml_string(shown))


def test_extent_of_the_moving_part():
    model = mujoco.MjModel.from_xml_string("""
      <mujoco><worldbody>
        <geom type="sphere" size="9"/>
        <body pos="0 0 1"><freejoint/>
          <geom type="sphere" size="0.1"/><geom type="sphere" size="0.1" pos="0 0 0.8"/>
        </body>
      </worldbody></mujoco>""")
    # Two balls of radius 0.1 whose centers are 0.8 apart: from -0.1 to 0.9 above the body.
    height, radius = system_scene.extent(model, system_scene.geometry(model), 1)
    np.testing.assert_allclose((height, radius), (0.4, 0.5), rtol=1e-6)


@pytest.mark.parametrize("backend", ["spring", "positional", "generalized", "mjx"])
def test_links_of_every_backend_carry_the_geoms(backend):
    env = get_environment("inverted_pendulum", backend=backend)
    q = jnp.array([0.3, 0.1])
    x = jax.jit(lambda q: env.pipeline_init(q, jnp.zeros(2)).x)(q)
    scene = system_scene.link_scene(system_scene.geometry(env.sys.mj_model), x)
    data = mujoco.MjData(env.sys.mj_model)
    data.qpos[:] = q
    mujoco.mj_kinematics(env.sys.mj_model, data)
    np.testing.assert_allclose(scene.position, data.geom_xpos, atol=1e-5)


# --- The memory task.


def recall_episodes(history, choose, n=512):
    """Returns the success of n episodes of `recall` with choose(pixels [n, ...]) -> int32 [n]."""
    env = envs.create("recall", split="train", height=8, width=8, history=history)
    state = jax.jit(env.reset)(keys(n))
    step = jax.jit(env.step)
    for t in range(env.episode_length):
        assert (state.done == 0).all() and (state.metrics["success"] == 0).all()
        np.testing.assert_allclose(state.obs["proprio"].reshape(n, -1)[:, -1], t / 4)
        state = step(state, choose(np.asarray(state.obs["pixels"])))
    assert (state.done == 1).all() and (state.info["truncation"] == 0).all()
    np.testing.assert_array_equal(state.reward, state.metrics["success"])
    return np.asarray(state.reward), np.asarray(state.info["cue"])


def by_color(frame):
    """The action for the color in the middle of frames [n, 8, 8, 3]: red, green, blue, yellow."""
    red, green, blue = np.moveaxis(frame[:, 4, 4].astype(int), -1, 0)
    return jnp.asarray(
        np.select([(red > 90) & (green > 90) & (blue < 60), red > 90, green > blue], [3, 0, 1], 2)
    )


def test_recall_is_solved_with_four_frames():
    success, cue = recall_episodes(4, lambda pixels: by_color(pixels[:, 0]))
    assert success.mean() == 1
    assert set(cue.tolist()) == {0, 1, 2, 3}


def test_recall_shows_one_frame_nothing_when_it_asks():
    # What can be seen at the last step is the same in all episodes, so no policy can use it.
    seen = []

    def choose(pixels):
        seen.append(pixels)
        return jnp.zeros(512, jnp.int32)

    success, cue = recall_episodes(1, choose)
    assert len(np.unique(seen[0][:, 4, 4], axis=0)) == 4
    for frame in seen[1:]:
        assert (frame == frame[:1]).all()
    np.testing.assert_array_equal(success, cue == 0)
    # Chance is 1/4; four standard deviations of the mean of 512 draws are 0.077.
    assert abs(success.mean() - 0.25) < 0.077


def test_recall_tells_the_cue_in_the_picture_only():
    env = Recall()
    states = [jax.jit(env.reset)(jax.random.PRNGKey(i)) for i in range(8)]
    assert len({int(s.info["cue"]) for s in states}) > 1
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state.obs, states[0].obs)


@pytest.mark.parametrize("core", [LanguageReach, LanguageLocomotion])
def test_a_split_decides_what_reset_draws_and_nothing_else(core):
    # Evaluators step the states of all splits with the environment of one.
    programs = []
    splits = envs.splits("language_reach" if core is LanguageReach else "language_locomotion")
    for split in splits:
        env = core(split=split)
        state = jax.eval_shape(env.reset, jnp.zeros(2, jnp.uint32))
        programs.append(jax.make_jaxpr(env.step)(state, jnp.zeros(env.action_size)))
    assert len(programs) == 5
    for program in programs[1:]:
        assert str(program.jaxpr) == str(programs[0].jaxpr)
        for ours, first in zip(program.consts, programs[0].consts, strict=True):
            np.testing.assert_array_equal(ours, first)
