"""Evaluation by reward functions, some of whose calls may have failed."""

import math
import sys

import numpy as np

from mmrl_jax.evaluation.statistics import bootstrap_interval
from mmrl_jax.tasks.rewards import Rewards


def describe(rewards: Rewards, split: str, *, max_failed: float) -> dict[str, float]:
    """Metrics of the answers to the records of a split, one answer each.

    A mean over those answers alone whose reward functions did not fail is a mean of those that are
    well-formed, where malformed ones are what functions fail on. It is therefore reported next to
    the share that failed, and not at all (NaN, which is no best value either) above `max_failed`.

    Args:
      rewards: of the answers, [B, 1].
      split: its name, for the message.
      max_failed: the share of answers, in [0, 1), that may be without a reward.

    Returns:
      'failed_fraction', the share of answers without a reward; 'return', their mean reward, and
      'return_lo' and 'return_hi', its 95 % interval; and for each function 'reward/<function>', the
      mean of its results, NaN if more than `max_failed` of them are missing.
    """
    failed = float(np.mean(~rewards.valid))
    interval = math.nan, math.nan, math.nan
    if failed <= max_failed:
        scored = rewards.reward[rewards.valid]
        interval = bootstrap_interval(scored, confidence=0.95, resamples=2000, seed=0)
    else:
        print(
            f"{failed:.0%} of the answers to split {split!r} have no reward, more than "
            f"rewards.max_failed={max_failed}: the return is not reported, for it would be that of "
            "the other answers. Let the reward functions return a number for every answer, or "
            "declare what a failed call counts as, see mmrl_jax/tasks/rewards.py.",
            file=sys.stderr,
            flush=True,
        )

    def mean(part: np.ndarray) -> float:
        there = np.isfinite(part)
        return float(part[there].mean()) if np.mean(~there) <= max_failed else math.nan

    parts = {f"reward/{name}": mean(part) for name, part in rewards.parts.items()}
    names = ("return", "return_lo", "return_hi")
    return dict(zip(names, interval, strict=True)) | {"failed_fraction": failed} | parts
