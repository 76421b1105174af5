"""Health checks of the training of a policy, which raise alarms on silent failures.

Each of these failures is known to stay unnoticed for hundreds of updates. The checks use logged
metrics only, so that a resumed run raises the same alarms as an uninterrupted one.
"""

from collections import deque
from collections.abc import Mapping
import math

Row = Mapping[str, float | None]
WINDOW = 20  # Number of rows with a metric before a check of it can raise an alarm.
SHORT = 1 / 3  # Fraction of the longest mean completion length so far that counts as a collapse.
LOW_ENTROPY = 0.02  # Fraction of the first logged entropy that counts as a collapse.
UNUSED_SHARE = 0.01  # Share of a modality below which the policy does not use it.
BEHAVIOR_SHARE = "modality_share/behavior/"
CHECKED = (
    "completion/reward",
    "reward/zero_std_groups",
    "completion/length",
    "policy/entropy",
    "optimizer/steps",
    "optimizer/skipped_spikes",
)


class HealthChecks:
    """Checks the rows of a metrics log one after the other.

    The alarms 'reward_constant', 'zero_std_groups', 'completions_short', 'entropy_low' and
    'steps_skipped' need WINDOW rows with their metric, 'images_unused' needs two evaluations, and
    'modality_unused' needs two measurements. A row without the metric of a check does not count
    for it.

    Attributes:
      raised: Alarms that are raised after the last row: a message by the name of the alarm.
    """

    def __init__(self) -> None:
        self.raised: dict[str, str] = {}
        self._last: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in CHECKED}
        self._longest = 0.0
        self._first_entropy: float | None = None
        # Whether shuffled images were as good as the right ones in the last two evaluations.
        self._images_unused: deque[bool] = deque(maxlen=2)
        # The modalities without a share in each of the last two measurements.
        self._unused: deque[set[str]] = deque(maxlen=2)

    def update(self, row: Row) -> dict[str, str]:
        """Checks the next row of metrics.

        Args:
          row: Metrics by their names. None stands for a value that is not finite.

        Returns:
          The alarms that this row raises and that were not raised after the row before.
        """
        for name, values in self._last.items():
            value = row.get(name)
            # A metrics file has null, which becomes None, for values that are not finite.
            if value is not None and math.isfinite(value):
                values.append(value)
        shuffled = row.get("eval/train/shuffled_image/accuracy")
        accuracy_lo = row.get("eval/train/accuracy_lo")
        if shuffled is not None and accuracy_lo is not None:
            self._images_unused.append(shuffled >= accuracy_lo)
        shares = {
            name.removeprefix(BEHAVIOR_SHARE): share
            for name, share in row.items()
            if name.startswith(BEHAVIOR_SHARE) and share is not None
        }
        if shares:
            self._unused.append({name for name, x in shares.items() if x < UNUSED_SHARE})
        before, self.raised = self.raised, self._alarms()
        return {name: text for name, text in self.raised.items() if name not in before}

    def _alarms(self) -> dict[str, str]:
        reward, zero_std, length, entropy, steps, spikes = (self._last[name] for name in CHECKED)
        self._longest = max(self._longest, *length, 0.0)
        if self._first_entropy is None and entropy:
            self._first_entropy = entropy[0]
        alarms: dict[str, str] = {}
        if len(reward) == WINDOW and max(reward) == min(reward):
            alarms["reward_constant"] = (
                f"completion/reward has been {reward[-1]:g} in the last {WINDOW} rows: check "
                "whether completions are parsed as intended, and whether any is ever correct."
            )
        if len(zero_std) == WINDOW and min(zero_std) >= 1:
            alarms["zero_std_groups"] = (
                f"In the last {WINDOW} rows all completions of every group had equal rewards, so "
                "that nothing was learned: raise the temperature or the number of completions in a "
                "group, or use easier or harder prompts."
            )
        if len(length) == WINDOW and max(length) < SHORT * self._longest:
            alarms["completions_short"] = (
                f"completion/length fell from {self._longest:.3g} to {length[-1]:.3g}: check "
                "whether the rewards favor short completions, or the loss is a mean over the "
                "tokens of each completion."
            )
        # Control policies are left out: their entropy is that of a density and may be negative.
        has_tokens = len(length) == WINDOW == len(entropy)
        if has_tokens and max(entropy) < LOW_ENTROPY * (self._first_entropy or 0.0):
            alarms["entropy_low"] = (
                f"policy/entropy fell from {self._first_entropy:.3g} to {entropy[-1]:.3g}: the "
                "policy no longer explores. Lower the learning rate, or raise the temperature, the "
                "entropy coefficient or the KL coefficient, or set an entropy_target."
            )
        if len(spikes) == WINDOW and sum(spikes) >= sum(steps):
            alarms["steps_skipped"] = (
                f"At least half of the optimizer steps in the last {WINDOW} rows were skipped as "
                "spikes: raise optimizer.skip_spikes, or lower the learning rate."
            )
        if len(self._images_unused) == 2 and all(self._images_unused):
            alarms["images_unused"] = (
                "eval/train/accuracy is no better than with the image of another prompt: the "
                "completions do not depend on the images."
            )
        unused = set.intersection(*self._unused) if len(self._unused) == 2 else set()
        if unused:
            names = " and ".join(sorted(unused))
            alarms["modality_unused"] = (
                f"The share of {names} in the behavior is below {UNUSED_SHARE:.0%}: the actions do "
                "not depend on it. Check whether the task needs it, and whether it reaches the "
                "policy."
            )
        return alarms
