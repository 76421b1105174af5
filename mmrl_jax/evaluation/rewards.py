"""Evaluation with reward functions, some of whose calls may have failed."""

import math
import sys

import numpy as np

from mmrl_jax.evaluation.statistics import bootstrap_interval
from mmrl_jax.tasks.rewards import Rewards


def describe(rewards: Rewards, split: str, *, max_failed: float) -> dict[str, float]:
    """Returns metrics of the completions for the records of a split, one completion each.

    Reward functions tend to fail on malformed completions, so that the mean over the other
    completions is biased. It is therefore reported together with the fraction that failed, and is
    NaN, which never counts as the best value, if that fraction exceeds `max_failed`.

    Args:
      rewards: Rewards of the completions, with leaves [B, 1].
      split: Name of the split, for the message.
      max_failed: Maximum fraction of completions without a reward, in [0, 1), for which the return
        is reported.

    Returns:
      'failed_fraction', the fraction of completions without a reward; 'return', the mean reward of
      the others; 'return_lo' and 'return_hi', its 95 % bootstrap interval; and for each reward
      function 'reward/<function>', the mean of its results where it applies, which is NaN if more
      than `max_failed` of them are missing, or it applies nowhere.
    """
    failed = float(np.mean(~rewards.valid))
    interval = math.nan, math.nan, math.nan
    if failed <= max_failed:
        scored = rewards.reward[rewards.valid]
        interval = bootstrap_interval(scored, confidence=0.95, resamples=2000, seed=0)
    else:
        print(
            f"{failed:.0%} of the completions of split {split!r} have no reward, more than "
            f"rewards.max_failed={max_failed}: the return is not reported, because it would cover "
            "the other completions only. Make the reward functions return a number for every "
            "completion, or declare the reward of a failed call, see mmrl_jax/tasks/rewards.py.",
            file=sys.stderr,
            flush=True,
        )

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
