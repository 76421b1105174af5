"""Tests of PPO with a cloning loss that fades."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.learners import bc, dapg, learner
from tests.learners.test_ppo import (
    ACTIONS,
    PLAIN,
    PROPRIO,
    SGD,
    assert_equal,
    jit,
    prepared,
    run,
)
from tests.linear_policy import apply


def test_demonstrations_add_their_cloning_loss_which_fades():
    # With one step of plain gradients the policy differs from that without demonstrations by
    # -0.1 * 0.5 * 0.8^k times the gradient of the cloning loss mean (tanh(x W) - a)^2, which is
    # mean 2 (tanh(x W) - a) (1 - tanh(x W)^2) x; the values and the spread do not differ.
    state, batch, last = prepared()
    rng = np.random.default_rng(5)
    rows, action = rng.normal(size=(5, PROPRIO)), rng.uniform(-1, 1, size=(5, ACTIONS))
    demonstrated = bc.Demonstrations(
        observation={"proprio": jnp.asarray(rows, jnp.float32)},
        action=jnp.asarray(action, jnp.float32),
        value_return=jnp.full(5, jnp.nan),  # The critic does not learn from demonstrations.
        bootstrap=jnp.zeros(5, jnp.int32),
        bootstrap_weight=jnp.zeros(5),
        privileged={},
    )
    without, _ = run(state, batch, last, SGD)
    deviation = np.sqrt(state.normalizer.m2 / state.normalizer.count)
    x = np.clip((rows - state.normalizer.mean) / deviation, -10, 10)
    mode = np.tanh(x @ np.asarray(state.params["policy"]))
    gradient = x.T @ (2 * (mode - action) * (1 - mode**2)) / 5
    options = dapg.DAPG(
        **dataclasses.asdict(PLAIN), demonstration_coef=0.5, demonstration_decay=0.8
    )
    step = jit(functools.partial(dapg.update, apply=apply, optimizer=SGD, options=options))
    for updates in (0, 3):
        given = dapg.DemonstratedRollout(
            learner.Rollout(batch, last), demonstrated, jnp.int32(updates)
        )
        after, metrics = step(state, given, jax.random.key(2))
        loss = np.mean(np.sum((mode - action) ** 2, axis=1))
        assert float(metrics["loss/bc"]) == pytest.approx(loss, rel=1e-4)
        moved = after.params["policy"] - without.params["policy"]
        expected = -0.1 * 0.5 * 0.8**updates * gradient
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-6)
        for name in ("value", "log_std"):
            np.testing.assert_allclose(after.params[name], without.params[name], rtol=1e-6)
        assert_equal(after.normalizer, without.normalizer)
