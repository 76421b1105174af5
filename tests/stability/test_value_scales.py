"""PopArt and the range of returns, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.stability import popart, return_range


def test_moving_statistics_by_hand():
    # The first batch alone counts: mean 3 and variance 1 of 2 and 4; the masked 90 does not.
    one = popart.update(popart.init(), jnp.array([2.0, 4.0, 90.0]), jnp.array([1.0, 1, 0]), 0.5)
    assert [float(x) for x in (one.mean, one.variance, one.scale)] == [3, 1, 1]
    # Without a bias to its start, an average with the decay 1/2 weights the second batch by
    # (1/2) / (1 - 1/4) = 2/3. Its mean is 9 and its variance 0: the mean is (3 + 2 * 9) / 3 = 7,
    # and the variance that of the mixture, 1/3 * (1 + 4^2) + 2/3 * 2^2 = 25/3.
    two = popart.update(one, jnp.array([9.0, 9.0]), jnp.ones(2), 0.5)
    assert float(two.mean) == pytest.approx(7, rel=1e-6)
    assert float(two.variance) == pytest.approx(25 / 3, rel=1e-6)
    three = popart.update(two, jnp.array([1e9]), jnp.zeros(1), 0.5)
    assert [float(x) for x in (three.weight, three.mean)] == [0.75, float(two.mean)]
    broken = popart.update(two, jnp.array([1.0, jnp.nan]), jnp.ones(2), 0.5)
    assert [float(x) for x in (broken.weight, broken.mean)] == [0.75, float(two.mean)]


def test_a_large_mean_does_not_swallow_the_spread():
    target = 1e4 + jnp.array([-1.0, 1.0])
    assert float(popart.update(popart.init(), target, jnp.ones(2), 0.99).scale) == pytest.approx(1)


def test_targets_that_are_all_equal_have_a_small_scale_and_no_zero():
    state = popart.update(popart.init(), jnp.full(3, 5.0), jnp.ones(3), 0.9)
    assert float(state.scale) == pytest.approx(0.01)
    assert float(popart.normalized(state, jnp.float32(5.0))) == 0
    # A value that is wrong by 0.05, as one from scratch is, is no error of 500.
    assert float(popart.normalized(state, jnp.float32(5.05))) == pytest.approx(5, rel=1e-3)


def test_values_are_kept_while_the_statistics_move():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
    layer = (
        jnp.asarray(rng.normal(size=(8, 1)), jnp.float32),
        jnp.asarray(rng.normal(size=1), jnp.float32),
    )
    value = features @ layer[0] + layer[1]
    state = popart.init()
    for mean, std in ((0.0, 1.0), (100.0, 30.0), (-5.0, 0.2)):
        target = jnp.asarray(rng.normal(mean, std, size=50), jnp.float32)
        state = popart.update(state, target, jnp.ones(50), 0.3)
        inside = popart.normalized_layer(state, *layer)
        normalized = features @ inside[0] + inside[1]
        np.testing.assert_allclose(normalized, popart.normalized(state, value), atol=1e-4)
        layer = popart.value_layer(state, *inside)
        np.testing.assert_allclose(features @ layer[0] + layer[1], value, atol=1e-5)
    assert float(state.scale) > 3


def test_the_range_of_returns_by_hand():
    # The percentiles 5 and 95 of 0, 1, ..., 100 are 5 and 95.
    returns = jnp.concatenate([jnp.arange(101.0), jnp.array([1e6])])
    mask = jnp.ones(102).at[-1].set(0)
    one = return_range.update(return_range.init(), returns, mask)
    assert float(one.value) == pytest.approx(90)
    # The second batch has the weight 0.01 / (1 - 0.99^2) = 0.5025.
    two = return_range.update(one, returns / 10, mask)
    assert float(two.value) == pytest.approx(90 - 0.502513 * 81, rel=1e-5)
    none = return_range.update(two, returns, jnp.zeros(102))
    assert float(none.value) == float(two.value)
    broken = return_range.update(two, returns.at[3].set(jnp.nan), mask)
    assert float(broken.value) == float(two.value)
    np.testing.assert_allclose(return_range.scale(one, jnp.array([9.0, -90.0])), [0.1, -1])
    # A range below 1 is not divided by.
    small = return_range.update(return_range.init(), returns / 1e4, mask)
    np.testing.assert_array_equal(return_range.scale(small, jnp.array([0.5])), [0.5])
