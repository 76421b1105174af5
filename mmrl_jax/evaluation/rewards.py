"""Evaluation with reward functions, some of whose calls may have failed."""

from collections.abc import Collection
import math
import sys

import numpy as np

from mmrl_jax.evaluation.statistics import Interval, bootstrap_interval, rate_interval
from mmrl_jax.tasks.rewards import Rewards


def describe(
    rewards: Rewards, split: str, *, max_failed: float, weighted: Collection[str]
) -> dict[str, float]:
    """Returns metrics of the completions for the records of a split, one completion each.

    Reward functions tend to fail on malformed completions, so that the mean over the other
    completions is biased. It is therefore reported together with the fraction that failed, and is
    NaN, which never counts as the best value, if that fraction exceeds `max_failed`. A completion
    to which no function applies has not failed, and is left out.

    Args:
      rewards: Rewards of the completions, with leaves [B, 1].
      split: Name of the split, for the message.
      max_failed: Maximum fraction, in [0, 1), that may have failed if the return is reported.
      weighted: Names of the functions with a nonzero weight, at least one.

    Returns:
      'failed_fraction', the fraction of completions whose reward failed, of those to which a
      function with nonzero weight applies; 'return', the mean of the rewards; 'return_lo' and
      'return_hi', its 95 % interval, Wilson's if all rewards are 0 or 1, otherwise by bootstrap;
      and for each reward function 'reward/<function>', the mean of its results where it applies,
      which is NaN if more than `max_failed` of them are missing, or it applies nowhere.
    """
    applies = np.any([rewards.applies[name] for name in weighted], axis=0)
    failed = float(np.mean(~rewards.valid[applies])) if applies.any() else 0.0
    interval, scored = (math.nan, math.nan, math.nan), rewards.reward[rewards.valid]
    if len(scored) and failed <= max_failed:
        interval = _interval(scored)
    else:
        why = (
            f"the reward of {failed:.0%} of the completions of split {split!r} failed, more than "
            f"rewards.max_failed={max_failed}: it would cover the other completions only. Make the "
            "reward functions return a number for every completion, or declare the reward of a "
            "failed call, see mmrl_jax/tasks/rewards.py."
            if applies.any()
            else f"no function with a weight applies to a record of split {split!r}."
        )
        print(f"The return is not reported, because {why}", file=sys.stderr, flush=True)

    def mean(part: np.ndarray) -> float:
        valid = np.isfinite(part)
        if not valid.any() or np.mean(~valid) > max_failed:
            return math.nan
        return float(part[valid].mean())

    parts = {
        f"reward/{name}": mean(part[rewards.applies[name]]) for name, part in rewards.parts.items()
    }
    names = ("return", "return_lo", "return_hi")
    return dict(zip(names, interval, strict=True)) | {"failed_fraction": failed} | parts


def _interval(scored: np.ndarray) -> Interval:
    """Returns the mean of at least one reward, and its 95 % interval."""
    if np.isin(scored, (0.0, 1.0)).all():
        return rate_interval(scored, confidence=0.95)
    return bootstrap_interval(scored, confidence=0.95, resamples=2000, seed=0)
