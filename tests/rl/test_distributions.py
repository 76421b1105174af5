"""Tests of mmrl_jax.rl.distributions: values by hand, integrals, and Brax's distribution."""

from brax.training.distribution import NormalTanhDistribution
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.rl.distributions import Categorical, TanhNormal


def tanh_normal(mean, std):
    return TanhNormal(jnp.asarray(mean, jnp.float32), jnp.log(jnp.asarray(std, jnp.float32)))


def test_tanh_normal_by_hand():
    # At u = mean = 0 and std 2, 0.5: log N = -log 2 - log 0.5 - log(2 pi) = -1.8378771, and
    # log(1 - tanh(0)^2) = 0.
    distribution = tanh_normal([0.0, 0.0], [2.0, 0.5])
    assert float(distribution.log_prob(jnp.zeros(2))) == pytest.approx(-1.8378771, rel=1e-6)
    # u = (log 2) / 1 under N(0, 1): tanh(log 2) = (2 - 1/2) / (2 + 1/2) = 0.6, so the density
    # gains -log(1 - 0.36) = 0.4462871; log N = -0.5 * 0.4804530 - 0.9189385 = -1.1591650.
    distribution = tanh_normal([0.0], [1.0])
    log_prob = distribution.log_prob(jnp.log(jnp.array([2.0])))
    assert float(log_prob) == pytest.approx(-0.7128779, rel=1e-5)
    assert float(distribution.action(jnp.log(2.0))) == pytest.approx(0.6, rel=1e-6)
    np.testing.assert_array_equal(
        tanh_normal([0.3, -1.0], [1.0, 1.0]).mode(), np.float32([0.3, -1])
    )


def test_tanh_normal_integrates_to_one_over_actions():
    action = np.linspace(-1, 1, 20002)[1:-1]
    distribution = tanh_normal(np.full((action.size, 1), 0.4), np.full((action.size, 1), 0.7))
    density = np.exp(distribution.log_prob(jnp.asarray(np.arctanh(action)[:, None])))
    assert np.trapezoid(density, action) == pytest.approx(1.0, abs=1e-4)


def test_tanh_normal_is_exact_where_the_action_rounds_to_one():
    # At u = 20, tanh(u) is 1 in float32, and log(1 - tanh(u)^2) = log 4 - 2u up to e^-2u: -38.6137.
    # log N(20; 20, 1) = -0.9189385; together 37.694767.
    distribution = tanh_normal([20.0], [1.0])
    u = jnp.array([20.0])
    assert float(distribution.log_prob(u)) == pytest.approx(37.694767, rel=1e-6)
    assert np.isfinite(jax.grad(lambda u: distribution.log_prob(u))(u)).all()
    assert np.isfinite(distribution.log_prob(jnp.array([-300.0])))


def test_tanh_normal_entropy_estimates_minus_the_mean_log_probability():
    n = 100_000
    distribution = tanh_normal(np.tile([0.5, -0.2], (n, 1)), np.tile([0.6, 1.5], (n, 1)))
    entropy = distribution.entropy(jax.random.key(0))
    surprise = -distribution.log_prob(distribution.sample(jax.random.key(1)))
    # Standard deviations are about 1: each mean is good to 1 / sqrt(n) = 0.003.
    assert float(entropy.mean()) == pytest.approx(float(surprise.mean()), abs=0.02)
    # By quadrature over u: -int N(u) log p(tanh u) du, per dimension.
    u = np.linspace(-12, 12, 20001)
    exact = 0.0
    for mean, std in ((0.5, 0.6), (-0.2, 1.5)):
        normal = np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
        log_normal = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
        exact -= np.trapezoid(normal * (log_normal + 2 * np.log(np.cosh(u))), u)
    assert float(entropy.mean()) == pytest.approx(exact, abs=0.01)


def test_tanh_normal_samples_have_the_given_moments():
    distribution = tanh_normal(np.full((50_000, 1), 0.5), np.full((50_000, 1), 0.2))
    u = np.asarray(distribution.sample(jax.random.key(0)))
    assert u.mean() == pytest.approx(0.5, abs=0.005)
    assert u.std() == pytest.approx(0.2, abs=0.005)


def test_tanh_normal_equals_brax():
    rng = np.random.default_rng(0)
    mean, raw = rng.normal(size=(2, 64, 3)).astype(np.float32) * 2
    u = rng.normal(size=(64, 3)).astype(np.float32) * 3
    theirs = NormalTanhDistribution(event_size=3)
    parameters = jnp.concatenate([mean, raw], axis=-1)
    ours = tanh_normal(mean, jax.nn.softplus(raw) + 0.001)
    np.testing.assert_allclose(
        ours.log_prob(jnp.asarray(u)), theirs.log_prob(parameters, u), rtol=2e-5, atol=2e-5
    )
    key = jax.random.key(0)
    np.testing.assert_allclose(
        ours.entropy(key), theirs.entropy(parameters, key), rtol=2e-5, atol=2e-5
    )
    np.testing.assert_allclose(
        ours.action(ours.sample(key)), theirs.sample(parameters, key), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(ours.action(ours.mode()), theirs.mode(parameters), rtol=1e-6)


def test_cloning_loss_of_tanh_normal_by_hand():
    # tanh(log 2) = 0.6 against 1 and tanh(0) = 0 against -0.5: 0.16 + 0.25 = 0.41.
    distribution = tanh_normal([np.log(2.0), 0.0], [1.0, 1.0])
    assert float(distribution.cloning_loss(jnp.array([1.0, -0.5]))) == pytest.approx(0.41, rel=1e-5)


def test_categorical_by_hand():
    # Probabilities 1/2, 1/4, 1/4: log 1/4 = -1.3862944, entropy 1.5 bits = 1.0397208 nats.
    distribution = Categorical(jnp.log(jnp.array([[2.0, 1.0, 1.0]])) + 7.0)
    assert float(distribution.log_prob(jnp.array([2]))[0]) == pytest.approx(-1.3862944, rel=1e-5)
    assert float(distribution.entropy(jax.random.key(0))[0]) == pytest.approx(1.0397208, rel=1e-5)
    assert distribution.mode().tolist() == [0]
    assert distribution.action(jnp.array([2])).tolist() == [2]
    assert float(distribution.cloning_loss(jnp.array([1]))[0]) == pytest.approx(1.3862944, rel=1e-5)


def test_categorical_samples_have_the_given_frequencies():
    logits = jnp.broadcast_to(jnp.log(jnp.array([2.0, 1.0, 1.0])), (40_000, 3))
    draws = np.asarray(Categorical(logits).sample(jax.random.key(0)))
    assert draws.dtype == np.int32
    np.testing.assert_allclose(
        np.bincount(draws, minlength=3) / draws.size, [0.5, 0.25, 0.25], atol=0.015
    )
