"""Tests of the coefficient that follows a target entropy, by hand."""

import jax.numpy as jnp
import pytest

from mmrl_jax.exploration import entropy


def test_the_coefficient_rises_below_the_target_and_is_applied_there_only():
    bonus = entropy.init(0.01)
    assert float(bonus.applied) == 0
    # Entropy against the target 1, then the coefficient and what is applied of it.
    for value, coef, applied in (
        (2.0, 0.005, 0.0),
        (1.5, 0.0, 0.0),
        (1.2, 0.0, 0.0),  # It stays at 0.
        (1.0, 0.005, 0.005),
        (0.5, 0.01, 0.01),
        (0.5, 0.012, 0.012),  # The maximum.
        (float("nan"), 0.012, 0.012),  # An update without an optimizer step.
        (3.0, 0.007, 0.0),
    ):
        bonus = entropy.adapt(bonus, jnp.float32(value), target=1.0, step=0.005, maximum=0.012)
        assert float(bonus.coef) == pytest.approx(coef, abs=1e-7)
        assert float(bonus.applied) == pytest.approx(applied, abs=1e-7)
