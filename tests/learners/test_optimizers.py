"""Tests of optimizers and schedules of a config against those of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import OptimizerOptions

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
GRADIENTS = {"w": jnp.array([0.3, -0.1]), "b": jnp.array([0.2])}


def updates(transformation, steps=2):
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(steps):
        changes, state = transformation.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, changes)
    return params


@pytest.mark.parametrize(
    ("options", "peer"),
    [
        ({"name": "adam"}, optax.adam(1e-2, eps=1e-5)),
        (
            {"name": "adamw", "weight_decay": 0.1},
            optax.adamw(1e-2, eps=1e-5, weight_decay=0.1),
        ),
        ({"name": "lion", "weight_decay": 0.1}, optax.lion(1e-2, weight_decay=0.1)),
        ({"name": "sgd"}, optax.sgd(1e-2)),
    ],
)
def test_each_is_that_of_optax_behind_a_clip(options, peer):
    made = optimizers.make(
        OptimizerOptions(learning_rate=1e-2, max_grad_norm=0.1, **options), steps=10
    )
    theirs = optax.chain(optax.clip_by_global_norm(0.1), peer)
    jax.tree.map(np.testing.assert_array_equal, updates(made.transformation), updates(theirs))


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # Steps 0, 1, 2, 4, 9, 10 of 10, at most 1.
        ("constant", 0.0, [1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.9, 0.8, 0.6, 0.1, 0]),
        ("cosine", 0.0, [(1 + np.cos(np.pi * t / 10)) / 2 for t in (0, 1, 2, 4, 9, 10)]),
        # Two steps of warm-up, then eight down to 0.
        ("linear", 0.2, [0, 0.5, 1, 0.75, 0.125, 0]),
        ("constant", 0.2, [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(schedule, warmup, expected):
    options = OptimizerOptions(learning_rate=1.0, schedule=schedule, warmup=warmup)
    rate = optimizers.make_schedule(options, 10)
    np.testing.assert_allclose([rate(t) for t in (0, 1, 2, 4, 9, 10)], expected, atol=1e-6)


def test_what_is_not_trained_stays_and_has_no_state():
    made = optimizers.make(
        OptimizerOptions(learning_rate=1e-2), steps=10, is_trained=lambda path: path[0].key == "w"
    )
    state = made.transformation.init(PARAMS)
    sizes = {x.shape for x in jax.tree.leaves(state) if x.ndim}
    assert sizes == {(2,)}
    moved = updates(made.transformation)
    np.testing.assert_array_equal(moved["b"], PARAMS["b"])
    assert np.all(np.asarray(moved["w"]) != PARAMS["w"])


def test_a_weight_decay_that_would_not_be_read_is_refused():
    with pytest.raises(ValueError, match="ppo.optimizer.weight_decay=0.1, but .*'adam' decays"):
        optimizers.check(OptimizerOptions(weight_decay=0.1), "ppo.optimizer")
    optimizers.check(OptimizerOptions(name="adamw", weight_decay=0.1), "ppo.optimizer")
