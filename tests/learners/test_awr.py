"""Tests of mmrl_jax.learners.awr on demonstrations whose weights are derived by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import awr, bc, learner
from mmrl_jax.rl import losses
from tests.linear_policy import apply

# Compiled quickly: nothing here runs for long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

OPTIONS = awr.AWR(value_coef=1.0, beta=0.5, max_weight=5.0)


def start(actions="discrete"):
    """Returns the parameters of linear heads over one reading, all zero."""
    params = {
        "policy": jnp.zeros((1, 2 if actions == "discrete" else 1)),
        "value": jnp.zeros(1),
        "place": jnp.zeros((1, 2)),
        "target": jnp.zeros((1, 2)),
    }
    return params | ({} if actions == "discrete" else {"log_std": jnp.zeros(1)})


def steps(action, returns, **changes):
    """Returns a batch of steps in one state, whose reading is 1, after which episodes end."""
    n = len(returns)
    samples = bc.Demonstrations(
        observation={"proprio": jnp.ones((n, 1))},
        action=jnp.asarray(action),
        value_return=jnp.asarray(returns, jnp.float32),
        bootstrap=jnp.arange(n),
        bootstrap_weight=jnp.zeros(n),
        privileged={"place": jnp.zeros((n, 2)), "target": jnp.zeros((n, 2))},
    )
    return bc.Batch(samples.replace(**changes), {"proprio": jnp.full((n, 1), jnp.nan)})


def updated(update, options, params, batch, *, count=1, rate=1.0):
    """Returns the parameters after some updates with plain gradients, and the last metrics."""
    optimizer = optax.sgd(rate)
    state = learner.init(params, proprio_size=1, optimizer=optimizer)

    @jit
    def take(state):
        key = jax.random.key(0)  # Nothing of an update is random.
        return update(state, batch, key, apply=apply, optimizer=optimizer, options=options)

    for _ in range(count):
        state, metrics = take(state)
    return state.params, metrics


def test_weights_and_one_step_by_hand():
    # Returns 0 and 2, values 0: the advantages 0 and 2 have mean 1 and standard deviation 1, and
    # are -1 and 1 after normalization. Divided by beta = 0.5, their exponentials are
    # exp(-2) = 0.135335 and exp(2) = 7.389, which is clipped to 5.
    #   loss         log 2 * (0.135335 + 5) / 2
    #   d/dlogits    mean of w * (p - one-hot): (0.135335 * (-1/2, 1/2) + 5 * (1/2, -1/2)) / 2
    #   d/dvalue     mean of v - target = -1: the weights have no gradient.
    low = math.exp(-2)
    params, metrics = updated(awr.update, OPTIONS, start(), steps([0, 1], [0.0, 2.0]))
    expected = {
        "loss/awr": math.log(2) * (low + 5) / 2,
        "loss/value": 0.5 * (0 + 4) / 2,
        "policy/weight_mean": (low + 5) / 2,
        "policy/weight_max": 5.0,
        "policy/effective_sample_size": (low + 5) ** 2 / (2 * (low**2 + 25)),
        "value/explained_variance": 1 - 2.0 / 1.0,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert "loss/bc" not in metrics
    slope = (5 - low) / 4
    np.testing.assert_allclose(params["policy"][0], [-slope, slope], rtol=1e-5)
    np.testing.assert_allclose(params["value"], [1.0], rtol=1e-6)


def test_a_weight_never_overflows():
    weight = losses.advantage_weights(jnp.array([1000.0, 0.0, -1000.0]), 20.0)
    np.testing.assert_array_equal(weight, [20.0, 1.0, 0.0])


@pytest.mark.parametrize("actions", ["discrete", "continuous"])
def test_with_equal_advantages_it_clones(actions):
    action = jnp.array([0, 1, 1]) if actions == "discrete" else jnp.array([[0.5], [-0.2], [0.9]])
    batch = steps(action, [0.5, 0.5, 0.5])
    options = bc.BC(value_coef=OPTIONS.value_coef)
    params, metrics = updated(awr.update, OPTIONS, start(actions), batch)
    cloned, expected = updated(bc.update, options, start(actions), batch)
    jax.tree.map(np.testing.assert_array_equal, params, cloned)
    assert metrics["loss/awr"] == expected["loss/bc"] and metrics["loss/total"] != 0
    assert metrics["policy/effective_sample_size"] == 1


def test_what_is_unknown_after_a_termination_changes_nothing():
    # The observations after the steps are NaN. Only the second step is followed by a value: the
    # first two terminate.
    batch = steps([0, 1, 1], [1.0, 0.0, 0.0], bootstrap_weight=jnp.array([0.0, 0.0, 0.5]))
    after = {"proprio": jnp.array([[jnp.nan], [jnp.nan], [2.0]])}
    params, metrics = updated(awr.update, OPTIONS, start(), batch._replace(next_observation=after))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((params, metrics)))
    assert metrics["optimizer/steps"] == 1


def test_the_value_behind_a_limit_counts_in_the_advantage():
    # v(x) = 3 x is 3, 6 and 3. The first two steps terminated with the returns 3 and 6: their
    # advantages are 0. The last one was truncated where x = 4: its target is 0 + 0.5 * 12 = 6, and
    # its advantage 3. The mean of the advantages is 1 and their standard deviation sqrt(2), so that
    # they are -1 / sqrt(2) twice and sqrt(2) after normalization. The targets 3, 6 and 6 have
    # variance 2, of which the mean squared advantage 3 is 3 / 2.
    batch = steps(
        [0, 1, 1],
        [3.0, 6.0, 0.0],
        observation={"proprio": jnp.array([[1.0], [2.0], [1.0]])},
        bootstrap_weight=jnp.array([0.0, 0.0, 0.5]),
    )
    batch = batch._replace(next_observation={"proprio": jnp.array([[jnp.nan], [jnp.nan], [4.0]])})
    options = awr.AWR(beta=1.0, max_weight=20.0)
    _, metrics = updated(awr.update, options, start() | {"value": jnp.array([3.0])}, batch)
    largest = math.exp(math.sqrt(2))
    assert float(metrics["policy/weight_max"]) == pytest.approx(largest, rel=1e-5)
    mean = (largest + 2 * math.exp(-1 / math.sqrt(2))) / 3
    assert float(metrics["policy/weight_mean"]) == pytest.approx(mean, rel=1e-5)
    assert float(metrics["value/explained_variance"]) == pytest.approx(-0.5, rel=1e-5)


def test_of_demonstrations_of_which_half_are_bad_it_prefers_the_good_ones():
    # The normalized advantages are -1 and 1, the weights exp(-1) and exp(1). Weighted
    # cross-entropy is least at p = e / (e + 1 / e) = sigmoid(2), the weighted squared error at
    # 0.5 * (e - 1 / e) / (e + 1 / e) = 0.5 * tanh(1). Cloning finds 1/2, and 0.
    options, cloning, fast = awr.AWR(), bc.BC(), {"count": 300, "rate": 0.2}
    batch = steps([0, 1, 0, 1], [0.0, 1.0, 0.0, 1.0])
    params, _ = updated(awr.update, options, start(), batch, **fast)
    assert float(jax.nn.softmax(params["policy"][0])[1]) == pytest.approx(0.880797, abs=1e-3)
    params, _ = updated(bc.update, cloning, start(), batch, **fast)
    assert float(jax.nn.softmax(params["policy"][0])[1]) == pytest.approx(0.5, abs=1e-3)
    action = jnp.array([[-0.5], [0.5], [-0.5], [0.5]])
    batch = steps(action, [0.0, 1.0, 0.0, 1.0])
    params, _ = updated(awr.update, options, start("continuous"), batch, **fast)
    assert math.tanh(float(params["policy"][0, 0])) == pytest.approx(0.380797, abs=1e-3)
    params, _ = updated(bc.update, cloning, start("continuous"), batch, **fast)
    assert float(params["policy"][0, 0]) == pytest.approx(0.0, abs=1e-3)
    assert params["log_std"] == 0  # The spread is not learned, as in behavior cloning.
