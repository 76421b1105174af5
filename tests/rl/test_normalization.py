"""Tests of mmrl_jax.rl.normalization against numpy over all rows at once."""

import jax.numpy as jnp
import numpy as np

from mmrl_jax.rl import normalization


def test_by_hand():
    # Rows 1, 3 and (masked) 99: mean 2, sum of squared differences 2, variance 1.
    x = jnp.array([[1.0], [99.0], [3.0]])
    statistics = normalization.update(normalization.init(1), x, jnp.array([1.0, 0.0, 1.0]))
    assert (float(statistics.count), float(statistics.mean[0]), float(statistics.m2[0])) == (
        2,
        2,
        2,
    )
    np.testing.assert_allclose(normalization.normalize(statistics, jnp.array([[4.0]])), [[2.0]])


def test_pieces_equal_all_rows_at_once():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 5, 3)) * [1.0, 10.0, 0.1] + [0.0, -50.0, 2.0]
    mask = (rng.random((60, 5)) < 0.7).astype(np.float32)
    statistics = normalization.init(3)
    for start, end in ((0, 1), (1, 10), (10, 11), (11, 60)):
        statistics = normalization.update(
            statistics, jnp.asarray(rows[start:end], jnp.float32), jnp.asarray(mask[start:end])
        )
    seen = rows[mask == 1]
    assert float(statistics.count) == len(seen)
    np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.m2 / statistics.count, seen.var(0), rtol=1e-4)
    x = rng.normal(size=(7, 3)) * [1.0, 10.0, 0.1] + [0.0, -50.0, 2.0]
    np.testing.assert_allclose(
        normalization.normalize(statistics, jnp.asarray(x, jnp.float32)),
        (x - seen.mean(0)) / seen.std(0),
        rtol=1e-3,
        atol=1e-3,
    )


def test_the_identity_before_the_first_row():
    x = jnp.array([[3.0, -7.0]])
    statistics = normalization.init(2)
    np.testing.assert_array_equal(normalization.normalize(statistics, x), x)
    # Rows that are all masked are no rows.
    statistics = normalization.update(statistics, 5 * x, jnp.zeros(1))
    np.testing.assert_array_equal(normalization.normalize(statistics, x), x)


def test_masked_rows_change_nothing():
    x = jnp.array([[1.0], [2.0]])
    statistics = normalization.update(normalization.init(1), x, jnp.ones(2))
    after = normalization.update(statistics, 1e6 * x, jnp.zeros(2))
    assert float(after.count) == 2
    np.testing.assert_array_equal(after.mean, statistics.mean)
    np.testing.assert_array_equal(after.m2, statistics.m2)


def test_constant_readings_and_outliers_stay_finite():
    statistics = normalization.update(normalization.init(1), jnp.full((10, 1), 3.0), jnp.ones(10))
    # No spread: the least standard deviation is 1e-3; beyond 10 of them, clipped.
    result = normalization.normalize(statistics, jnp.array([[3.0], [3.005], [1e9], [-1e9]]))
    np.testing.assert_allclose(result[:, 0], [0.0, 5.0, 10.0, -10.0], rtol=1e-3)
