"""Tests of mmrl_jax.learners.bc on toy demonstrations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import bc, learner
from mmrl_jax.rl import normalization
from mmrl_jax.types import Transition
from tests.linear_policy import apply

# Compiled quickly: nothing here runs for long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SAMPLES, PROPRIO = 64, 3

OPTIONS = bc.BC(value_coef=0.5, auxiliary_coef=0.3, pointing_coef=0.7)


def problem(kind):
    """Returns zero parameters, and demonstrations that linear heads can imitate exactly."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, PROPRIO))
    score = x @ [1.0, -1.0, 0.5]
    if kind == "continuous":
        action = jnp.asarray(np.tanh(np.stack([0.5 * score, -x[:, 0]], 1)), jnp.float32)
    else:
        action = jnp.asarray(score > 0, jnp.int32)
    data = bc.Demonstrations(
        observation={"proprio": jnp.asarray(x, jnp.float32)},
        action=action,
        value_return=jnp.asarray(2 * x[:, 1], jnp.float32),
        bootstrap=jnp.arange(SAMPLES),
        bootstrap_weight=jnp.zeros(SAMPLES),
        privileged={
            "place": jnp.asarray(x[:, :2] - x[:, 2:], jnp.float32),
            "target": jnp.asarray(np.stack([x[:, 0] > 0, 0 * score], 1), jnp.float32),
        },
    )
    params = {
        "policy": jnp.zeros((PROPRIO, 2)),
        "value": jnp.zeros(PROPRIO),
        "place": jnp.zeros((PROPRIO, 2)),
        "target": jnp.zeros((PROPRIO, 2)),
    }
    if kind == "continuous":
        params["log_std"] = jnp.array([-0.3, 0.2])
    return params, data


@functools.cache
def compiled(optimizer):
    @jit
    def update(state, data, indices):
        key = jax.random.key(0)  # Nothing of an update is random.
        batch = bc.gather(data, indices)
        return bc.update(state, batch, key, apply=apply, optimizer=optimizer, options=OPTIONS)

    return update


def drawn(update):
    """Selects half of the samples, and the other half in the next update."""
    return (jnp.arange(SAMPLES // 2) + update * SAMPLES // 2) % SAMPLES


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_every_part_of_the_loss_falls(kind):
    optimizer = optax.adam(0.05)
    params, data = problem(kind)
    state = learner.init(params, optimizer=optimizer, proprio_size=PROPRIO)
    history = []
    for i in range(150):
        state, metrics = compiled(optimizer)(state, data, drawn(i))
        history.append(metrics)
    first, last = history[0], history[-1]
    for name in ("bc", "value", "auxiliary", "pointing", "total"):
        assert float(last[f"loss/{name}"]) < 0.4 * float(first[f"loss/{name}"]), name
    assert int(state.steps) == 150
    if kind == "continuous":
        # The deterministic action is cloned; the spread is not.
        np.testing.assert_array_equal(state.params["log_std"], params["log_std"])


def test_one_step_by_hand():
    # One sample, repeated: x = (1, 0, 0), action (0.5, 0), value target 2, place (1, -1), and the
    # target in the first of two patches. From zero parameters, with learning rate 1:
    #   bc        (0 - 0.5)^2 + 0 = 0.25;  d/dmean = 2 (0 - 0.5) * (1 - tanh(0)^2) = -1
    #   value     0.5 * (0 - 2)^2 = 2;     d/dv = -2, times the weight 0.5 = -1
    #   auxiliary 1 + 1 = 2;               d/dplace = 2 (0 - (1, -1)), times 0.3 = (-0.6, 0.6)
    #   pointing  -log 1/2 = 0.6931472;    d/dlogits = (1/2 - 1, 1/2), times 0.7 = (-0.35, 0.35)
    params, data = problem("continuous")
    one = bc.Demonstrations(
        observation={"proprio": jnp.array([[1.0, 0.0, 0.0], [9.0, 9.0, 9.0]])},
        action=jnp.array([[0.5, 0.0]]),
        value_return=jnp.array([2.0]),
        bootstrap=jnp.array([1]),
        bootstrap_weight=jnp.array([0.0]),
        privileged={"place": jnp.array([[1.0, -1.0]]), "target": jnp.array([[0.2, 0.5]])},
    )
    optimizer = optax.sgd(1.0)
    state = learner.init(params, optimizer=optimizer, proprio_size=PROPRIO)
    state, metrics = compiled(optimizer)(state, one, jnp.zeros(32, jnp.int32))
    expected = {"bc": 0.25, "value": 2.0, "auxiliary": 2.0, "pointing": 0.6931472}
    expected["total"] = 0.25 + 0.5 * 2 + 0.3 * 2 + 0.7 * 0.6931472
    for name, value in expected.items():
        assert float(metrics[f"loss/{name}"]) == pytest.approx(value, rel=1e-5), name
    first_row = {"policy": [1, 0], "value": 1, "place": [0.6, -0.6], "target": [0.35, -0.35]}
    for name, row in first_row.items():
        np.testing.assert_allclose(state.params[name][0], row, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(state.params[name][1:], 0)


def test_the_value_behind_a_limit_counts_and_has_no_gradient():
    # v(x) = w x with w = 3 and x = 1; return 2, and v = 3 * 4 = 12 behind it, of weight 0.5, where
    # a limit truncated the episode: the target is 8, the loss 0.5 * (3 - 8)^2 = 12.5, and the
    # gradient (3 - 8) * x, times the weight 0.5 = -2.5. Where it terminated the target is 2:
    # 0.5 * 1^2, and 0.5 * 1.
    params, _ = problem("continuous")
    params["value"] = jnp.array([3.0, 0.0, 0.0])
    optimizer = optax.sgd(1.0)
    state = learner.init(params, optimizer=optimizer, proprio_size=PROPRIO)
    data = bc.Demonstrations(
        observation={"proprio": jnp.array([[1.0, 0, 0], [1.0, 0, 0], [4.0, 0, 0], [jnp.nan] * 3])},
        action=jnp.zeros((2, 2)),
        value_return=jnp.array([2.0, 2.0]),
        bootstrap=jnp.array([2, 3]),
        bootstrap_weight=jnp.array([0.5, 0.0]),
        privileged={"place": jnp.zeros((2, 2)), "target": jnp.zeros((2, 2))},
    )
    for sample, loss, step in ((0, 12.5, 2.5), (1, 0.5, -0.5)):
        after, metrics = compiled(optimizer)(state, data, jnp.full(32, sample))
        assert float(metrics["loss/value"]) == pytest.approx(loss)
        np.testing.assert_allclose(after.params["value"], [3 + step, 0, 0], rtol=1e-6)


def test_it_normalizes_with_the_statistics_and_keeps_them():
    params, data = problem("discrete")
    optimizer = optax.sgd(0.1)
    state = learner.init(params, optimizer=optimizer, proprio_size=PROPRIO)
    rows = data.observation["proprio"]
    scaled = data.replace(observation={"proprio": 7 * rows + 3})

    def trained(data):
        rows = data.observation["proprio"]
        normalizer = normalization.update(state.normalizer, rows, jnp.ones(SAMPLES))
        after, _ = compiled(optimizer)(state.replace(normalizer=normalizer), data, drawn(0))
        jax.tree.map(np.testing.assert_array_equal, after.normalizer, normalizer)
        return after.params

    # Readings in other units are the same readings.
    for a, b in zip(*map(jax.tree.leaves, (trained(data), trained(scaled))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_demonstrations_by_hand():
    # T = 3, B = 2, discount 0.5. Environment 0: rewards 1 2 4, truncated at the end: returns
    # 1 + 0.5 * 4 = 3, 2 + 0.5 * 4 = 4, 4, and then the value behind the third step, the seventh
    # observation, by 1/8, 1/4, 1/2. Environment 1: rewards 1 1 1, terminated after the second
    # step: 1.5, 1 and no value; 1 for the third, and half the value behind it, the eighth.
    terminated = jnp.zeros((3, 2)).at[1, 1].set(1)
    truncated = jnp.zeros((3, 2)).at[2, 0].set(1)
    zeros = jnp.zeros((3, 2))
    action = jnp.arange(6.0).reshape(3, 2, 1)
    arguments = (
        Transition(
            observation={"proprio": jnp.arange(6.0).reshape(3, 2, 1)},
            action=action,
            log_prob=zeros,
            value=zeros,
            reward=jnp.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]]),
            terminated=terminated,
            truncated=truncated,
            valid=zeros + 1,
            privileged={"place": 10 * action},
            metrics={},
        ),
        jnp.tanh(action),
        {"proprio": jnp.array([[6.0], [7.0]])},
    )
    data = bc.demonstrations(*arguments, discount=0.5)
    one_step = bc.demonstrations(*arguments, discount=0.5, one_step=True)
    np.testing.assert_array_equal(data.value_return, [3.0, 1.5, 4.0, 1.0, 4.0, 1.0])
    np.testing.assert_array_equal(data.bootstrap_weight, [0.125, 0, 0.25, 0, 0.5, 0.5])
    weighted = data.bootstrap_weight > 0
    np.testing.assert_array_equal(data.bootstrap[weighted], [6, 6, 6, 7])
    np.testing.assert_array_equal(data.observation["proprio"][:, 0], np.arange(8))
    np.testing.assert_array_equal(data.privileged["place"][:, 0], 10 * np.arange(6))
    np.testing.assert_allclose(data.action[:, 0], np.tanh(np.arange(6)), rtol=1e-6)
    # With targets of one reward, each step is followed by the observation after it, by 1/2.
    np.testing.assert_array_equal(one_step.value_return, [1.0, 1.0, 2.0, 1.0, 4.0, 1.0])
    np.testing.assert_array_equal(one_step.bootstrap_weight, [0.5, 0.5, 0.5, 0, 0.5, 0.5])
    np.testing.assert_array_equal(one_step.bootstrap, [2, 3, 4, 5, 6, 7])
    jax.tree.map(np.testing.assert_array_equal, one_step.observation, data.observation)


@pytest.mark.parametrize(("size", "batch"), [(1, 3), (2, 1), (7, 7), (100, 30), (1000, 96)])
def test_an_epoch_has_every_sample_once_and_an_order_of_its_own(size, batch):
    updates = -(-4 * size // batch)

    def order(seed, updates):
        indices = jax.vmap(
            lambda u: learner.epoch_indices(jax.random.key(seed), u, batch_size=batch, size=size)
        )
        return indices(updates).ravel()

    order = jit(order)
    all_of = order(0, jnp.arange(updates))
    epochs = np.asarray(all_of[: 4 * size]).reshape(4, size)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (4, 1)))
    # Of the number of the update alone: what a resumed run asks for is what it would have seen.
    np.testing.assert_array_equal(
        order(0, jnp.arange(updates // 2, updates)), all_of[updates // 2 * batch :]
    )
    if size >= 100:
        # Two orders of n agree in one place on average, and in 12 once in 10^9.
        others = [*epochs, np.asarray(order(1, jnp.arange(updates))[:size]), np.arange(size)]
        for i, one in enumerate(others):
            assert all((one == other).sum() < 12 for other in others[:i])
