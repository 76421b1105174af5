"""Alarms: what goes wrong in silence while a policy that answers is trained.

Each one happened to others unnoticed for hundreds of updates. They are read off what was logged, so
that a resumed run has those that the whole run would have had.
"""

from collections import deque
from collections.abc import Mapping
import math

Row = Mapping[str, float | None]
WINDOW = 20  # Lines of the log that an alarm wants to see.
SHORT = 1 / 3  # Of the longest mean length of answers before.
CERTAIN = 0.02  # Of the entropy in the first line.
WATCHED = ("completion/reward", "reward/zero_std_groups", "completion/length", "policy/entropy")


class Alarms:
    """Watches the lines of a run's log, one after the other.

    'reward_constant', 'groups_degenerate', 'answers_short' and 'entropy_low' want WINDOW lines;
    'pictures_unused' wants two evaluations. A line without what an alarm is about is passed over.

    Attributes:
      raised: those raised after the last line, name -> what is wrong and where to look.
    """

    def __init__(self) -> None:
        self.raised: dict[str, str] = {}
        self._last: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in WATCHED}
        self._longest = 0.0
        self._first_entropy: float | None = None
        self._unseeing: deque[bool] = deque(
            maxlen=2
        )  # Of evaluations: are shuffled images as good?

    def see(self, row: Row) -> dict[str, str]:
        """Takes a line in; the alarms that it raises and the line before did not."""
        for name, values in self._last.items():
            value = row.get(name)
            # A file of metrics has None for what was not finite.
            if value is not None and math.isfinite(value):
                values.append(value)
        shuffled = row.get("eval/train/shuffled_image/accuracy")
        least = row.get("eval/train/accuracy_lo")
        if shuffled is not None and least is not None:
            self._unseeing.append(shuffled >= least)
        before, self.raised = self.raised, self._found()
        return {name: text for name, text in self.raised.items() if name not in before}

    def _found(self) -> dict[str, str]:
        reward, degenerate, length, entropy = (self._last[name] for name in WATCHED)
        self._longest = max(self._longest, *length, 0.0)
        if self._first_entropy is None and entropy:
            self._first_entropy = entropy[0]
        found: dict[str, str] = {}
        if len(reward) == WINDOW and max(reward) == min(reward):
            found["reward_constant"] = (
                f"completion/reward has been {reward[-1]:g} in the last {WINDOW} lines: see "
                "whether answers are parsed as they are meant to be written, and whether some are "
                "ever right."
            )
        if len(degenerate) == WINDOW and min(degenerate) >= 1:
            found["groups_degenerate"] = (
                f"In the last {WINDOW} lines all answers of every group had equal rewards, and "
                "nothing was learned: raise the temperature or the group, or ask easier or harder "
                "questions."
            )
        if len(length) == WINDOW and max(length) < SHORT * self._longest:
            found["answers_short"] = (
                f"completion/length fell from {self._longest:.3g} to {length[-1]:.3g}: see whether "
                "short answers are paid for, or the loss is a mean over each answer's tokens."
            )
        # The entropy of control policies is of a density, and may be negative.
        answers = len(length) == WINDOW == len(entropy)
        if answers and max(entropy) < CERTAIN * (self._first_entropy or 0.0):
            found["entropy_low"] = (
                f"policy/entropy fell from {self._first_entropy:.3g} to {entropy[-1]:.3g}: nothing "
                "new is tried. Lower the learning rate, or raise the temperature, the entropy or "
                "the KL weight."
            )
        if len(self._unseeing) == 2 and all(self._unseeing):
            found["pictures_unused"] = (
                "eval/train/accuracy is no better than with another question's picture: the "
                "answers do not depend on the pictures."
            )
        return found
