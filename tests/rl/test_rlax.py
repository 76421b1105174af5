"""Compares with rlax and distrax on random inputs."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from mmrl_jax.rl import advantages, losses
from mmrl_jax.rl.distributions import Categorical, TanhNormal
from tests.rl.test_advantages import an_end_at_every_position

DISCOUNT = 0.93


@pytest.fixture(scope="module")
def ends():
    """Returns ends of 7 steps: every column ends once, in either way, or never."""
    arrays = an_end_at_every_position(steps=7)[:-1]
    names = ("reward", "value", "last_value", "terminated", "truncated")
    return {name: jnp.asarray(x, jnp.float32) for name, x in zip(names, arrays, strict=True)}


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_advantages_with_an_end_of_either_kind_at_every_position(ends, lambda_):
    # In rlax a discount of 0 ends the task, and a lambda of 0 cuts where the value still counts.
    theirs = jax.vmap(rlax.truncated_generalized_advantage_estimation, in_axes=1, out_axes=1)(
        ends["reward"],
        DISCOUNT * (1 - ends["terminated"]),
        lambda_ * (1 - ends["truncated"]),
        jnp.concatenate([ends["value"], ends["last_value"][None]]),
    )
    ours, target = advantages.generalized_advantages(**ends, discount=DISCOUNT, lambda_=lambda_)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target, theirs + ends["value"], rtol=1e-5, atol=1e-6)


def test_bootstrapped_returns(ends):
    value = jnp.concatenate([ends["value"], ends["last_value"][None]])
    theirs = jax.vmap(rlax.lambda_returns, in_axes=1, out_axes=1)(
        ends["reward"], DISCOUNT * (1 - ends["terminated"]), value[1:], 1 - ends["truncated"]
    )
    steps = {name: ends[name] for name in ("reward", "terminated", "truncated")}
    returns, weight, step = advantages.bootstrapped_returns(**steps, discount=DISCOUNT)
    ours = returns + weight * jnp.take_along_axis(value, step, axis=0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clipped_policy_loss_and_its_gradient():
    rng = np.random.default_rng(0)
    log_ratio, advantage = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 500)) * 0.4)

    def ours(x):
        return jnp.mean(losses.clipped_policy_loss(x, advantage, 0.2, 0.2))

    def theirs(x):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(x), advantage, 0.2)

    (a, gradient_a), (b, gradient_b) = (jax.value_and_grad(f)(log_ratio) for f in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(gradient_a, gradient_b, rtol=1e-5, atol=1e-9)


def test_categorical():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(300, 5)) * 3, jnp.float32)
    action = jnp.asarray(rng.integers(0, 5, 300), jnp.int32)
    ours, theirs = Categorical(logits), distrax.Categorical(logits=logits)
    np.testing.assert_allclose(ours.log_prob(action), theirs.log_prob(action), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        ours.entropy(jax.random.key(0)), theirs.entropy(), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_array_equal(ours.mode(), theirs.mode())


def test_tanh_normal():
    rng = np.random.default_rng(2)
    mean, log_std = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 300, 3)) * 0.5)
    theirs = distrax.Transformed(
        distrax.MultivariateNormalDiag(mean, jnp.exp(log_std)), distrax.Block(distrax.Tanh(), 1)
    )
    ours, key = TanhNormal(mean, log_std), jax.random.key(0)
    u = ours.sample(key)
    # By the density of u and the change of volume: distrax's inverse of tanh loses the digits that
    # an action near 1 has no room for.
    volume = theirs.bijector.forward_log_det_jacobian(u)
    np.testing.assert_allclose(
        ours.log_prob(u), theirs.distribution.log_prob(u) - volume, rtol=2e-5, atol=2e-5
    )
    np.testing.assert_allclose(ours.action(u), theirs.bijector.forward(u), rtol=1e-6)
