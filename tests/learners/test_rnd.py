"""Tests of PPO with random network distillation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import learner, ppo, rnd
from mmrl_jax.rl import advantages
from mmrl_jax.stability import learning_rate
from mmrl_jax.types import Transition
from tests.linear_policy import apply

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STEPS, BATCH, PROPRIO, ACTIONS = 6, 4, 3, 2
SGD = optax.sgd(0.1)
OPTIONS = rnd.RND(num_minibatches=1, intrinsic_discount=0.9, predictor_fraction=1.0)


def state():
    rng = np.random.default_rng(0)
    shapes = {"policy": (PROPRIO, ACTIONS), "value": (PROPRIO,)}
    shapes |= {"place": (PROPRIO, 2), "target": (PROPRIO, 4), "log_std": (ACTIONS,)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    observation = {"proprio": jnp.zeros((1, PROPRIO))}
    extras = rnd.extras(OPTIONS, observation, None, jax.random.key(1))
    return learner.init(params, optimizer=SGD, proprio_size=PROPRIO).replace(extras=extras)


def rollout(seed=1):
    """Returns transitions, of which one ends an episode and the next one only resets it."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ended, valid = np.zeros((STEPS, BATCH), np.float32), np.ones((STEPS, BATCH), np.float32)
    ended[2, 1], valid[3, 1] = 1, 0
    batch = Transition(
        observation={"proprio": normal(STEPS, BATCH, PROPRIO)},
        action=normal(STEPS, BATCH, ACTIONS),
        log_prob=normal(STEPS, BATCH) - 2,
        value=normal(STEPS, BATCH),
        reward=normal(STEPS, BATCH) * valid,
        terminated=jnp.asarray(ended),
        truncated=jnp.zeros((STEPS, BATCH)),
        valid=jnp.asarray(valid),
        privileged={"place": normal(STEPS, BATCH, 2), "target": normal(STEPS, BATCH, 2)},
        metrics={},
    )
    return learner.Rollout(batch, {"proprio": normal(BATCH, PROPRIO)})


@functools.cache
def compiled(options):
    return jit(functools.partial(rnd.update, apply=apply, optimizer=SGD, options=options))


def update(given, data, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return compiled(options)(given, data, jax.random.key(2))


def test_without_its_coefficient_the_policy_learns_as_in_ppo():
    given, data = state(), rollout()
    new, _ = update(given, data, intrinsic_coef=0.0)
    with_bonus, _ = update(given, data, intrinsic_coef=1.0)
    key = jax.random.split(jax.random.key(2))[0]
    options = ppo.PPO(num_minibatches=1)
    plain, _ = jit(functools.partial(ppo.update, apply=apply, optimizer=SGD, options=options))(
        given.replace(extras={}), data, key
    )
    for name, x in plain.params.items():
        np.testing.assert_allclose(new.params[name], x, atol=1e-6)
    assert any(np.abs(with_bonus.params[k] - x).max() > 1e-4 for k, x in plain.params.items())


def test_the_advantages_are_those_of_novelty_without_ends():
    """All is written out in numpy, but for the networks and the advantage estimator."""
    given, data = state(), rollout()
    new, metrics = update(given, data, intrinsic_coef=1.0)
    proprio = np.concatenate(
        [data.transitions.observation["proprio"], data.last_observation["proprio"][None]]
    )
    valid = np.asarray(data.transitions.valid)
    seen = proprio[:-1][valid > 0]
    x = np.clip((proprio - seen.mean(0)) / seen.std(0), -5, 5)

    def run(network, params, x):
        return np.asarray(network.apply({"params": params}, jnp.asarray(x)))

    novelty = given.extras["novelty"]
    predicted = run(rnd._PREDICTOR, novelty.params["predictor"], x[1:])
    error = ((predicted - run(rnd._TARGET, novelty.target, x[1:])) ** 2).mean(-1) * valid
    returns, g = [], np.zeros(BATCH)
    for row in error:
        g = 0.9 * g + row
        returns.append(g)
    reward = error / np.std(np.array(returns)[valid > 0])
    value = run(rnd._CRITIC, novelty.params["critic"], x)[..., 0]
    assert float(metrics["exploration/novelty"]) == pytest.approx(error.sum() / 23, rel=1e-4)
    expected = reward.sum() / valid.sum()
    assert float(metrics["exploration/intrinsic_reward"]) == pytest.approx(expected, rel=1e-4)
    assert float(new.extras["novelty"].level) == pytest.approx(g.mean(), rel=1e-4)
    never = jnp.zeros((STEPS, BATCH))
    advantage, _ = advantages.generalized_advantages(
        reward=jnp.asarray(reward),
        value=jnp.asarray(value[:-1]),
        last_value=jnp.asarray(value[-1]),
        terminated=never,
        truncated=never,
        discount=0.9,
        lambda_=0.95,
    )
    plain = jit(
        functools.partial(
            ppo.update, apply=apply, optimizer=SGD, options=ppo.PPO(num_minibatches=1)
        )
    )
    same, _ = plain(
        given.replace(extras={}),
        data,
        jax.random.split(jax.random.key(2))[0],
        further_advantage=advantage,
    )
    for name, y in same.params.items():
        np.testing.assert_allclose(new.params[name], y, atol=1e-5)


def test_what_is_seen_again_is_less_novel():
    given, data = state(), rollout()
    changes = {"num_epochs": 4, "intrinsic_learning_rate": 1e-2}
    first = None
    for _ in range(10):
        given, metrics = update(given, data, **changes)
        first = first or float(metrics["exploration/novelty"])
    assert float(metrics["exploration/novelty"]) < 0.3 * first
    assert np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, given))).all()


def test_an_observation_that_is_not_finite_spreads_nowhere():
    given, data = state(), rollout()
    # Step 3 only resets the environment, whose observation was broken.
    broken = data.transitions.observation["proprio"].at[3, 1].set(jnp.nan)
    data = data._replace(transitions=data.transitions.replace(observation={"proprio": broken}))
    new, metrics = update(given, data)
    assert float(metrics["optimizer/steps"]) == 1
    assert np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, (new, metrics)))).all()
    assert any(np.abs(new.params[k] - x).max() > 1e-4 for k, x in given.params.items())


def test_a_rollback_lowers_its_learning_rate():
    lowered = learning_rate.lower(state().extras, 0.5)
    assert float(learning_rate.scale_of(lowered["novelty"].opt_state)) == 0.5


def test_pixels_are_part_of_what_is_novel():
    x = {"pixels": jnp.full((2, 4, 4, 3), 255, jnp.uint8), "proprio": jnp.zeros((2, 3))}
    vector = rnd._vector(x | {"instruction": {}}, axes=1)
    assert vector.shape == (2, 51)
    assert float(vector.sum()) == 2 * 48
