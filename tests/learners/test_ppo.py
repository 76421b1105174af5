"""Tests of mmrl_jax.learners.ppo with linear networks small enough to be written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import bc, learner, ppo
from mmrl_jax.models.mlp import MLPPolicy
from mmrl_jax.rl import normalization
from mmrl_jax.types import Transition
from tests.linear_policy import apply

# Compiled quickly: nothing here runs for long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STEPS, BATCH, PROPRIO, ACTIONS = 6, 4, 3, 2

PLAIN = ppo.PPO(
    discount=0.9,
    gae_lambda=0.8,
    advantage="gae",
    clip=0.2,
    value_clip=None,
    value_coef=0.5,
    entropy_coef=0.0,
    auxiliary_coef=0.0,
    pointing_coef=0.0,
    num_epochs=1,
    num_minibatches=1,
    target_kl=None,
    recompute=False,
)


def initial_params(kind="continuous", seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"policy": (PROPRIO, ACTIONS), "value": (PROPRIO,), "place": (PROPRIO, 2)}
    shapes["target"] = (PROPRIO, 4)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    if kind == "continuous":
        params["log_std"] = jnp.array([-0.3, 0.2])
    return params


def learner_state(optimizer, params):
    state = learner.init(params, optimizer=optimizer, proprio_size=PROPRIO)
    # Statistics as after some rows of another scale, so that normalization does something.
    seen = np.random.default_rng(9).normal(size=(50, PROPRIO)) * [1.0, 2.0, 0.5] + [0.5, 0.0, -1.0]
    normalizer = normalization.update(
        state.normalizer, jnp.asarray(seen, jnp.float32), jnp.ones(50)
    )
    return state.replace(normalizer=normalizer)


def record(state, seed=1, network=apply):
    """Returns a batch of `state`'s policy with both kinds of ends and their reset steps."""
    rng = np.random.default_rng(seed)
    proprio = jnp.asarray(rng.normal(size=(STEPS + 1, BATCH, PROPRIO)), jnp.float32)
    flat = {"proprio": proprio[:STEPS].reshape(-1, PROPRIO)}
    output = learner.run_network(network, state, flat)
    action = output.distribution.sample(jax.random.key(seed))
    terminated, truncated = np.zeros((2, STEPS, BATCH), np.float32)
    valid = np.ones((STEPS, BATCH), np.float32)
    terminated[2, 1] = truncated[3, 2] = 1
    valid[3, 1] = valid[4, 2] = valid[0, 3] = 0

    def split(x):
        return x.reshape(STEPS, BATCH, *x.shape[1:])

    batch = Transition(
        observation={"proprio": proprio[:STEPS]},
        action=split(action),
        log_prob=split(output.distribution.log_prob(action)),
        value=split(output.value),
        reward=jnp.asarray(rng.normal(size=(STEPS, BATCH)) * valid, jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        valid=jnp.asarray(valid),
        privileged={
            "place": jnp.asarray(rng.normal(size=(STEPS, BATCH, 2)), jnp.float32),
            "target": jnp.asarray(rng.random(size=(STEPS, BATCH, 2)), jnp.float32),
        },
        metrics={},
    )
    return batch, {"proprio": proprio[STEPS]}


@functools.cache
def compiled(network, optimizer, options):
    return jit(functools.partial(ppo.update, apply=network, optimizer=optimizer, options=options))


def run(state, batch, last, optimizer, network=apply, seed=2, beside=(), **changes):
    options = dataclasses.replace(PLAIN, **changes)
    update = compiled(network, optimizer, options)
    return update(state, learner.Rollout(batch, last, *beside), jax.random.key(seed))


SGD = optax.sgd(0.1)


def prepared(kind="continuous", optimizer=SGD):
    state = learner_state(optimizer, initial_params(kind))
    return state, *record(state)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def difference(a, b):
    return max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def expected_parts(params, normalizer, batch, last, h, kind):
    """Computes PPO's loss with an independent implementation of GAE and densities."""
    deviation = jnp.sqrt(normalizer.m2 / normalizer.count)

    def see(proprio):
        return jnp.clip((proprio - normalizer.mean) / deviation, -10, 10)

    reward, value, valid, terminated, truncated = (
        np.asarray(x, np.float64)
        for x in (batch.reward, batch.value, batch.valid, batch.terminated, batch.truncated)
    )
    value = np.concatenate([value, np.asarray(see(last["proprio"]) @ params["value"])[None]])
    advantage = np.zeros((STEPS + 1, BATCH))
    for t in reversed(range(STEPS)):
        alive = 1 - terminated[t]
        delta = reward[t] + h.discount * alive * value[t + 1] - value[t]
        through = alive * (1 - truncated[t])
        advantage[t] = delta + h.discount * h.gae_lambda * through * advantage[t + 1]
    advantage = advantage[:STEPS]
    target = advantage + value[:STEPS]
    chosen = advantage[valid == 1]
    advantage = (advantage - chosen.mean()) / chosen.std()

    def loss(params):
        x = see(batch.observation["proprio"])
        mean = x @ params["policy"]
        if kind == "continuous":
            density = jax.scipy.stats.norm.logpdf(batch.action, mean, jnp.exp(params["log_std"]))
            log_prob = (density - jnp.log(1 - jnp.tanh(batch.action) ** 2)).sum(-1)
            entropy = jnp.zeros(())
        else:
            share = jnp.exp(mean) / jnp.exp(mean).sum(-1, keepdims=True)
            log_prob = jnp.log((share * jax.nn.one_hot(batch.action, ACTIONS)).sum(-1))
            entropy = -jnp.sum((share * jnp.log(share)).sum(-1) * valid) / valid.sum()
        ratio = jnp.exp(log_prob - batch.log_prob)
        surrogate = jnp.minimum(
            ratio * advantage, jnp.clip(ratio, 1 - h.clip, 1 + h.clip) * advantage
        )
        v = x @ params["value"]
        error = (v - target) ** 2
        if h.value_clip is not None:
            near = batch.value + jnp.clip(v - batch.value, -h.value_clip, h.value_clip)
            error = jnp.maximum(error, (near - target) ** 2)
        place = ((x @ params["place"] - batch.privileged["place"]) ** 2).sum(-1)
        # Patches 0 1 / 2 3: the column from the left, the row from the top.
        column, row = jnp.moveaxis((batch.privileged["target"] >= 0.5).astype(int), -1, 0)
        scores = jnp.exp(x @ params["target"])
        picked = (scores * jax.nn.one_hot(2 * row + column, 4)).sum(-1)
        pointing = -jnp.log(picked / scores.sum(-1))

        def mean_of(y):
            return (y * valid).sum() / valid.sum()

        return (
            -mean_of(surrogate)
            + h.value_coef * 0.5 * mean_of(error)
            - h.entropy_coef * entropy
            + h.auxiliary_coef * mean_of(place)
            + h.pointing_coef * mean_of(pointing)
        )

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("value_clip", [None, 0.05])
def test_one_full_batch_step_equals_the_loss_written_out(kind, value_clip):
    # The continuous entropy is a random estimate: its weight is 0 here.
    changes = {
        "value_clip": value_clip,
        "entropy_coef": 0.3 if kind == "discrete" else 0.0,
        "auxiliary_coef": 0.7,
        "pointing_coef": 1.3,
    }
    state, batch, last = prepared(kind)
    # Take the step from parameters other than those that acted: ratios reach the clip. The state
    # after the last step is then valued with the learner's parameters.
    other = initial_params(kind, seed=4)
    state = state.replace(params=jax.tree.map(lambda a, b: a + 0.3 * b, state.params, other))
    h = dataclasses.replace(PLAIN, **changes)
    loss, gradient = expected_parts(state.params, state.normalizer, batch, last, h, kind)
    after, metrics = run(state, batch, last, SGD, **changes)
    assert 0 < float(metrics["policy/clip_fraction"]) < 1
    assert float(metrics["loss/total"]) == pytest.approx(float(loss), rel=1e-4)
    assert float(metrics["grad/norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    for name, before in state.params.items():
        expected = before - 0.1 * gradient[name]
        np.testing.assert_allclose(after.params[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)
        assert np.abs(gradient[name]).max() > 1e-3, name
    assert int(after.steps) == 1


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_first_ratio_is_1_and_a_rate_of_0_changes_nothing(kind):
    optimizer = optax.sgd(0.0)
    state, batch, last = prepared(kind, optimizer)
    after, metrics = run(state, batch, last, optimizer)
    # Of a ratio of 1 up to a float32 rounding r, k3 is r^2 / 2.
    assert abs(float(metrics["policy/approx_kl"])) < 1e-10
    assert float(metrics["policy/clip_fraction"]) == 0
    # With ratio 1 the policy loss is minus the mean of the normalized advantages.
    assert float(metrics["loss/policy"]) == pytest.approx(0.0, abs=1e-5)
    assert_equal(after.params, state.params)


def test_the_first_ratio_of_a_flax_network_is_1():
    model = MLPPolicy(kind="continuous", actions=ACTIONS, policy_layers=(8,), value_layers=(8,))
    params = jit(model.init)(jax.random.key(0), {"proprio": jnp.zeros((1, PROPRIO))})
    optimizer = optax.sgd(0.0)
    state = learner_state(optimizer, params)
    batch, last = record(state, network=model.apply)
    _, metrics = run(
        state, batch, last, optimizer, network=model.apply, num_minibatches=3, num_epochs=2
    )
    assert abs(float(metrics["policy/approx_kl"])) < 1e-10
    assert float(metrics["optimizer/steps"]) == 6


def test_a_policy_that_has_not_moved_is_not_clipped_in_bfloat16():
    # The network of the learner rounds its features to bfloat16, the one that acted did not: as if
    # the rollout, another program, had rounded otherwise. A narrow spread and clip show it.
    def rounded(params, observation):
        near = jax.lax.reduce_precision(observation["proprio"], exponent_bits=8, mantissa_bits=7)
        return apply(params, observation | {"proprio": near})

    optimizer = optax.sgd(0.0)
    params = initial_params() | {"log_std": jnp.full(2, -3.0)}
    state = learner_state(optimizer, params)
    batch, last = record(state)
    near = learner.run_network(rounded, state, batch.observation).distribution
    assert jnp.mean(jnp.abs(near.log_prob(batch.action) - batch.log_prob) > 1e-3) > 0.5
    changes = {"num_minibatches": 3, "clip": 1e-3, "recompute": True}
    _, metrics = run(state, batch, last, optimizer, network=rounded, **changes)
    assert (
        float(metrics["policy/clip_fraction"]) == 0 and float(metrics["policy/approx_kl"]) < 1e-10
    )
    assert float(metrics["grad/norm"]) > 0.1


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_invalid_samples_have_no_influence(kind):
    state, batch, last = prepared(kind)
    everything = {
        "entropy_coef": 0.1,
        "auxiliary_coef": 0.7,
        "pointing_coef": 1.3,
        "num_epochs": 2,
        "num_minibatches": 3,
        "value_clip": 0.1,
    }
    before, metrics = run(state, batch, last, SGD, **everything)
    invalid = batch.valid == 0

    def disturb(x, by):
        mask = invalid.reshape(invalid.shape + (1,) * (x.ndim - 2))
        return jnp.where(mask, by(x), x)

    flip = (lambda a: 1 - a) if kind == "discrete" else (lambda a: a + 1.0)
    # Its value is left alone where it is the bootstrap of a truncated step, [4, 2].
    value = batch.value.at[3, 1].add(50.0).at[0, 3].add(50.0)
    other = batch.replace(
        observation=jax.tree.map(lambda x: disturb(x, lambda a: 5 * a + 1), batch.observation),
        action=disturb(batch.action, flip),
        log_prob=disturb(batch.log_prob, lambda a: a - 1),
        value=value,
        reward=disturb(batch.reward, lambda a: a + 30),
        privileged=jax.tree.map(lambda x: disturb(x, lambda a: 1 - 3 * a), batch.privileged),
    )
    assert difference(other, batch) > 10
    after, other_metrics = run(state, other, last, SGD, **everything)
    assert_equal(after, before)
    assert_equal(other_metrics, metrics)
    # A valid sample does have some.
    changed = batch.replace(reward=batch.reward.at[1, 0].add(1.0))
    assert difference(run(state, changed, last, SGD, **everything)[0].params, before.params) > 1e-3


def test_an_environment_that_exploded_poisons_nothing():
    # It terminated with an observation that is no number; in the invalid step that resets it, the
    # acting policy's value of that observation is none either.
    state, batch, last = prepared()
    weights = {"entropy_coef": 0.1, "auxiliary_coef": 0.7, "value_clip": 0.1, "num_epochs": 2}
    before, metrics = run(state, batch, last, SGD, **weights)
    assert batch.terminated[2, 1] == 1 and batch.valid[3, 1] == 0
    proprio = batch.observation["proprio"].at[3, 1].set(jnp.nan)
    exploded = batch.replace(
        observation=batch.observation | {"proprio": proprio},
        value=batch.value.at[3, 1].set(jnp.nan),
        log_prob=batch.log_prob.at[3, 1].set(jnp.nan),
    )
    after, other_metrics = run(state, exploded, last, SGD, **weights)
    assert_equal(after, before)
    assert_equal(other_metrics, metrics)


def test_the_value_of_a_reset_step_bootstraps_the_truncated_step_before_it():
    state, batch, last = prepared()
    before, _ = run(state, batch, last, SGD)
    truncated = batch.replace(value=batch.value.at[4, 2].add(1.0))
    terminated = batch.replace(value=batch.value.at[3, 1].add(1.0))
    assert difference(run(state, truncated, last, SGD)[0].params, before.params) > 1e-3
    assert_equal(run(state, terminated, last, SGD)[0].params, before.params)


def test_nothing_after_a_broken_step_reaches_the_episode_before_it():
    # Environment 0 broke at step 3, without an end before: the first state of another episode
    # stands there, and the value of the last whole one bootstraps step 2.
    state, batch, last = prepared()
    batch = batch.replace(valid=batch.valid.at[3, 0].set(0), reward=batch.reward.at[3, 0].set(0))
    _, advantage, _ = ppo._with_advantages(state, learner.Rollout(batch, last), apply, PLAIN)
    value, reward = batch.value[:, 0], batch.reward[:, 0]
    assert float(advantage[2, 0]) == pytest.approx(
        float(reward[2] + 0.9 * value[3] - value[2]), rel=1e-5
    )
    assert advantage[3, 0] == 0
    later = batch.replace(reward=batch.reward.at[4, 0].add(5.0))
    _, other, _ = ppo._with_advantages(state, learner.Rollout(later, last), apply, PLAIN)
    np.testing.assert_array_equal(other[:4, 0], advantage[:4, 0])
    assert float(other[4, 0] - advantage[4, 0]) == pytest.approx(5.0, rel=1e-5)


def test_a_batch_without_valid_samples_changes_no_parameter():
    state, batch, last = prepared()
    batch = batch.replace(valid=jnp.zeros_like(batch.valid))
    after, metrics = run(state, batch, last, SGD, entropy_coef=0.1, auxiliary_coef=1.0)
    assert_equal(after.params, state.params)
    assert_equal(after.normalizer, state.normalizer)
    assert all(np.isfinite(x) for x in metrics.values())


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted():
    state, batch, last = prepared()
    # One of the samples breaks the minibatch that it is in, in each of three epochs.
    broken = batch.replace(log_prob=batch.log_prob.at[0, 0].set(jnp.nan))
    after, metrics = run(state, broken, last, SGD, num_epochs=3, num_minibatches=4)
    assert (metrics["optimizer/skipped_steps"], metrics["optimizer/steps"]) == (3, 9)
    assert after.steps == state.steps + 9
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, metrics)))
    assert difference(after.params, state.params) > 1e-4
    after, metrics = run(state, broken, last, SGD, num_epochs=3, num_minibatches=1)
    assert (metrics["optimizer/skipped_steps"], metrics["optimizer/steps"]) == (3, 0)
    assert_equal(after.params, state.params)
    assert_equal(after.opt_state, state.opt_state)
    assert np.isnan(metrics["loss/total"])


def test_a_step_whose_loss_alone_is_not_finite_is_skipped_too():
    state = learner_state(SGD, initial_params())
    gradients = jax.tree.map(jnp.ones_like, state.params)
    after, metrics = learner.apply_gradients(state, jnp.float32(jnp.nan), gradients, SGD)
    assert_equal(after, state)
    assert (metrics["optimizer/skipped_steps"], metrics["optimizer/steps"]) == (1, 0)
    after, metrics = learner.apply_gradients(state, jnp.float32(1), gradients, SGD)
    assert (metrics["optimizer/skipped_steps"], metrics["optimizer/steps"]) == (0, 1)
    assert difference(after.params, state.params) > 0 and metrics["loss/total"] == 1


def test_early_stop_takes_the_step_that_exceeded_the_kl_and_no_more():
    # One minibatch an epoch. The first step's KL is 0; the second sees what the first did, exceeds
    # the target, and is the last: the same as two epochs.
    state, batch, last = prepared()
    stopped, metrics = run(state, batch, last, SGD, num_epochs=5, target_kl=1e-6)
    two, expected = run(state, batch, last, SGD, num_epochs=2)
    five, _ = run(state, batch, last, SGD, num_epochs=5)
    assert float(metrics["optimizer/steps"]) == int(stopped.steps) == 2
    assert float(expected["optimizer/steps"]) == 2
    assert difference(stopped.params, two.params) < 1e-5
    assert difference(five.params, two.params) > 1e-3
    # Metrics are means over the steps that were taken.
    for name, x in expected.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_generous_target_kl_stops_nothing():
    state, batch, last = prepared()
    free, _ = run(state, batch, last, SGD, num_epochs=5)
    watched, metrics = run(state, batch, last, SGD, num_epochs=5, target_kl=1e6)
    assert float(metrics["optimizer/steps"]) == 5
    assert difference(watched, free) < 1e-6


def test_every_sample_is_used_once_an_epoch():
    # While parameters stay, the mean over one epoch's minibatches is the mean over the batch,
    # whatever the shuffle.
    optimizer = optax.sgd(0.0)
    state, batch, last = prepared("continuous", optimizer)
    batch = batch.replace(valid=jnp.ones_like(batch.valid))
    _, whole = run(state, batch, last, optimizer)
    for seed in range(3):
        _, parts = run(state, batch, last, optimizer, num_minibatches=6, seed=seed)
        for name in ("loss/value", "loss/auxiliary", "loss/pointing"):
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


def test_a_minibatch_has_one_sample_of_each_run_and_which_is_drawn():
    keys = jax.random.split(jax.random.key(0), 3)
    order = learner.minibatch_order(keys, size=200, minibatches=4)
    assert order.shape == (12, 50)
    samples = np.array([learner.gather(jnp.arange(200), step) for step in order])
    np.testing.assert_array_equal(samples // 4, np.broadcast_to(np.arange(50), (12, 50)))
    for epoch in samples.reshape(3, 200):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(200))
    # Of 50 runs in 3 epochs, a minibatch has each place about as often: 37.5 times, give or take 5.
    chosen = order.reshape(3, 4, 50)
    for minibatch in chosen.swapaxes(0, 1):
        assert np.all(np.abs(np.bincount(minibatch.ravel(), minlength=4) - 37.5) < 22)
    # Runs and epochs are shuffled apart, in most of the 24 ways that there are.
    assert len(np.unique(chosen.swapaxes(1, 2).reshape(150, 4), axis=0)) > 15


def test_flattened_samples_stay_with_their_environment():
    x = jnp.arange(6).reshape(3, 2)  # Three steps of two environments.
    flat = learner.flatten(x)
    np.testing.assert_array_equal(flat, [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(learner.unflatten(flat, 3), x)


def test_the_entropy_bonus_raises_the_entropy():
    optimizer = optax.adam(0.05)
    for kind in ("continuous", "discrete"):
        state, batch, last = prepared(kind, optimizer)
        # Nothing to win: all that pulls is the bonus.
        batch = batch.replace(reward=jnp.zeros_like(batch.reward))
        state, before = run(state, batch, last, optimizer, entropy_coef=100.0, num_epochs=15)
        _, after = run(state, batch, last, optimizer, entropy_coef=100.0, num_epochs=15)
        assert float(after["policy/entropy"]) > float(before["policy/entropy"]) + 0.05, kind


def test_the_policy_learns_which_action_pays():
    # A bandit (discount 0) in which action 1 pays, and both are equally probable at first.
    optimizer = optax.adam(0.03)
    params = initial_params("discrete")
    state = learner_state(optimizer, params | {"policy": jnp.zeros((PROPRIO, ACTIONS))})
    flat = {"proprio": jnp.ones((1, PROPRIO))}
    everywhere = jnp.zeros((STEPS, BATCH))

    def features(params, observation):
        # A constant reading: otherwise the policy must be learned for every state.
        return apply(params, {"proprio": jnp.ones_like(observation["proprio"])})

    def probability(state):
        logits = learner.run_network(features, state, flat).distribution.logits
        return float(jax.nn.softmax(logits)[0, 1])

    assert probability(state) == 0.5
    for seed in range(8):
        batch, last = record(state, seed=seed, network=features)
        batch = batch.replace(reward=batch.action + everywhere)
        state, _ = run(
            state, batch, last, optimizer, network=features, seed=seed,
            discount=0.0, num_epochs=4, num_minibatches=2,
        )  # fmt: skip
    assert probability(state) > 0.8


def test_statistics_take_in_the_valid_rows_of_every_frame_after_the_update():
    def newest(params, observation):
        return apply(params, {"proprio": observation["proprio"][:, -1]})

    state, batch, last = prepared()
    frames = {"proprio": jnp.stack([2 * batch.observation["proprio"] + 1,
                                    batch.observation["proprio"]], axis=2)}  # fmt: skip
    last = {"proprio": jnp.stack([last["proprio"]] * 2, axis=1)}
    fresh = state.replace(normalizer=normalization.init(PROPRIO))
    after, _ = run(
        fresh, batch.replace(observation=frames), last, SGD, network=newest, num_minibatches=2
    )
    seen = np.asarray(frames["proprio"])[np.asarray(batch.valid) == 1].reshape(-1, PROPRIO)
    assert float(after.normalizer.count) == len(seen) == 2 * (STEPS * BATCH - 3)
    np.testing.assert_allclose(after.normalizer.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    variance = after.normalizer.m2 / after.normalizer.count
    np.testing.assert_allclose(variance, seen.var(0), rtol=1e-4)


def test_explained_variance_by_hand():
    # Nothing follows (discount 0), so the targets are the rewards. Values equal to the rewards
    # explain all of their variance, a constant value none.
    state, batch, last = prepared()
    batch = batch.replace(valid=jnp.ones_like(batch.valid))
    exact = batch.replace(value=batch.reward)
    constant = batch.replace(value=jnp.full_like(batch.value, batch.reward.mean()))
    for other, expected in ((exact, 1.0), (constant, 0.0)):
        _, metrics = run(state, other, last, SGD, discount=0.0)
        assert float(metrics["value/explained_variance"]) == pytest.approx(expected, abs=1e-5)


def test_the_policy_function_samples_or_takes_the_mode():
    state, batch, _ = prepared()

    class EnvState:
        obs = {"proprio": batch.observation["proprio"][0]}

    output = learner.run_network(apply, state, EnvState.obs)
    greedy = learner.policy_function(apply, state, deterministic=True)(EnvState, jax.random.key(0))
    np.testing.assert_array_equal(greedy.action, output.distribution.mean)
    np.testing.assert_array_equal(greedy.environment_action, jnp.tanh(greedy.action))
    sample = learner.policy_function(apply, state, deterministic=False)
    one, two = sample(EnvState, jax.random.key(0)), sample(EnvState, jax.random.key(1))
    assert np.abs(one.action - two.action).min() > 0
    np.testing.assert_allclose(one.log_prob, output.distribution.log_prob(one.action), rtol=1e-6)
    np.testing.assert_array_equal(one.value, output.value)


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
    for updates in (0, 3):
        beside = (demonstrated, jnp.int32(updates))
        changes = {"demonstration_coef": 0.5, "demonstration_decay": 0.8}
        after, metrics = run(state, batch, last, SGD, beside=beside, **changes)
        loss = np.mean(np.sum((mode - action) ** 2, axis=1))
        assert float(metrics["loss/bc"]) == pytest.approx(loss, rel=1e-4)
        moved = after.params["policy"] - without.params["policy"]
        expected = -0.1 * 0.5 * 0.8**updates * gradient
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-6)
        for name in ("value", "log_std"):
            np.testing.assert_allclose(after.params[name], without.params[name], rtol=1e-6)
        assert_equal(after.normalizer, without.normalizer)
