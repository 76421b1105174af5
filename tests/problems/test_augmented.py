"""Tests of the augmentation of what a control policy learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.learners import bc, dapg
from mmrl_jax.learners.learner import Rollout
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import augmented
from mmrl_jax.types import Transition
from tests import tiny

SHIFT = {"shift": 2}


def augment_of(name="ppo", **changes):
    config = tiny.config("reach_ppo")
    config[name].augmentation.update(changes)
    config.model.pointing = "target"
    return augmented.make(config, name, problems.control.make_env(config))


def dot(count):
    """Returns observations of a white pixel, and its position as privileged target."""
    pixels = np.zeros((count, 16, 16, 3), np.uint8)
    pixels[:, 8, 5] = 255
    place = np.tile(np.array([5.5 / 16, 8.5 / 16], np.float32), (count, 1))
    return {"pixels": jnp.asarray(pixels), "proprio": jnp.zeros((count, 3))}, {"target": place}


def assert_found(pixels, place):
    """Checks that the position of each image is that of its white pixel; returns the columns."""
    for image, (x, y) in zip(np.asarray(pixels), np.asarray(place), strict=True):
        assert image[int(y * 16), int(x * 16), 0] == 255
    return {int(x * 16) for x, _ in np.asarray(place)}


def demonstrations(count):
    observation, privileged = dot(count)
    zero = jnp.zeros(count)
    return bc.Demonstrations(observation, zero[:, None], zero, zero.astype(int), zero, privileged)


def rollout():
    observation, privileged = jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), dot(32))
    zero = jnp.zeros((4, 8))
    steps = Transition(observation, zero, zero, zero, zero, zero, zero, zero, privileged, {})
    return Rollout(steps, dot(8)[0])


def test_a_rollout_moves_with_the_place_that_is_pointed_at():
    found = augment_of(**SHIFT)(rollout(), jax.random.key(0))
    steps = jax.tree.map(lambda x: x.reshape(32, *x.shape[2:]), found.transitions)
    columns = assert_found(steps.observation["pixels"], steps.privileged["target"])
    assert columns == {3, 4, 5, 6, 7}
    np.testing.assert_array_equal(found.last_observation["pixels"], rollout()[1]["pixels"])


def test_a_value_and_its_target_see_the_same_change():
    data = demonstrations(16)
    found = augment_of("bc", **SHIFT)(bc.Batch(data, data.observation), jax.random.key(0))
    samples = found.samples
    assert len(assert_found(samples.observation["pixels"], samples.privileged["target"])) > 2
    np.testing.assert_array_equal(found.next_observation["pixels"], samples.observation["pixels"])


def test_demonstrations_beside_a_rollout_are_changed_too():
    given = dapg.DemonstratedRollout(rollout(), demonstrations(16), jnp.int32(0))
    found = augment_of(**SHIFT)(given, jax.random.key(0))
    samples = found.demonstrations
    assert len(assert_found(samples.observation["pixels"], samples.privileged["target"])) > 2
    pixels = found.rollout.transitions.observation["pixels"]
    assert not np.array_equal(pixels, rollout().transitions.observation["pixels"])


def test_off_is_no_augmentation():
    assert augment_of() is None


def test_the_first_ratio_of_ppo_is_1_on_changed_images(tmp_path):
    config = tiny.config(
        "reach_ppo_scratch",
        ppo__augmentation={"shift": 3, "brightness": 0.5, "noise": 20.0},
        ppo__num_minibatches=1,
        ppo__num_updates=2,
    )
    mmrl_jax.train(config, tmp_path)
    rows = [row for row in metrics.read_jsonl(tmp_path / "metrics.jsonl") if "lr" in row]
    # A single step: the policy has not moved.
    assert len(rows) == 2 and all(abs(row["policy/approx_kl"]) < 1e-9 for row in rows)


def test_each_update_changes_demonstrations_differently():
    problem = problems.make(tiny.config("reach_ppo"))
    source = problem._source("bc", problem._apply())
    carry = problem.stage("bc").init()
    constants = problem.stage("bc").constants
    keys = [
        jax.random.key_data(source.collect(carry.replace(updates=jnp.int32(u)), constants).key)
        for u in (0, 1)
    ]
    assert not np.array_equal(*keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bc__augmentation": {"hue": 0.1}}, "bc.augmentation.hue=0.1 .* (blue|green)"),
        ({"ppo__augmentation": {"shift": 16}}, "ppo.augmentation.shift=16 must be smaller"),
        ({"ppo__augmentation": {"cutout": 99}}, "ppo.augmentation.cutout=99 must be smaller"),
        ({"ppo__augmentation": {"brightness": 2.0}}, "'ppo.augmentation.brightness' is 2.0"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.make(tiny.config("reach_ppo", **changes))


def test_novelty_is_not_measured_on_changed_images():
    config = tiny.config("reach_ppo_scratch", stages=("rnd",), rnd__augmentation=SHIFT)
    with pytest.raises(ValueError, match="rnd.augmentation is set, but 'rnd' would take"):
        problems.make(config)


def test_without_images_there_is_nothing_to_change():
    config = tiny.config("mlp_ppo", **tiny.FAST, ppo__augmentation=SHIFT)
    with pytest.raises(ValueError, match="ppo.augmentation is set, but env.height=0"):
        problems.make(config)
