"""Tests of intrinsic rewards by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.exploration import intrinsic
from mmrl_jax.rl import normalization


def test_the_error_is_a_mean_over_features():
    error = intrinsic.prediction_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]]))
    np.testing.assert_allclose(error, [(1 + 4) / 2])


def test_running_returns_by_hand():
    # From g = 4: 0.5 * 4 + 1 = 3, 0.5 * 3 + 0 = 1.5, 0.5 * 1.5 + 2 = 2.75.
    found = intrinsic.running_returns(jnp.array([[1.0], [0.0], [2.0]]), jnp.array(4.0), 0.5)
    np.testing.assert_allclose(found[:, 0], [3.0, 1.5, 2.75])


def test_rewards_are_divided_by_the_deviation_of_their_returns():
    # The running returns 1, 3 and 5 have the variance 8 / 3.
    returns = normalization.update(
        normalization.init(1), jnp.array([[1.0], [3.0], [5.0]]), jnp.ones(3)
    )
    assert float(intrinsic.scale(jnp.float32(2.0), returns)) == pytest.approx(2 / (8 / 3) ** 0.5)


def test_observations_are_clipped_at_five_deviations():
    # The values 0 and 2 have mean 1 and deviation 1.
    seen = normalization.update(normalization.init(1), jnp.array([[0.0], [2.0]]), jnp.ones(2))
    found = intrinsic.whiten(seen, jnp.array([[2.0], [9.0], [-9.0]]))
    np.testing.assert_allclose(found[:, 0], [1.0, 5.0, -5.0], rtol=1e-6)
