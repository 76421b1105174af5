"""Which checkpoints of a run are kept."""

from collections.abc import Collection, Mapping
from typing import Any


def best_step(scores: Mapping[int, float | None]) -> int | None:
    """Returns the last step with the highest score; None if no step has a score."""
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else None


class KeepNewestAndBest:
    """Orbax preservation policy that keeps the newest `keep` checkpoints and the best by score.

    It also keeps the newest one that a rollback may restore. This is one of the others, unless the
    run was stopped several times since.

    The policy BestN of Orbax is not used: it reads its metric files when a manager opens, and fails
    if one of them is damaged.

    Args:
      keep: Number of newest checkpoints to keep.
      scores: Scores of the checkpoints by their steps, which change while the run lasts.
      targets: Steps of those that a rollback may restore, which change too.
    """

    def __init__(self, keep: int, scores: Mapping[int, float | None], targets: Collection[int]):
        self._keep = keep
        self._scores = scores
        self._targets = targets

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        preserved = {*sorted(steps)[-self._keep :]}
        preserved.add(best_step({step: self._scores.get(step) for step in steps}))
        preserved.add(max((step for step in steps if step in self._targets), default=None))
        return [step in preserved for step in steps]
