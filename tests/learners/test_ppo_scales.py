"""PPO with PopArt, and with advantages scaled by the range of the returns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import learner, ppo, value_scaling
from mmrl_jax.models.mlp import MLPPolicy
from mmrl_jax.rl import losses
from tests.learners.test_ppo import (
    ACTIONS,
    PLAIN,
    PROPRIO,
    SGD,
    apply,
    initial_params,
    jit,
    learner_state,
    prepared,
    record,
    run,
)

NETWORK = MLPPolicy(kind="continuous", actions=ACTIONS, policy_layers=(4,), value_layers=(4,))
POPART = ppo.PPO(popart=True, popart_decay=0.5)


def critic(optimizer):
    """Returns a learner of a perceptron whose values and targets are large, and its experience."""
    params = jit(NETWORK.init)(jax.random.key(0), {"proprio": jnp.zeros((1, PROPRIO))})
    state = learner_state(optimizer, params).replace(extras=ppo.extras(POPART))
    batch, last = record(state, network=NETWORK.apply)
    return state, batch.replace(reward=300 * batch.reward + 50), last


def values(state, batch):
    flat = {"proprio": batch.observation["proprio"].reshape(-1, PROPRIO)}
    return np.asarray(learner.run_network(NETWORK.apply, state, flat).value)


def popart_run(state, batch, last, optimizer, **changes):
    changes = {"popart": True, "popart_decay": 0.5} | changes
    return run(state, batch, last, optimizer, network=NETWORK.apply, **changes)


def test_values_are_kept_by_an_update_whose_rate_is_0():
    optimizer = optax.sgd(0.0)
    state, batch, last = critic(optimizer)
    before, normalizer, scales = values(state, batch), state.normalizer, []
    for factor in (1.0, 10.0, 0.1):
        state, metrics = popart_run(
            state, batch.replace(reward=factor * batch.reward), last, optimizer
        )
        scales.append(float(metrics["value/target_std"]))
        # The statistics of the proprioception have moved too, and would change the values.
        state = state.replace(normalizer=normalizer)
        np.testing.assert_allclose(values(state, batch), before, atol=1e-6 * scales[-1])
    assert scales[0] > 100 and scales[1] > 2 * scales[0]


def test_a_step_is_that_of_the_normalized_value():
    # Without the optimizer's other parts, and with one step: the last layer of the normalized value
    # n moves by -0.1 * 0.5 * the gradient of mean (n - (target - mean) / std)^2 / 2, and that of
    # the value by std times as much.
    state, batch, last = critic(SGD)
    options = ppo.PPO(**{"discount": PLAIN.discount, "gae_lambda": PLAIN.gae_lambda})
    rollout = learner.Rollout(batch, last)
    masked, _, target = ppo._with_advantages(state, rollout, NETWORK.apply, options)
    valid = np.asarray(batch.valid, np.float64)
    target = np.asarray(target, np.float64)
    mean = (target * valid).sum() / valid.sum()
    std = np.sqrt((valid * (target - mean) ** 2).sum() / valid.sum())
    after, metrics = popart_run(state, batch, last, SGD)
    assert float(metrics["value/target_mean"]) == pytest.approx(mean, rel=1e-4)
    assert float(metrics["value/target_std"]) == pytest.approx(std, rel=1e-4)
    value = values(state, batch).reshape(target.shape)
    error = (value - target) / std
    expected = 0.5 * (valid * error**2).sum() / valid.sum()
    assert float(metrics["loss/value"]) == pytest.approx(expected, rel=1e-3)
    bias = "params", "value_head", "value", "bias"
    moved = [state.params, after.params]
    for key in bias:
        moved = [x[key] for x in moved]
    gradient = 0.5 * (valid * error).sum() / valid.sum()
    assert float((moved[1] - moved[0])[0]) == pytest.approx(-0.1 * gradient * std, rel=1e-2)
    assert value_scaling.extras(POPART).keys() <= after.extras.keys()


def test_a_network_without_the_last_layer_is_refused():
    state, batch, last = prepared()
    state = state.replace(extras=ppo.extras(POPART))
    with pytest.raises(ValueError, match="popart=True needs one layer 'value_head/value'"):
        run(state, batch, last, SGD, popart=True)


def test_advantages_are_divided_by_the_range_of_the_returns_and_not_centered():
    options = ppo.PPO(advantage_scaling="percentile")
    state = learner_state(SGD, initial_params()).replace(extras=ppo.extras(options))
    batch, last = record(state)
    batch = batch.replace(reward=20 * batch.reward)
    _, advantage, target = ppo._with_advantages(state, learner.Rollout(batch, last), apply, PLAIN)
    chosen = np.asarray(target)[np.asarray(batch.valid) > 0]
    width = np.percentile(chosen, 95) - np.percentile(chosen, 5)
    assert width > 2
    _, metrics = run(state, batch, last, SGD, advantage_scaling="percentile")
    assert float(metrics["value/return_range"]) == pytest.approx(width, rel=1e-4)
    # The first ratios are 1, so that the loss is minus the mean of the scaled advantages.
    mean = float(losses.masked_mean(advantage, batch.valid)) / width
    assert float(metrics["loss/policy"]) == pytest.approx(-mean, rel=1e-3)
    assert abs(mean) > 1e-3
