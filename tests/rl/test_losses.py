"""Tests of mmrl_jax.rl.losses: values by hand, and the formulas of rlax and Brax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.rl import losses
from mmrl_jax.rl.distributions import TanhNormal


def test_masked_mean_by_hand():
    # (1 + 3) / 2; the masked entries do not count, whatever they are.
    mask = jnp.array([1.0, 0.0, 1.0, 0.0])
    assert float(losses.masked_mean(jnp.array([1.0, 7.0, 3.0, jnp.nan]), mask)) == 2.0


def test_masked_mean_of_nothing_is_0_with_gradient_0():
    value, gradient = jax.value_and_grad(losses.masked_mean)(jnp.array([1.0, 2.0]), jnp.zeros(2))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


def test_gradient_of_masked_mean_by_hand():
    # 1 / 2 where the mask is 1, exactly 0 elsewhere.
    mask = jnp.array([1.0, 0.0, 1.0])
    gradient = jax.grad(losses.masked_mean)(jnp.array([1.0, 5.0, 3.0]), mask)
    np.testing.assert_array_equal(gradient, [0.5, 0.0, 0.5])


def test_normalize_by_hand():
    # Of 1, 3 (masked in): mean 2, standard deviation 1; 10 counts for nothing: (10 - 2) / 1.
    result = losses.whiten(jnp.array([1.0, 10.0, 3.0]), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(result, [-1.0, 8.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_normalize_is_finite_without_spread_or_without_samples(mask):
    result = losses.whiten(jnp.array([2.0, 2.0]), jnp.full(2, mask))
    assert np.isfinite(result).all()


def test_clipped_policy_loss_by_hand():
    # clip 0.2. ratio 1.5, A = 2: min(3, 1.2 * 2 = 2.4); A = -2: min(-3, -2.4).
    # ratio 0.5, A = 2: min(1, 0.8 * 2); A = -2: min(-1, -1.6). ratio 1: A.
    log_ratio = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5, 1.0]))
    advantage = jnp.array([2.0, -2.0, 2.0, -2.0, 3.0])
    loss = losses.clipped_policy_loss(log_ratio, advantage, 0.2, 0.2)
    np.testing.assert_allclose(loss, [-2.4, 3.0, -1.0, 1.6, -3.0], rtol=1e-6)


def test_clipped_policy_loss_has_no_gradient_where_it_is_clipped():
    # d/dlog_ratio of -ratio * A is -ratio * A; 0 where the clipped branch is the smaller one.
    log_ratio = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5]))
    advantage = jnp.array([2.0, -2.0, 2.0, -2.0])
    gradient = jax.grad(lambda x: losses.clipped_policy_loss(x, advantage, 0.2, 0.2).sum())(
        log_ratio
    )
    np.testing.assert_allclose(gradient, [0.0, 3.0, -1.0, 0.0], rtol=1e-6)


def test_clipped_policy_loss_is_rlax_and_brax_formula():
    # rlax clipped_surrogate_pg_loss and Brax compute_ppo_loss, written out in float64.
    rng = np.random.default_rng(0)
    log_ratio, advantage = rng.normal(size=(2, 1000))
    ratio = np.exp(log_ratio)
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.7, 1.3) * advantage)
    loss = losses.clipped_policy_loss(jnp.asarray(log_ratio), jnp.asarray(advantage), 0.3, 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_value_loss_by_hand():
    # v = 3, target 1: 0.5 * 4 = 2.
    value, target = jnp.array([3.0, 1.5]), jnp.array([1.0, 1.0])
    old = jnp.array([0.0, 2.0])
    np.testing.assert_allclose(losses.value_loss(value, target, old, None), [2.0, 0.125])
    # clip 0.2. v = 3 is clipped to 0 + 0.2: max(4, 0.64) / 2 = 2; v = 1.5 to 2 - 0.2: 0.64 / 2.
    np.testing.assert_allclose(losses.value_loss(value, target, old, 0.2), [2.0, 0.32], rtol=1e-6)


def test_approximate_kl_by_hand():
    # rho = 2: 2 - 1 - log 2 = 0.3068528; rho = 1: 0.
    kl = losses.approximate_kl(jnp.log(jnp.array([2.0, 1.0])))
    np.testing.assert_allclose(kl, [0.3068528, 0.0], rtol=1e-6)
    # Near 1 it is log_ratio^2 / 2, and does not cancel to something negative.
    assert (losses.approximate_kl(jnp.linspace(-1e-3, 1e-3, 101)) >= 0).all()


def test_approximate_kl_estimates_the_kl_of_gaussians():
    # KL(N(0, 1) || N(0.3, 0.8^2)) = log 0.8 + (1 + 0.3^2) / (2 * 0.8^2) - 1/2 = 0.1284190; tanh is
    # a bijection and changes no KL. The estimates' standard deviation is 0.6: 0.0014 for the mean.
    n = 200_000
    old = TanhNormal(jnp.zeros((n, 1)), jnp.zeros((n, 1)))
    new = TanhNormal(jnp.full((n, 1), 0.3), jnp.full((n, 1), jnp.log(0.8)))
    u = old.sample(jax.random.key(0))
    estimate = losses.approximate_kl(new.log_prob(u) - old.log_prob(u))
    assert float(estimate.mean()) == pytest.approx(0.1284190, abs=0.006)


def test_pointing_loss_by_hand():
    # Two rows, three columns; e^logit = 1 2 3 / 4 5 5, together 20.
    logits = jnp.log(jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 5.0]]]))
    for place, share in (
        ([0.0, 0.0], 1 / 20),  # The top left corner.
        ([0.5, 0.2], 2 / 20),  # 0.5 * 3 columns = 1.5: the middle one; 0.2 * 2 rows: the top one.
        ([0.2, 0.7], 4 / 20),
        ([1.0, 1.0], 5 / 20),  # The bottom right edge is the last patch.
        ([-3.0, 9.0], 4 / 20),  # Out of the picture: the nearest patch.
    ):
        loss = losses.pointing_loss(logits, jnp.array([place]))
        assert float(loss[0]) == pytest.approx(-np.log(share), rel=1e-5), place
