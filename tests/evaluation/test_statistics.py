"""Tests of mmrl_jax.evaluation.statistics; expected values derived by hand."""

import numpy as np
import pytest

from mmrl_jax.evaluation import statistics


def test_iqm_by_hand():
    # 8 scores: a quarter is 2, so 1, 2 and 100, 200 are left out: (3 + 4 + 5 + 8) / 4 = 5.
    assert statistics.iqm([200, 5, 1, 3, 4, 100, 8, 2]) == 5.0
    # 5 scores: 5 // 4 = 1 left out at each end: (2 + 3 + 7) / 3 = 4.
    assert statistics.iqm([7, -50, 2, 3, 90]) == 4.0
    # 3 scores: none left out: the mean.
    assert statistics.iqm([1, 2, 6]) == 3.0
    # All runs and tasks are one set: [[0, 2], [4, 100]] -> (2 + 4) / 2 = 3.
    assert statistics.iqm(np.array([[0, 2], [4, 100]])) == 3.0


def test_the_rate_interval_is_that_of_the_score_test():
    # Scores of the bounds: (rate - p) / sqrt(p (1 - p) / n) = z.
    for successes, n in ((0, 16), (3, 10), (10, 10), (250, 1000)):
        values = np.repeat([1.0, 0.0], [successes, n - successes])
        rate, low, high = statistics.rate_interval(values, confidence=0.95)
        assert rate == successes / n
        for bound in {low, high} - {0.0, 1.0}:
            score = abs(rate - bound) / np.sqrt(bound * (1 - bound) / n)
            assert score == pytest.approx(1.959964, abs=1e-5)
        assert low < high and low <= rate <= high
    assert statistics.rate_interval([0] * 16, confidence=0.95)[2] == pytest.approx(0.1936, abs=1e-4)
    with pytest.raises(ValueError, match="0 or 1"):
        statistics.rate_interval([0.5], confidence=0.95)


def test_bootstrap_interval_matches_the_binomial():
    # 400 episodes, 100 successes. The mean of a resample is Binomial(400, 0.25) / 400 with
    # standard deviation sqrt(0.25 * 0.75 / 400) = 0.02165, so 95 % is 0.25 -+ 1.96 * 0.02165
    # = [0.2076, 0.2924]; means come in steps of 0.0025, percentiles of 4000 resamples are good
    # to about one step.
    successes = np.repeat([1.0, 0.0], [100, 300])
    mean, low, high = statistics.bootstrap_interval(
        successes, confidence=0.95, resamples=4000, seed=0
    )
    assert mean == 0.25
    assert low == pytest.approx(0.2076, abs=0.005)
    assert high == pytest.approx(0.2924, abs=0.005)
    # 50 %: 0.25 -+ 0.6745 * 0.02165 = [0.2354, 0.2646]: narrower.
    _, low, high = statistics.bootstrap_interval(successes, confidence=0.5, resamples=4000, seed=0)
    assert low == pytest.approx(0.2354, abs=0.004)
    assert high == pytest.approx(0.2646, abs=0.004)


def test_bootstrap_is_deterministic_and_does_not_depend_on_the_chunks(monkeypatch):
    values = np.arange(10.0)
    arguments = {"confidence": 0.9, "resamples": 500, "seed": 3}
    first = statistics.bootstrap_interval(values, **arguments)
    assert statistics.bootstrap_interval(values, **arguments) == first
    assert statistics.bootstrap_interval(values, **(arguments | {"seed": 4})) != first
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 70)
    assert statistics.bootstrap_interval(values, **arguments) == first


def test_bootstrap_of_equal_values_has_no_width():
    interval = statistics.bootstrap_interval([1, 1, 1], confidence=0.95, resamples=10, seed=0)
    assert interval == (1.0, 1.0, 1.0)


def test_stratified_bootstrap_resamples_within_tasks():
    # Two tasks without any noise, 0 and 10, of 4 runs: every resample holds four 0s and four 10s,
    # whose middle half is two of each, IQM 5. Resampling over all eight would mix the tasks and
    # give the interval width.
    scores = np.tile([0.0, 10.0], (4, 1))
    assert statistics.stratified_bootstrap_interval(
        scores, confidence=0.95, resamples=200, seed=0
    ) == (5.0, 5.0, 5.0)


def test_stratified_bootstrap_by_enumeration():
    # One task, runs 0 and 1: no score is trimmed, so the IQM of a resample is 0, 0.5 or 1 with
    # probability 1/4, 1/2, 1/4. The 60 % interval cuts 20 % at each end, less than the quarter at
    # 0 and at 1: [0, 1]. The 40 % interval cuts 30 %: [0.5, 0.5].
    scores = [[0.0], [1.0]]
    arguments = {"resamples": 2000, "seed": 0}
    assert statistics.stratified_bootstrap_interval(scores, confidence=0.6, **arguments) == (
        0.5,
        0.0,
        1.0,
    )
    assert statistics.stratified_bootstrap_interval(scores, confidence=0.4, **arguments) == (
        0.5,
        0.5,
        0.5,
    )


def test_disjoint():
    assert statistics.disjoint((0.1, 0.0, 0.2), (0.5, 0.3, 0.6))
    assert statistics.disjoint((0.5, 0.3, 0.6), (0.1, 0.0, 0.2))
    assert not statistics.disjoint((0.1, 0.0, 0.3), (0.5, 0.3, 0.6))  # They touch.
    assert not statistics.disjoint((0.5, 0.0, 1.0), (0.5, 0.4, 0.6))  # One holds the other.
    with pytest.raises(ValueError, match="second"):
        statistics.disjoint((0.1, 0.0, 0.3), (0.5, 0.6, 0.3))


def test_probability_of_improvement():
    def of(first, second):
        return statistics.probability_of_improvement(
            first, second, confidence=0.95, resamples=2000, seed=0
        )

    # Pairs above: 3 > 1, 3 > 2, and 2 > 1; 2 and 2 are equal: (3 + 1 / 2) / 4.
    value, low, high = of([3, 2], [1, 2])
    assert value == 0.875 and low < 0.875 < high <= 1.0
    assert of([1, 2], [3, 2])[0] == 0.125
    assert of([5, 6, 7], [1, 2]) == (1.0, 1.0, 1.0)
    # 50 runs of each of one distribution: the standard deviation of the statistic is
    # sqrt((n + m + 1) / (12 n m)) = sqrt(101 / 30000) = 0.058.
    first, second = np.random.default_rng(1).normal(size=(2, 50))
    value, low, high = of(first, second)
    assert abs(value - 0.5) < 4 * 0.058 and high - low == pytest.approx(4 * 0.058, rel=0.2)


def test_ratio_of_iqms():
    def of(first, second):
        return statistics.ratio_of_iqms(first, second, confidence=0.95, resamples=5000, seed=0)

    # The IQMs leave out the lowest and the highest of 4: (2 + 4) / 2 over (1 + 2) / 2.
    value, low, high = of([100, 2, 4, 0], [1, 2, 1, 50])
    assert value == 2.0 and low < 2.0 < high
    assert of([3, 3, 3], [2, 2, 2]) == (1.5, 1.5, 1.5)
    # 400 runs each of N(2, 0.2) and N(1, 0.1), both with a relative standard error of the IQM near
    # 0.1 * 1.1 / sqrt(400) = 0.0055: that of the ratio is sqrt(2) times that.
    rng = np.random.default_rng(1)
    value, low, high = of(rng.normal(2, 0.2, 400), rng.normal(1, 0.1, 400))
    assert abs(value - 2) < 4 * 0.016 and high - low == pytest.approx(4 * 0.016, rel=0.2)
    # Of a peer that gained nothing there is no multiple.
    assert np.isnan(of([1, 2], [1, 0])).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: f.bootstrap_interval([], confidence=0.9, resamples=9, seed=0), "empty"),
        (lambda f: f.bootstrap_interval([[1]], confidence=0.9, resamples=9, seed=0), "1 axes"),
        (lambda f: f.bootstrap_interval([1], confidence=95, resamples=9, seed=0), "confidence"),
        (lambda f: f.bootstrap_interval([1], confidence=0.9, resamples=0, seed=0), "resamples"),
        (lambda f: f.iqm([1, float("nan")]), "finite"),
        (
            lambda f: f.stratified_bootstrap_interval([1], confidence=0.9, resamples=9, seed=0),
            "2 axes",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(statistics)
