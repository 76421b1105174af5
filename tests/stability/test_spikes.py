"""Spikes of loss and gradient norm: statistics by hand, and what a skipped step leaves as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import learner, optimizers, token_learner
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.runs import train
from mmrl_jax.stability import spikes
from mmrl_jax.training import loop
from tests import tiny
from tests.training.test_loop import bitwise_equal, rows, run, toy

PARAMS = {"w": jnp.array([1.0, -0.0]), "frozen": jnp.array([0.5])}


def history(*values, window=4):
    """Returns the history of one quantity."""
    recorded = spikes.empty_history(1, window)
    for value in values:
        recorded = spikes.record(recorded, jnp.array([value]))
    return recorded


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        # (1 + 3) / 2 = 2, and sqrt(((1 - 2)^2 + (3 - 2)^2) / (2 - 1)) = sqrt(2).
        ((1.0, 3.0), 2.0, 2**0.5),
        # (1 + 3 + 5 + 7) / 4 = 4, and sqrt((9 + 1 + 1 + 9) / 3) = sqrt(20 / 3).
        ((1.0, 3.0, 5.0, 7.0), 4.0, (20 / 3) ** 0.5),
        # The window has four values: 3, 5, 7, 13 with mean 7, and sqrt((16 + 4 + 0 + 36) / 3).
        ((1.0, 3.0, 5.0, 7.0, 13.0), 7.0, (56 / 3) ** 0.5),
    ],
)
def test_mean_and_standard_deviation_by_hand(values, mean, std):
    found = spikes.mean_and_std(history(*values))
    np.testing.assert_allclose(jnp.concatenate(found), [mean, std], rtol=1e-6)
    np.testing.assert_allclose(np.std(values[-4:], ddof=1), std, rtol=1e-6)


def test_a_spike_exceeds_the_mean_by_more_than_the_deviations():
    # Mean 4 and standard deviation sqrt(20 / 3) = 2.582: with two of them, the limit is 9.164.
    recorded = history(1.0, 3.0, 5.0, 7.0)
    found = [bool(spikes.is_spike(recorded, jnp.array([x]), 2.0)) for x in (9.16, 9.17, -100.0)]
    assert found == [False, True, False]  # A small value is none.
    # Before half of the window is filled there is nothing to compare with.
    assert not spikes.is_spike(history(1.0), jnp.array([1e9]), 2.0)
    assert spikes.is_spike(history(1.0, 1.0), jnp.array([1e9]), 2.0)


def test_rounding_errors_are_no_spikes():
    # The values are equal, and their standard deviation counts as 1e-5: the limit is 6e-5.
    zeros = history(0.0, 0.0, 0.0, 0.0)
    found = [bool(spikes.is_spike(zeros, jnp.array([x]), 6.0)) for x in (5e-5, 7e-5)]
    assert found == [False, True]


def optimizer(window=4, **options):
    options = OptimizerOptions(skip_spikes=6.0, spike_window=window, learning_rate=0.1, **options)
    return optimizers.make(options, 100, is_trained=lambda path: path[0].key == "w").transformation


def learners():
    """Returns the initial states of both kinds of learners."""
    made = optimizer()
    return {
        "control": learner.init(PARAMS, proprio_size=2, optimizer=made),
        "token": token_learner.init(PARAMS, optimizer=made, with_reference=True),
    }


# Gradient norms 1, 1.1, 0.9, 1: a step of norm 50 is a spike in any of the next steps.
NORMS = (1.0, 1.1, 0.9, 1.0)


@jax.jit
def step(state, loss, norm):
    gradients = {"w": jnp.array([norm, 0.0]), "frozen": jnp.zeros(1)}
    return learner.apply_gradients(state, jnp.float32(loss), gradients, optimizer())


def steps(state, *pairs):
    """Takes steps of (loss, gradient norm), and returns the state and the counts of each step."""
    counts = []
    for loss, norm in pairs:
        state, metrics = step(state, loss, norm)
        names = ("steps", "skipped_spikes", "skipped_steps")
        counts.append(tuple(int(metrics[f"optimizer/{name}"]) for name in names))
    return state, counts


TAKEN, SPIKE, NONFINITE = (1, 0, 0), (0, 1, 0), (0, 0, 1)


@pytest.mark.parametrize("kind", ["control", "token"])
@pytest.mark.parametrize("spike", [(0.5, 50.0), (1e3, 1.0)], ids=["norm", "loss"])
def test_a_spike_leaves_all_but_its_mark_as_it_was(kind, spike):
    pairs = [(0.5 + 0.1 * norm, norm) for norm in NORMS]
    before, counts = steps(learners()[kind], *pairs)
    assert counts == [TAKEN] * 4 and before.steps == 4
    after, counts = steps(before, spike)
    assert counts == [SPIKE]
    marked = before.opt_state._replace(in_a_row=jnp.int32(1), last_skipped=jnp.array(True))
    bitwise_equal(after, before.replace(opt_state=marked))
    assert np.signbit(after.params["w"]).tolist() == np.signbit(before.params["w"]).tolist()
    # What follows is bitwise what follows without the spike.
    bitwise_equal(steps(after, (0.6, 1.0))[0], steps(before, (0.6, 1.0))[0])


def test_numbers_that_are_not_finite_are_counted_as_such_and_change_nothing():
    before, _ = steps(learners()["control"], *((0.6, norm) for norm in NORMS))
    for bad in ((jnp.nan, 1.0), (0.6, jnp.inf), (0.6, jnp.nan)):
        after, counts = steps(before, bad)
        assert counts == [NONFINITE]
        bitwise_equal(after, before)


def test_a_level_that_lasts_is_no_spike():
    state, _ = steps(learners()["control"], *((0.6, norm) for norm in NORMS))
    # A step without a gradient does not end the row of steps that are skipped.
    state, counts = steps(state, *[(0.6, 50.0)] * 31, (0.6, 0.0), *[(0.6, 50.0)] * 3)
    assert counts == [SPIKE] * 31 + [TAKEN, SPIKE, TAKEN, TAKEN] and spikes.MAX_IN_A_ROW == 32
    # The statistics have started anew with the last two.
    assert state.opt_state.history.recorded == 2
    np.testing.assert_array_equal(state.opt_state.history.values[1, :2], [50.0, 50.0])


def test_steps_without_a_gradient_are_not_compared_with():
    # Else the first batch with something to learn from would be a spike.
    state, counts = steps(learners()["control"], *[(0.0, 0.0)] * 8, (0.0, 1.0))
    assert counts == [TAKEN] * 9 and state.opt_state.history.recorded == 1


def test_without_the_option_the_optimizer_is_as_before():
    made = optimizers.make(OptimizerOptions(), 10).transformation
    state = learner.init(PARAMS, proprio_size=2, optimizer=made)
    adam = optax.adam(optax.constant_schedule(1e-3), eps=1e-5)
    plain = optax.chain(optax.clip_by_global_norm(1.0), adam)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(plain.init(PARAMS))
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    _, metrics = learner.apply_gradients(state, jnp.float32(1), gradients, made)
    assert "optimizer/skipped_spikes" not in metrics


def test_a_call_of_spikes_alone_has_not_diverged(tmp_path):
    # In update 4, both steps are skipped; the number is logged, and the run ends as it should.
    def update(n, w):
        skipped = jnp.where(n == 4, 2.0, 0.0)
        return {"optimizer/steps": 2.0 - skipped, "optimizer/skipped_spikes": skipped}

    result = run(toy(update, num_updates=5), tmp_path)
    assert isinstance(result, loop.Result) and result.updates == 5
    assert [row["optimizer/skipped_spikes"] for row in rows(tmp_path)] == [0, 0, 0, 2, 0]
    # No step was taken, so that nothing is known of the loss.
    assert rows(tmp_path)[3]["loss/total"] is None


# What is above the mean by a tiny fraction of the standard deviation is skipped, so that some of
# the 8 steps of 4 updates are, from the third on.
OFTEN = {"skip_spikes": 0.01, "spike_window": 4, "schedule": "constant"}


def often(kind):
    if kind == "control":
        return tiny.config("mlp_ppo", mesh__data=8, ppo__optimizer=OFTEN, **tiny.FAST)
    return tiny.token_config(stages=("grpo",), mesh__fsdp=2, grpo__optimizer=OFTEN)


@pytest.mark.parametrize("kind", ["control", pytest.param("token", marks=pytest.mark.slow)])
def test_a_run_that_skips_spikes_resumes_bitwise(kind, tmp_path):
    config = often(kind)
    whole = train(config, tmp_path / "whole")
    skipped = [row.get("optimizer/skipped_spikes") for row in rows(tmp_path / "whole")]
    assert sum(skipped[1:]) > 0 and skipped[1] == 0
    stage = config[config.stages[-1]]
    stage.num_updates = 2
    train(config, tmp_path / "parts")
    stage.num_updates = 4
    parts = train(config, tmp_path / "parts")
    bitwise_equal(whole.last.carry, parts.last.carry)
    state = whole.last.carry.learner.opt_state
    assert state.history.recorded + sum(skipped[1:]) == 8
    assert state.history.values.sharding.is_fully_replicated
