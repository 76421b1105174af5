"""Gradient surgery between the parts of PPO's loss, and the options that it needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import problems, runs
from mmrl_jax.learners import dapg, learner, loss_gradients, ppo
from mmrl_jax.monitoring import metrics as metrics_lib
from tests import tiny
from tests.learners.test_ppo import PLAIN, SGD, jit, prepared, record, run
from tests.linear_policy import apply as linear

RATE = 0.1  # Of SGD.
COEFS = {"entropy_coef": 0.1, "auxiliary_coef": 0.7, "pointing_coef": 1.3}


def shared(params, observation):
    """Returns the outputs of `linear` for features x + tanh(x @ trunk), which all heads share."""
    x = observation["proprio"]
    return linear(params["heads"], {"proprio": x + jnp.tanh(x @ params["trunk"])})


def with_trunk():
    state, _, _ = prepared("discrete")
    trunk = jnp.asarray(np.random.default_rng(10).normal(size=(3, 3)), jnp.float32)
    params = {"heads": state.params, "trunk": trunk}
    state = state.replace(params=params, opt_state=SGD.init(params))
    return state, *record(state, network=shared)


def part_gradients(state, batch, last, options):
    def gradients(state, batch, last):
        rollout, key = learner.Rollout(batch, last), jax.random.key(0)
        return ppo.part_gradients(state, rollout, key, apply=shared, options=options)

    return jit(gradients)(state, batch, last)


def stepped(state, batch, last, **changes):
    after, metrics = run(state, batch, last, SGD, network=shared, **COEFS | changes)
    step = jax.tree.map(lambda a, b: np.asarray(b - a) / RATE, after.params, state.params)
    return step, metrics


def test_the_sum_of_the_gradients_of_the_parts_is_that_of_the_loss():
    state, batch, last = with_trunk()
    options = dataclasses.replace(PLAIN, **COEFS)
    parts = part_gradients(state, batch, last, options)
    plain, _ = stepped(state, batch, last)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x.sum(0), y, rtol=1e-3, atol=1e-5), parts, plain
    )
    # Each head has the gradient of its own part alone, in the order of `rollout_parts`.
    assert np.any(np.asarray(parts["trunk"]) != 0, axis=(1, 2)).all()
    names = ppo.rollout_parts(options)
    assert names == ("policy", "value", "entropy", "auxiliary", "pointing")
    value = parts["heads"]["value"]
    assert [bool(np.any(x)) for x in value] == [name == "value" for name in names]


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
def test_the_step_is_that_of_gradients_that_were_written_out(surgery):
    state, batch, last = with_trunk()
    chosen = ("policy", "value")
    options = dataclasses.replace(PLAIN, **COEFS)
    parts = part_gradients(state, batch, last, options)
    by_name = {
        name: jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), parts)
        for i, name in enumerate(ppo.rollout_parts(options))
    }
    a, b = (by_name[name]["trunk"] for name in chosen)
    product = np.sum(a * b)
    # This batch has a conflict, or the test would say nothing.
    assert product < 0
    if surgery == "pcgrad":
        trunk = a - product / np.sum(b * b) * b + b - product / np.sum(a * a) * a
    else:
        mean, c = (a + b) / 2, 0.5
        weights = np.linspace(0, 1, 200_001)[:, None, None]
        mixed = weights * a + (1 - weights) * b
        norms = np.sqrt(np.sum(mixed**2, axis=(1, 2)))
        radius = c * np.sqrt(np.sum(mean**2))
        best = np.argmin(np.sum(mixed * mean, axis=(1, 2)) + radius * norms)
        trunk = 2 * (mean + radius / norms[best] * mixed[best]) / (1 + c)
    trunk = trunk + sum(by_name[name]["trunk"] for name in ("entropy", "auxiliary", "pointing"))
    step, metrics = stepped(
        state, batch, last, gradient_surgery=surgery, surgery_parts=chosen, cagrad_c=0.5
    )
    np.testing.assert_allclose(step["trunk"], trunk, rtol=2e-3, atol=2e-4)
    cosine = product / np.sqrt(np.sum(a * a) * np.sum(b * b))
    assert float(metrics["grad/min_cosine"]) == pytest.approx(cosine, rel=1e-3)
    # The heads, each of a single part, take the plain step.
    plain, before = stepped(state, batch, last)
    for name in ("value", "place", "target"):
        np.testing.assert_allclose(step["heads"][name], plain["heads"][name], rtol=1e-4, atol=1e-5)
    assert np.abs(step["trunk"] - plain["trunk"]).max() > 1e-3
    assert float(metrics["loss/total"]) == pytest.approx(float(before["loss/total"]), rel=1e-5)
    assert "grad/min_cosine" not in before


def test_where_actor_and_critic_share_nothing_the_step_is_the_plain_one():
    # Of the linear network each part has its own matrix.
    state, batch, last = prepared("discrete")
    plain, _ = run(state, batch, last, SGD, auxiliary_coef=0.7)
    after, metrics = run(state, batch, last, SGD, auxiliary_coef=0.7, gradient_surgery="cagrad")
    assert metrics["grad/min_cosine"] == 1
    for name, x in plain.params.items():
        np.testing.assert_allclose(after.params[name], x, rtol=1e-5, atol=1e-6)


def test_a_value_that_is_not_finite_still_skips_the_step():
    state, batch, last = with_trunk()
    broken = batch.replace(log_prob=batch.log_prob.at[0, 0].set(jnp.nan))
    after, metrics = run(
        state, broken, last, SGD, network=shared, gradient_surgery="pcgrad", **COEFS
    )
    assert metrics["optimizer/skipped_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_an_entropy_bonus_that_starts_at_0_has_no_gradient_to_measure():
    adaptive = dataclasses.replace(PLAIN, entropy_target=0.5)
    assert adaptive.loss_parts == ("policy", "value", "entropy")
    assert ppo.rollout_parts(adaptive) == ("policy", "value")
    started = dataclasses.replace(adaptive, entropy_coef=0.1)
    assert ppo.rollout_parts(started) == ("policy", "value", "entropy")


def test_a_term_that_has_no_name_is_refused_before_it_loses_its_gradient():
    # Gradients at (1, 1): (1, 1) of the policy, (1, -2) of the value, and (10, 10) of a third term.
    def terms(params):
        parts = {"policy": params.sum(), "value": params[0] - 2 * params[1]}
        return parts | {"mine": 10 * params.sum()}, {}

    def gradient(present, **changes):
        options = loss_gradients.SurgeryOptions(**changes)
        return loss_gradients.value_and_gradient(
            terms, jnp.ones(2), jax.random.key(0), present=present, options=options
        )[2]

    named = ("policy", "value", "mine")
    np.testing.assert_allclose(gradient(("policy", "value")), [12, 9])
    # <(1, 1), (1, -2)> = -1: (1, 1) + (1, -2) / 5 and (1, -2) + (1, 1) / 2, and (10, 10).
    np.testing.assert_allclose(gradient(named, gradient_surgery="pcgrad"), [12.7, 9.1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"'mine'.* but loss_parts=\('policy', 'value'\): a term"):
        gradient(("policy", "value"), gradient_surgery="pcgrad")


MLP = {"name": "mlp_ppo", **tiny.FAST}
IMAGES = {"name": "reach_ppo_scratch"}
SURGERY = {"ppo__gradient_surgery": "pcgrad"}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MLP, SURGERY, r"ppo.gradient_surgery='pcgrad' needs .* has only \['policy'\]: name"),
        # The network has no auxiliary targets.
        (
            IMAGES,
            SURGERY
            | {"model__auxiliary": (), "model__pointing": None, "ppo__value_coef": 0.0}
            | {"ppo__auxiliary_coef": 1.0, "ppo__pointing_coef": 1.0},
            r"ppo.gradient_surgery='pcgrad' needs .* has only \['policy'\]: name",
        ),
        (MLP, {"ppo__popart": True, "ppo__value_coef": 0.0}, "ppo.popart=True .*ppo.value_coef=0 "),
        (
            MLP,
            {"ppo__popart": True, "ppo__trainable": ".*policy.*"},
            "ppo.trainable='.*policy.*' does not match .*value_head/value/kernel",
        ),
        (MLP, {"ppo__popart_decay": 0.3}, "ppo.popart_decay=0.3 has no effect .*popart=False: set"),
        (
            MLP,
            {"ppo__min_learning_rate": 1.0},
            "ppo.min_learning_rate=1.0 .*desired_kl=None: .*1e-05",
        ),
        (MLP, {"ppo__max_learning_rate": 1.0}, "ppo.max_learning_rate=1.0 .*desired_kl=None"),
        (MLP, {"ppo__surgery_parts": ("policy",)}, "ppo.surgery_parts=.*gradient_surgery='none'"),
        (IMAGES, SURGERY | {"ppo__cagrad_c": 0.3}, "ppo.cagrad_c=0.3 .*gradient_surgery='pcgrad'"),
    ],
)
def test_options_without_an_effect_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        problems.make(tiny.config(**config, **changes))


def test_a_perceptron_has_surgery_between_the_parts_of_its_actor(tmp_path):
    changes = SURGERY | {"ppo__surgery_parts": ("policy", "entropy"), "ppo__entropy_coef": 0.1}
    runs.train(tiny.config(**MLP, **changes, last__num_updates=1), tmp_path)
    rows = [x for x in metrics_lib.read_jsonl(tmp_path / "metrics.jsonl") if "grad/norm" in x]
    # Gradients that share no parameters have the cosine 1.
    assert [-1 <= x["grad/min_cosine"] < 1 for x in rows] == [True]


def test_fewer_than_two_parts_are_refused():
    options = dataclasses.replace(PLAIN, gradient_surgery="pcgrad")
    loss_gradients.check(options, options.loss_parts, "ppo")
    alone = dataclasses.replace(options, surgery_parts=("policy", "auxiliary"))
    message = r"ppo.gradient_surgery='pcgrad' needs two .* has only \['policy'\]: name more parts"
    with pytest.raises(ValueError, match=message):
        loss_gradients.check(alone, alone.loss_parts, "ppo")
    cloned = dapg.DAPG(gradient_surgery="pcgrad", surgery_parts=("policy", "bc"))
    loss_gradients.check(cloned, cloned.loss_parts, "dapg")
    with pytest.raises(ValueError, match="'ppo.surgery_parts' is .*'critic'.*, but must be diff"):
        problems.make(tiny.config("mlp_ppo", ppo__surgery_parts=("critic",), **tiny.FAST))
