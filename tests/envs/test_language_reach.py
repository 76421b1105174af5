import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.envs import language_reach as reach
from mmrl_jax.envs.language_reach import LanguageReach
from mmrl_jax.envs.wrappers import AutoReset
from mmrl_jax.rendering import project

EPISODES = 3000
BATCH, STEPS = 8, 16


@pytest.fixture(scope="module")
def resets():
    """What `EPISODES` episodes of a split draw: a function of the split, numpy [N, ...]."""
    drawn = {}

    def draw(split):
        if split not in drawn:
            env = LanguageReach(split=split)
            keys = jax.random.split(jax.random.PRNGKey(7), EPISODES)
            # Without the pipeline state the physics need not be compiled.
            info = jax.jit(jax.vmap(lambda key: env.reset(key).info))(keys)
            drawn[split] = jax.tree.map(np.asarray, info)
        return drawn[split]

    return draw


@pytest.fixture(scope="module")
def batched():
    """A batch without pixels, compiled once: environment, reset and step."""
    env = AutoReset(LanguageReach(episode_length=STEPS))
    return env, jax.jit(env.reset), jax.jit(env.step)


def keys(n, seed=0):
    return jax.random.split(jax.random.PRNGKey(seed), n)


def pairs(info, active_only=True):
    """The set of (color, shape) of active objects in any episode."""
    objects = info["objects"]
    active = objects["active"] > 0
    return set(zip(objects["colour"][active], objects["shape"][active], strict=True))


def sentence(tokens):
    """An instruction as its template: slots in place of the words that fill them."""
    words = reach.TEMPLATES.vocabulary.decode(tokens).split()
    slot = {w: "{color}" for w in reach.COLORS} | {w: "{shape}" for w in reach.NOUNS}
    return " ".join(slot.get(w, w) for w in words)


def sentences(info):
    return {sentence(t) for t in np.unique(info["tokens"], axis=0)}


HELDOUT_PAIRS = {(c, s) for c, s in np.argwhere(reach.HELDOUT)}


# --- Splits.


def test_a_heldout_pair_is_on_no_training_table(resets):
    for split in set(reach.SPLITS) - {"heldout_colour_shape"}:
        everything = {(c, s) for c in range(len(reach.COLORS)) for s in range(len(reach.SHAPES))}
        # All others do occur, each color and each shape among them.
        assert pairs(resets(split)) == everything - HELDOUT_PAIRS
    for axis in (0, 1):
        assert {p[axis] for p in pairs(resets("train"))} >= {p[axis] for p in HELDOUT_PAIRS}


def test_the_heldout_pairs_are_what_that_split_names(resets):
    info = resets("heldout_colour_shape")
    at = np.arange(EPISODES), info["target"]
    named = set(zip(info["objects"]["colour"][at], info["objects"]["shape"][at], strict=True))
    assert named == HELDOUT_PAIRS
    # The others are of all pairs, so that the named one is not known by being odd.
    others = info["objects"]["active"].copy()
    others[at] = 0
    found = pairs({"objects": info["objects"] | {"active": others}})
    assert found == {(c, s) for c in range(len(reach.COLORS)) for s in range(len(reach.SHAPES))}


def test_heldout_sentences_are_disjoint(resets):
    assert not set(reach.SENTENCES) & set(reach.HELDOUT_SENTENCES)
    for split in set(reach.SPLITS) - {"heldout_paraphrase"}:
        assert sentences(resets(split)) == set(reach.SENTENCES)
    assert sentences(resets("heldout_paraphrase")) == set(reach.HELDOUT_SENTENCES)


def test_no_word_is_new_in_a_heldout_sentence():
    def words(templates):
        return {w for t in templates for w in t.split()}

    assert words(reach.HELDOUT_SENTENCES) <= words(reach.SENTENCES)


def test_physics_factors_are_disjoint(resets):
    for split in set(reach.SPLITS) - {"heldout_physics"}:
        for factor in resets(split)["physics"]:
            assert factor.min() >= 0.9 and factor.max() <= 1.1
            assert factor.std() > 0.03
    held = resets("heldout_physics")["physics"]
    assert held.mass.min() > 1.3 and held.friction.min() > 1.3 and held.gain.max() < 0.7


def test_the_camera_moves_in_its_split_only(resets):
    for split in set(reach.SPLITS) - {"heldout_camera"}:
        camera = resets(split)["camera"]
        assert (camera["position"] == reach.CAMERA_POSITION).all()
        assert (camera["target"] == reach.CAMERA_TARGET).all()
    moved = resets("heldout_camera")["camera"]["position"] - reach.CAMERA_POSITION
    assert (np.linalg.norm(moved, axis=-1) > 0.1).all()


def test_a_heldout_split_differs_in_one_respect(resets):
    # The same keys: everything that a split does not hold out is drawn alike.
    train = resets("train")
    for split, field in [("heldout_physics", "physics"), ("heldout_camera", "camera")]:
        other = resets(split)
        for name in ("objects", "target", "tokens", "physics", "camera"):
            same = all(
                np.array_equal(a, b)
                for a, b in zip(
                    jax.tree.leaves(train[name]), jax.tree.leaves(other[name]), strict=True
                )
            )
            assert same == (name != field)


# --- What an episode is.


@pytest.mark.parametrize("split", reach.SPLITS)
def test_the_instruction_names_exactly_one_object(resets, split):
    info = resets(split)
    objects, vocabulary = info["objects"], reach.TEMPLATES.vocabulary
    token = {w: i + 1 for i, w in enumerate(vocabulary.words)}
    colors = np.array([token[w] for w in reach.COLORS])
    nouns = np.array([token[w] for w in reach.NOUNS])

    def said(words):
        found = (info["tokens"][:, :, None] == words).any(1)
        assert (found.sum(1) == 1).all()
        return found.argmax(1)

    color, shape = said(colors), said(nouns) % len(reach.SHAPES)
    match = (
        (objects["active"] > 0)
        & (objects["colour"] == color[:, None])
        & (objects["shape"] == shape[:, None])
    )
    np.testing.assert_array_equal(match.sum(1), 1)
    np.testing.assert_array_equal(match.argmax(1), info["target"])


def test_objects_are_apart_within_reach_and_in_view(resets):
    for split in reach.SPLITS:
        info = resets(split)
        objects = info["objects"]
        active = objects["active"] > 0
        count = active.sum(1)
        assert set(count.tolist()) == {3, 4, 5}
        place = objects["position"][..., :2]
        away = np.linalg.norm(place, axis=-1)[active]
        assert away.min() > reach.NEAREST - 1e-5 and away.max() < reach.FARTHEST + 1e-5
        assert away.max() < 2 * reach.LINK
        apart = np.linalg.norm(place[:, :, None] - place[:, None], axis=-1)
        both = active[:, :, None] & active[:, None] & ~np.eye(reach.OBJECTS, dtype=bool)
        # Farther than two cubes are wide, and only one object can be touched at a time; in all but
        # a few scenes even cubes that stand corner to corner do not meet.
        assert apart[both].min() > 2 * reach.TOUCH
        assert (apart[both] < 2 * np.sqrt(2) * reach.SIZES[1, 0]).mean() < 0.02
        pixel = project(
            jax.tree.map(lambda x: x[:, None], reach._camera(info["camera"])),
            objects["position"],
        )
        assert ((pixel > 0) & (pixel < 1)).all(-1)[active].all()


def test_the_target_is_any_object_and_any_place(resets):
    info = resets("train")
    # Each slot is meant in 1/6 of the episodes; four standard deviations are 0.027.
    share = np.bincount(info["target"], minlength=reach.OBJECTS) / EPISODES
    np.testing.assert_allclose(share, 1 / reach.OBJECTS, atol=0.028)
    left = info["privileged"]["target_place"][:, 0] < 0
    assert abs(left.mean() - 0.5) < 0.04


def test_bad_arguments_are_refused():
    for arguments, message in [
        ({"split": "test"}, "split='test'"),
        ({"reward": "none"}, "reward='none'"),
        ({"episode_length": 8}, "episode_length=8"),
    ]:
        with pytest.raises(ValueError, match=message):
            LanguageReach(**arguments)


# --- What the policy sees.


def test_proprioception_knows_no_object():
    env = LanguageReach()
    state = jax.jit(env.reset)(jax.random.PRNGKey(0))
    other = jax.jit(env.reset)(jax.random.PRNGKey(1))
    assert not np.array_equal(state.info["tokens"], other.info["tokens"])
    # The arm of the one, the objects and the target of the other.
    mixed = state.replace(info=other.info)
    np.testing.assert_array_equal(env._observe(mixed)["proprio"], state.obs["proprio"])
    np.testing.assert_array_equal(
        env._observe(mixed)["instruction"]["tokens"], other.obs["instruction"]["tokens"]
    )


def test_privileged_targets_are_no_input(batched):
    env, reset, step = batched
    state = reset(keys(BATCH))
    lie = jax.tree.map(lambda x: x + 1.0, state.info["privileged"])
    told = state.replace(info=state.info | {"privileged": lie})
    action = jnp.full((BATCH, 2), 0.3)
    after, after_lie = step(state, action), step(told, action)
    for part in ("obs", "reward", "done", "metrics"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(after_lie, part))
    pictures = [env.env.scene(jax.tree.map(lambda x: x[0], s)) for s in (state, told)]
    jax.tree.map(np.testing.assert_array_equal, *pictures)


def test_the_picture_shows_the_objects_that_are_there():
    env = envs.create("language_reach", split="train", height=48, width=48, history=1)
    episodes = 64
    state = jax.jit(env.reset)(keys(episodes))
    assert state.obs["pixels"].dtype == jnp.uint8
    objects, camera = state.info["objects"], reach._camera(state.info["camera"])
    pixel = project(jax.tree.map(lambda x: x[:, None], camera), objects["position"])
    column, row = np.moveaxis(np.asarray(pixel * 48).astype(int), -1, 0)
    # The color in the middle of an object, its brightness taken out; the arm may cover a few.
    batch = np.arange(episodes)[:, None]
    seen = np.asarray(state.obs["pixels"]).astype(float)[batch, row, column]
    want = reach.RGB[np.asarray(objects["colour"])]
    seen, want = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (seen, want))
    match = (seen * want).sum(-1) > 0.99
    active = np.asarray(objects["active"]) > 0
    assert match[active].mean() > 0.9
    assert match[~active].mean() < 0.1


# --- Dynamics.


def test_interface_and_truncation(batched):
    env, reset, step = batched
    state = first = reset(keys(BATCH))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for t in range(1, STEPS + 1):
        state = step(state, jnp.ones((BATCH, 2)))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        np.testing.assert_array_equal(state.done, float(t == STEPS))
        np.testing.assert_array_equal(state.info["truncation"], float(t == STEPS))
    assert env.observation_size == jax.tree.map(lambda x: x.shape[1:], state.obs)
    assert (env.action_size, env.action_kind) == (2, "continuous")
    state = step(state, jnp.ones((BATCH, 2)))
    assert (state.info["was_reset"] == 1).all()
    assert not np.array_equal(state.info["objects"]["position"], first.info["objects"]["position"])


def test_an_environment_does_not_depend_on_the_batch(batched):
    env, reset, step = batched
    few, many = reset(keys(BATCH)[:4]), reset(keys(BATCH))
    for _ in range(STEPS + 3):
        few, many = step(few, jnp.full((4, 2), 0.2)), step(many, jnp.full((BATCH, 2), 0.2))
    part = jax.tree.map(lambda x: x[:4], many)
    for name in ("objects", "target", "tokens", "key", "episode"):
        jax.tree.map(np.testing.assert_array_equal, few.info[name], part.info[name])
    # XLA may order the sums of another batch size otherwise.
    np.testing.assert_allclose(few.obs["proprio"], part.obs["proprio"], atol=1e-5)


def test_kinematics_agree_with_the_physics_and_invert(batched):
    env, reset, step = batched
    state = step(reset(keys(BATCH)), jnp.ones((BATCH, 2)))
    x, q = state.pipeline_state.x, state.pipeline_state.q
    # The lower link points along its local x axis: the first column of its quaternion's matrix.
    w, a, b, c = np.moveaxis(np.asarray(x.rot[:, 1]), -1, 0)
    along = np.stack([1 - 2 * (b * b + c * c), 2 * (a * b + w * c)], -1)
    tip = np.asarray(x.pos[:, 1, :2]) + reach.LINK * along
    np.testing.assert_allclose(reach.forward_kinematics(q), tip, atol=1e-4)
    np.testing.assert_allclose(
        reach.forward_kinematics(reach.inverse_kinematics(jnp.asarray(tip))), tip, atol=1e-4
    )


def test_dense_reward_and_success_by_hand(batched):
    env, reset, step = batched
    state = reset(keys(BATCH))
    before = np.asarray(state.metrics["distance"])
    after = step(state, jnp.ones((BATCH, 2)))
    tip = reach.forward_kinematics(after.pipeline_state.q)
    place = jnp.take_along_axis(
        after.info["objects"]["position"], after.info["target"][:, None, None], axis=1
    )[:, 0, :2]
    distance = np.linalg.norm(tip - place, axis=-1)
    np.testing.assert_allclose(after.metrics["distance"], distance, atol=1e-5)
    touch = (distance < 0.1).astype(np.float32)
    np.testing.assert_array_equal(after.metrics["success"], touch)
    np.testing.assert_allclose(after.reward, 2 * (before - distance) + 0.25 * touch, atol=1e-5)


def test_the_arm_is_stable_in_every_physics(batched):
    env, reset, step = batched
    factors = [[0.9, 1.1, 1.1], [0.9, 1.1, 0.9], [1.1, 0.9, 1.1], [1.4, 1.6, 0.4], [1.6, 1.6, 0.6]]
    # Nearly straight, where it once blew up, is elbow = 0; it is held there against kicks.
    grid = [(f, elbow) for f in factors for elbow in (0.0, 0.2, 0.75)]
    state = reset(keys(len(grid)))
    physics = reach.Physics(*jnp.array([f for f, _ in grid]).T)
    hold = jnp.stack([jnp.full(len(grid), 1.2), jnp.array([e for _, e in grid])], -1)
    init = jax.jit(jax.vmap(env.env._pipeline.init, (None, 0, 0)))
    state = state.replace(
        info=state.info | {"physics": physics},
        pipeline_state=init(env.env.sys, hold, jnp.zeros_like(hold)),
    )
    for t in range(STEPS - 1):
        kick = 0.3 * (t % 5 == 0)
        state = step(state, jnp.clip(4 * (hold - state.pipeline_state.q) + kick, -1, 1))
        assert np.abs(state.pipeline_state.qd).max() < reach.MAX_SPEED


def test_each_physics_factor_matters(batched):
    env, reset, step = batched
    state = reset(keys(4))
    # The same arm four times: nominal, heavier, stickier, weaker.
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 4, 0), state.pipeline_state)
    factors = 1 + 0.3 * jnp.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, -1.0]])
    physics = reach.Physics(*factors.T)
    state = state.replace(pipeline_state=same, info=state.info | {"physics": physics})
    for _ in range(3):
        state = step(state, jnp.full((4, 2), 0.7))
    q = np.asarray(state.pipeline_state.q)
    for other in q[1:]:
        assert np.abs(other - q[0]).max() > 5e-3


def test_the_sparse_reward_is_the_touch(batched):
    _, reset, step = batched
    sparse = AutoReset(LanguageReach(episode_length=STEPS, reward="sparse"))
    state = reset(keys(BATCH))
    after = jax.jit(sparse.step)(state, jnp.zeros((BATCH, 2)))
    np.testing.assert_array_equal(after.reward, after.metrics["success"])


def test_a_good_expert_succeeds_and_an_idle_one_does_not():
    env = AutoReset(LanguageReach())

    @jax.jit
    def success(rng, idle):
        state = env.reset(jax.random.split(rng, 512))

        def step(state, t):
            key = jax.random.fold_in(rng, t)
            action = reach.expert_action(state, key, gain=4.0, undershoot=0.0, noise=0.0)
            return env.step(state, jnp.where(idle, 0.0, action)), None

        state, _ = jax.lax.scan(step, state, jnp.arange(env.episode_length))
        return state.metrics["success"].mean(), state.done

    reached, done = success(jax.random.PRNGKey(5), False)
    assert (done == 1).all()
    assert reached > 0.95
    idle, _ = success(jax.random.PRNGKey(5), True)
    assert idle < 0.15
