"""The learning rate that follows the KL divergence, by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.stability import learning_rate
from mmrl_jax.stability.learning_rate import AdaptiveKLOptions

PARAMS, GRADIENTS = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.3, -0.1])}
ADAPTIVE = AdaptiveKLOptions(desired_kl=0.01, min_learning_rate=0.05, max_learning_rate=0.5)


@pytest.mark.parametrize("skip_spikes", [None, 6.0])
def test_the_rule_by_hand(skip_spikes):
    # From 0.1 on, with the limits 0.05 and 0.5: the KL divergence and the learning rate of a step.
    options = OptimizerOptions(name="sgd", learning_rate=0.1, skip_spikes=skip_spikes)
    made = optimizers.make(options, 10, adaptive=ADAPTIVE).transformation
    made, state = optax.with_extra_args_support(made), made.init(PARAMS)
    for kl, rate in (
        (0.0, 0.1),  # Nothing was measured.
        (-1e-9, 0.1),  # A rounding error.
        (0.02, 0.1),  # Twice the desired one is within the tolerance, and so is half of it.
        (0.005, 0.1),
        (0.0049, 0.15),
        (1e-6, 0.225),
        (0.021, 0.15),
        (float("nan"), 0.15),
        (9.0, 0.1),
        (9.0, 0.1 / 1.5),
        (9.0, 0.05),  # The smallest one, from which it rises again.
        (0.001, 0.075),
        *((0.001, 0.075 * 1.5**n) for n in range(1, 5)),
        (0.001, 0.5),  # 0.57 without the largest one.
        (0.001, 0.5),
    ):
        extra = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1), "kl": jnp.float32(kl)}
        change, state = made.update(GRADIENTS, state, PARAMS, **extra)
        np.testing.assert_allclose(change["w"], -rate * GRADIENTS["w"], rtol=1e-5)
        scale = learning_rate.scale_of(state)
        assert scale is not None and float(scale) * 0.1 == pytest.approx(rate, rel=1e-5)


def test_without_a_desired_kl_the_optimizer_is_the_same():
    options = OptimizerOptions(learning_rate=0.1)
    made = optimizers.make(options, 10, adaptive=AdaptiveKLOptions()).transformation
    assert learning_rate.scale_of(made.init(PARAMS)) is None
