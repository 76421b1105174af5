"""Detection of divergences in rows of metrics, and the factor of the learning rate."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.stability import divergence, learning_rate
from mmrl_jax.stability.divergence import RollbackOptions, Watch

OPTIONS = RollbackOptions(max_retries=3, cooldown=5)


def observed(rows, options=OPTIONS, watch=Watch()):  # noqa: B008
    """Returns the last state, and the updates (from 1 on) with the reasons of their divergences."""
    found = {}
    for update, row in enumerate(rows, start=1):
        watch, reason = divergence.observe(watch, row, update, options)
        if reason is not None:
            found[update] = reason
    return watch, found


def losses(*values):
    return [{"loss/total": x} for x in values]


def test_a_high_loss_must_last():
    steady = losses(*[1.0] * 10)
    # At 3.01 the limit, 3 * 1, is exceeded; the average of 1 does not follow it.
    watch, found = observed(steady + losses(3.01, -3.01, 3.01))
    assert list(found) == [13] and watch.loss == pytest.approx(1.0)
    assert found[13] == (
        "the absolute loss, now 3.01, was above 3 times its moving average, 1, for 3 rows of "
        "metrics"
    )
    # A row within the limit starts the count anew, and one without a loss does not.
    assert not observed(steady + losses(9.0, 9.0, 2.9, 9.0, 9.0))[1]
    watch, found = observed([*steady, *losses(9.0), {}, *losses(float("nan"), 9.0)])
    assert watch.suspicious and watch.beyond == {"loss": 2} and not found
    # There is nothing to compare with in the first ten rows.
    assert not observed(losses(*[0.1] * 5, *[9.0] * 4))[1]


def test_the_average_by_hand():
    # 0.9 * 1 + 0.1 * 2 = 1.1, and 0.9 * 1.1 + 0.1 * 3 = 1.29.
    assert observed(losses(1.0, -2.0, 3.0))[0].loss == pytest.approx(1.29)


def test_a_loss_near_zero_has_a_limit():
    # The average counts as 0.05 at least, so that the limit is 0.15.
    quiet = [1e-9] * 10
    assert not observed(losses(*quiet, 0.14, 0.14, 0.14))[1]
    assert list(observed(losses(*quiet, 0.16, 0.16, 0.16))[1]) == [13]


@pytest.mark.parametrize(
    ("limits", "metric", "good", "bad"),
    [
        ({"max_kl": 0.1}, "policy/approx_kl", 0.1, 0.11),
        ({"min_entropy": -1.0}, "policy/entropy", -1.0, -1.1),
    ],
)
def test_kl_divergence_and_entropy(limits, metric, good, bad):
    options = dataclasses.replace(OPTIONS, **limits)
    rows = [{metric: x} for x in (bad, bad, good, bad, bad, bad)]
    assert list(observed(rows, options)[1]) == [6] and metric in observed(rows, options)[1][6]
    assert not observed(rows)[1]


@pytest.mark.parametrize("name", ["episode/return", "completion/reward"])
def test_a_return_that_collapses(name):
    options = dataclasses.replace(OPTIONS, return_patience=4)
    # After 11 rows of 1 the best average is 1. With zeros it is 0.9^k: 0.9^6 = 0.531 is above a
    # half and 0.9^7 = 0.478 below, so that the 4th row below is the 10th zero.
    rows = [{name: x} for x in [1.0] * 11 + [0.0] * 12]
    assert min(observed(rows, options)[1]) == 21
    # Half of a negative return is better than it, and means nothing.
    assert not observed([{name: x} for x in [-1.0] * 11 + [-9.0] * 30], options)[1]


def test_after_a_rollback_it_is_quiet_for_a_while():
    before, _ = observed(losses(*[1.0] * 10, 9.0, 9.0))
    watch = divergence.after_rollback(before, 10, OPTIONS)
    assert (watch.retries, watch.quiet_until, watch.suspicious) == (1, 15, False)
    # The limit of 3 * 1 is exceeded from update 11 on, which is suspicious at once.
    reasons = {}
    for update in range(11, 18):
        watch, reasons[update] = divergence.observe(watch, losses(9.0)[0], update, OPTIONS)
        assert watch.suspicious
    assert [update for update, reason in reasons.items() if reason] == [16, 17]


def test_the_state_survives_json():
    watch, _ = observed(losses(*[0.1 + 0.2] * 10, 9.0))
    assert Watch(**json.loads(json.dumps(dataclasses.asdict(watch)))) == watch


def test_a_limit_of_a_metric_that_is_not_there_is_refused():
    options = dataclasses.replace(OPTIONS, max_kl=0.1)
    with pytest.raises(ValueError, match=r"bc.rollback.max_kl=0.1, but .*'policy/approx_kl'"):
        divergence.check_metrics(options, ["loss/total"], "bc")
    divergence.check_metrics(options, ["policy/approx_kl"], "ppo")


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd"])
@pytest.mark.parametrize("spikes", [None, 6.0])
def test_the_factor_is_one_of_the_learning_rate(name, spikes):
    params, gradients = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.3, -0.1])}
    decay = 0.1 if name in ("adamw", "lion") else 0.0

    def two_updates(rate, factor, scalable=True):
        options = OptimizerOptions(
            name=name, learning_rate=rate, weight_decay=decay, skip_spikes=spikes
        )
        made = optimizers.make(options, 10, scalable=scalable).transformation
        made = optax.with_extra_args_support(made)
        state, changes = made.init(params), []
        for _ in range(2):
            extra = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
            change, state = made.update(gradients, state, params, **extra)
            changes.append(change)
            state = learning_rate.lower(state, factor)
        return changes, learning_rate.scale_of(state)

    (first, second), scale = two_updates(1e-2, 0.25)
    assert scale == 0.0625
    plain, none = two_updates(1e-2, 1.0, scalable=False)
    assert none is None
    jax.tree.map(np.testing.assert_array_equal, first, plain[0])  # A factor of 1 changes no bit.
    quarter, _ = two_updates(0.25e-2, 1.0)
    np.testing.assert_allclose(second["w"], quarter[1]["w"], rtol=1e-6)
