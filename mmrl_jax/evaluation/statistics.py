"""Statistics of results: intervals for success rates, IQM over runs, comparison of intervals.

All functions compute in numpy on the host and are deterministic for a given seed. This project
reports no result without an interval.
"""

from collections.abc import Callable, Sequence
import math
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float, float]
_CHUNK_ELEMENTS = 4_000_000


def bootstrap_interval(
    values: np.ndarray | Sequence[float],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Returns the mean with its percentile bootstrap interval.

    Hazard: if all values are equal, so are all resamples, and the interval has zero width. For the
    rate of successes, use `rate_interval`.

    Args:
        values: One number for each episode, `[N]`, N at least 1.
        confidence: Probability mass of the interval, in (0, 1).
        resamples: Number of bootstrap resamples, at least 1.
        seed: Seed of the resampling.

    Returns:
        (mean, low, high).

    Raises:
        ValueError: If an argument is out of range or a value is not finite.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = _checked(values, ndim=1)
    _check_bootstrap(confidence, resamples)
    rng = np.random.default_rng(seed)
    n = len(values)
    means = _in_chunks(
        resamples, n, lambda count: values[rng.integers(0, n, (count, n))].mean(axis=1)
    )
    low, high = _percentiles(means, confidence)
    return float(values.mean()), low, high


def rate_interval(successes: np.ndarray | Sequence[float], *, confidence: float) -> Interval:
    """Returns a success rate with its Wilson score interval, which is never of zero width.

    Args:
        successes: 1 for each episode that succeeded and 0 for each other one, `[N]`, N at least 1.
        confidence: Probability mass of the interval, in (0, 1).

    Returns:
        (rate, low, high).

    Raises:
        ValueError: If an argument is out of range or a value is neither 0 nor 1.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927;
    recommended by Brown, Cai and DasGupta, Interval Estimation for a Binomial Proportion, 2001.
    """
    successes = _checked(successes, ndim=1)
    _check_confidence(confidence)
    if not np.isin(successes, (0.0, 1.0)).all():
        raise ValueError("successes must be 0 or 1.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    n, rate = len(successes), float(successes.mean())
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # Rounding may leave a bound on the wrong side of a rate of 0 or 1.
    return rate, min(center - half, rate), max(center + half, rate)


def iqm(scores: np.ndarray | Sequence[float]) -> float:
    """Returns the interquartile mean: the mean of the middle half of all scores.

    The lowest and the highest quarter of the scores are discarded. Their number is rounded down, as
    in `scipy.stats.trim_mean(scores, 0.25)` and rliable.

    Args:
        scores: Scores of any shape, for example `[runs, tasks]`; at least one.

    Raises:
        ValueError: If there are no scores or a score is not finite.

    Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
    NeurIPS 2021.
    """
    return float(_iqm_rows(_checked(scores, ndim=None).reshape(1, -1))[0])


def stratified_bootstrap_interval(
    scores: np.ndarray | Sequence[Sequence[float]],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Returns the IQM over runs and tasks with its stratified percentile bootstrap interval.

    Runs are resampled within each task, so that each resample has as many runs of every task as the
    data.

    Args:
        scores: One score for each run of each task, `[runs, tasks]`.
        confidence: Probability mass of the interval, in (0, 1).
        resamples: Number of bootstrap resamples, at least 1.
        seed: Seed of the resampling.

    Returns:
        (IQM, low, high).

    Raises:
        ValueError: If an argument is out of range, or the scores have another number of axes or are
            not finite.

    Source: Agarwal et al., NeurIPS 2021, section 4.
    """
    scores = _checked(scores, ndim=2)
    _check_bootstrap(confidence, resamples)
    rng = np.random.default_rng(seed)
    runs, tasks = scores.shape

    def resample(count: int) -> np.ndarray:
        chosen = rng.integers(0, runs, (count, runs, tasks))
        return _iqm_rows(scores[chosen, np.arange(tasks)].reshape(count, -1))

    low, high = _percentiles(_in_chunks(resamples, runs * tasks, resample), confidence)
    return iqm(scores), low, high


def probability_of_improvement(
    first: np.ndarray | Sequence[float],
    second: np.ndarray | Sequence[float],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Returns the probability that a run of `first` scores above a run of `second`.

    Ties count as half:

      P = mean_ij [x_i > y_j] + [x_i = y_j] / 2

    Args:
        first: One score for each run, `[N]`.
        second: One score for each run, `[M]`.
        confidence: Probability mass of the interval, in (0, 1).
        resamples: Number of bootstrap resamples of the runs of both, at least 1.
        seed: Seed of the resampling.

    Returns:
        (probability, low, high).

    Raises:
        ValueError: If an argument is out of range or a score is not finite.

    Source: Agarwal et al., NeurIPS 2021, section 4.3 (the Mann-Whitney U statistic).
    """
    first, second = _checked(first, ndim=1), _checked(second, ndim=1)
    _check_bootstrap(confidence, resamples)
    above = np.heaviside(first[:, None] - second[None, :], 0.5)
    rng = np.random.default_rng(seed)
    n, m = above.shape

    def resample(count: int) -> np.ndarray:
        rows, columns = rng.integers(0, n, (count, n, 1)), rng.integers(0, m, (count, 1, m))
        return above[rows, columns].mean(axis=(1, 2))

    low, high = _percentiles(_in_chunks(resamples, n * m, resample), confidence)
    return float(above.mean()), low, high


def ratio_of_iqms(
    first: np.ndarray | Sequence[float],
    second: np.ndarray | Sequence[float],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Returns IQM(first) / IQM(second) with its percentile bootstrap interval.

    Args:
        first: One score for each run, `[N]`.
        second: One score for each run, `[M]`; the scores must be positive for a meaningful ratio.
        confidence: Probability mass of the interval, in (0, 1).
        resamples: Number of bootstrap resamples of the runs of both, at least 1.
        seed: Seed of the resampling.

    Returns:
        (ratio, low, high); all three are NaN if a score of `second` is not positive.

    Raises:
        ValueError: If an argument is out of range or a score is not finite.
    """
    first, second = _checked(first, ndim=1), _checked(second, ndim=1)
    _check_bootstrap(confidence, resamples)
    if second.min() <= 0:
        return np.nan, np.nan, np.nan
    rng = np.random.default_rng(seed)

    def resample(count: int) -> np.ndarray:
        above, below = (
            _iqm_rows(rng.choice(scores, (count, len(scores)))) for scores in (first, second)
        )
        return above / below

    low, high = _percentiles(_in_chunks(resamples, len(first) + len(second), resample), confidence)
    return iqm(first) / iqm(second), low, high


def disjoint(first: Interval, second: Interval) -> bool:
    """Returns whether two (value, low, high) intervals have no point in common.

    Raises:
        ValueError: If the low bound of an interval is above its high bound.
    """
    for name, interval in (("first", first), ("second", second)):
        if not interval[1] <= interval[2]:
            raise ValueError(f"{name} is {interval}, but must be (value, low, high), low <= high.")
    return first[2] < second[1] or second[2] < first[1]


def _iqm_rows(rows: np.ndarray) -> np.ndarray:
    """Returns the IQM of each row of `[rows, N]`."""
    n = rows.shape[1]
    trimmed = n // 4
    return np.sort(rows, axis=1)[:, trimmed : n - trimmed].mean(axis=1)


def _in_chunks(resamples: int, width: int, resample: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns `[resamples]` values, calling `resample(count)` in chunks to bound its memory."""
    chunk = max(1, _CHUNK_ELEMENTS // width)
    counts = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([resample(count) for count in counts])


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


def _checked(
    values: np.ndarray | Sequence[float] | Sequence[Sequence[float]], *, ndim: int | None
) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"values have shape {array.shape}, but must have {ndim} axes.")
    if not array.size:
        raise ValueError("values are empty: give at least one.")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite: leave out or repair the runs that diverged.")
    return array


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must be in (0, 1), for example 0.95.")


def _check_bootstrap(confidence: float, resamples: int) -> None:
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1, for example 2000.")
