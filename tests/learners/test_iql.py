"""Tests of mmrl_jax.learners.iql with critics that are small enough to be written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import iql, learner
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import losses
from mmrl_jax.rl.distributions import Categorical, TanhNormal
from tests.learners.test_awr import jit, start, steps
from tests.linear_policy import apply

OUTPUT = PolicyOutput(Categorical(jnp.zeros((1, 2))), jnp.zeros(1), {}, features=jnp.zeros((1, 1)))


def new_critics(output=OUTPUT, options=None, seed=0):
    return iql.extras(options or iql.IQL(), {}, output, jax.random.key(seed))["critics"]


def constant_critics(*values):
    """Returns parameters of critics with constant values: only the last bias is not zero."""
    params = jax.tree.map(jnp.zeros_like, new_critics().params)
    return params | {"bias_2": jnp.array(values).reshape(-1, 1, 1)}


def updated(options, params, critics, batch, *, optimizer, count=1):
    """Returns the learner after some updates, and the last metrics."""
    state = learner.init(params, proprio_size=1, optimizer=optimizer)
    state = state.replace(extras={"critics": critics})

    def take(state, _):
        key = jax.random.key(0)  # Nothing of an update is random.
        return iql.update(state, batch, key, apply=apply, optimizer=optimizer, options=options)

    state, metrics = jit(lambda state: jax.lax.scan(take, state, None, length=count))(state)
    return state, jax.tree.map(lambda x: x[-1], metrics)


def test_one_step_by_hand():
    # One state x = 1 with v(x) = 0.4 x. The target critics are 2 and 1, the critics 0.5 and 0.
    #   u        min(2, 1) - 0.4 = 0.6 for both steps, the weights exp(3 * 0.6) = exp(1.8)
    #   policy   log 2 * exp(1.8)
    #   value    0.7 * 0.6^2 = 0.252; d/dv = -2 * 0.7 * 0.6 = -0.84, times the coefficient 0.5
    #   critics  The first step goes on to x = 2: its target is 1 + 0.9 * 0.8 = 1.72. The second one
    #            terminated: -1. (1.22^2 + 1.72^2) / 2 = 2.2234, (1.5^2 + 1^2) / 2 = 1.625.
    #            d/dbias = (-1.22 + 1.5) / 2 = 0.14 and (-1.72 + 1) / 2 = -0.36: the first step of
    #            Adam goes 0.1 against the sign of each, to 0.4 and 0.1.
    #   targets  2 + 0.005 * (0.4 - 2) and 1 + 0.005 * (0.1 - 1)
    batch = steps([0, 1], [1.0, -1.0], bootstrap_weight=jnp.array([0.9, 0.0]))
    batch = batch._replace(next_observation={"proprio": jnp.array([[2.0], [jnp.nan]])})
    critics = new_critics().replace(
        params=constant_critics(0.5, 0.0), target=constant_critics(2.0, 1.0)
    )
    params, options = start() | {"value": jnp.array([0.4])}, iql.IQL(critic_learning_rate=0.1)
    state, metrics = updated(options, params, critics, batch, optimizer=optax.sgd(1.0))
    weight = math.exp(1.8)
    expected = {
        "loss/awr": math.log(2) * weight,
        "loss/value": 0.252,
        "loss/critic": (2.2234 + 1.625) / 2,
        "policy/weight_mean": weight,
        "policy/weight_max": weight,
        "policy/effective_sample_size": 1.0,
        "optimizer/steps": 1.0,
    }
    expected["loss/total"] = math.log(2) * weight + 0.5 * 0.252
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    np.testing.assert_allclose(state.params["value"], [0.4 + 0.42], rtol=1e-5)
    # The two actions have equal weights, which cancel out.
    np.testing.assert_allclose(state.params["policy"], np.zeros((1, 2)), atol=1e-6)
    found = state.extras["critics"]
    np.testing.assert_allclose(found.params["bias_2"].ravel(), [0.4, 0.1], rtol=1e-4)
    moved = [2 - 0.005 * 1.6, 1 - 0.005 * 0.9]
    np.testing.assert_allclose(found.target["bias_2"].ravel(), moved, rtol=1e-6)
    assert sorted(state.params) == sorted(params)


def test_an_expectile_weighs_errors_by_their_sign():
    # 0.3 * (-2)^2 and 0.7 * 1^2; with 0.5 it is the loss of a value.
    error = jnp.array([-2.0, 1.0])
    np.testing.assert_allclose(losses.expectile_loss(error, 0.7), [1.2, 0.7], rtol=1e-6)
    zeros = jnp.zeros(2)
    expected = losses.value_loss(zeros, error, zeros, None)
    np.testing.assert_allclose(losses.expectile_loss(error, 0.5), expected, rtol=1e-6)


def test_of_demonstrations_of_which_half_are_bad_it_prefers_the_good_ones():
    # The critics learn 0 for the first action and 1 for the second. The value v with
    # 0.3 * (0 - v) + 0.7 * (1 - v) = 0 is 0.7, so that the weights are exp(3 * (0 - 0.7)) and
    # exp(3 * 0.3), and weighted cross-entropy is least at p = sigmoid(3 * 0.3 + 3 * 0.7).
    batch = steps([0, 1, 0, 1], [0.0, 1.0, 0.0, 1.0])
    options, optimizer = iql.IQL(target_rate=0.2, critic_learning_rate=0.02), optax.adam(0.02)
    critics = new_critics(options=options, seed=1)
    state, metrics = updated(options, start(), critics, batch, optimizer=optimizer, count=2000)
    assert float(jax.nn.softmax(state.params["policy"][0])[1]) == pytest.approx(0.952574, abs=2e-3)
    assert float(state.params["value"][0]) == pytest.approx(0.7, abs=1e-3)
    assert float(metrics["loss/critic"]) < 1e-3


def test_critics_fit_the_actions_of_a_policy_and_differ():
    mean = jnp.zeros((1, 3))
    output = OUTPUT.replace(distribution=TanhNormal(mean, mean), features=jnp.zeros((1, 4)))
    critics = new_critics(output)
    params, target = critics.params, critics.target
    jax.tree.map(np.testing.assert_array_equal, params, target)
    assert params["weight_0"].shape == (2, 4 + 3, 256)
    batch = output.replace(features=jnp.ones((5, 4)))
    values = iql.action_values(params, batch, jnp.ones((5, 3)))
    assert values.shape == (2, 5) and float(jnp.min(jnp.abs(values[0] - values[1]))) > 0
    slope = jax.grad(lambda x: jnp.sum(iql.action_values(params, batch.replace(features=x), mean)))
    np.testing.assert_array_equal(slope(jnp.ones((1, 4))), np.zeros((1, 4)))
