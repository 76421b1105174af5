"""Alarms: what goes wrong in silence while a policy that answers is trained.

Each one happened to others unnoticed for hundreds of updates. They are read off what was logged, so
that a resumed run has those that the whole run would have had.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Row = Mapping[str, float | None]
WINDOW = 20  # Lines of the log that an alarm wants to see.
SHORT = 1 / 3  # Of the longest mean length of answers before.
CERTAIN = 0.02  # Of the entropy in the first line.


def raised(rows: Sequence[Row]) -> dict[str, str]:
    """The alarms after the last of the logged lines, name -> what is wrong and where to look.

    'reward_constant', 'groups_degenerate', 'answers_short' and 'entropy_low' want WINDOW lines;
    'pictures_unused' wants two evaluations. A line without what an alarm is about is passed over.
    """
    found: dict[str, str] = {}

    def all_of(name: str) -> np.ndarray:
        # A file of metrics has None for what was not finite.
        values = (row.get(name) for row in rows)
        return np.array([x for x in values if x is not None and np.isfinite(x)])

    def last(name: str) -> np.ndarray | None:
        values = all_of(name)[-WINDOW:]
        return values if len(values) == WINDOW else None

    reward = last("answer/reward")
    if reward is not None and np.ptp(reward) == 0:
        found["reward_constant"] = (
            f"answer/reward has been {reward[-1]:g} in the last {WINDOW} lines: see whether "
            "answers are parsed as they are meant to be written, and whether some are ever right."
        )
    degenerate = last("answer/degenerate_groups")
    if degenerate is not None and degenerate.min() >= 1:
        found["groups_degenerate"] = (
            f"In the last {WINDOW} lines all answers of every group had equal rewards, and nothing "
            "was learned: raise the temperature or the group, or ask easier or harder questions."
        )
    length = last("answer/length")
    if length is not None:
        longest = all_of("answer/length").max()
        if length.max() < SHORT * longest:
            found["answers_short"] = (
                f"answer/length fell from {longest:.3g} to {length[-1]:.3g}: see whether short "
                "answers are paid for, or the loss is a mean over each answer's tokens."
            )
        entropy = last("policy/entropy")
        if entropy is not None and entropy.max() < CERTAIN * all_of("policy/entropy")[0]:
            found["entropy_low"] = (
                f"policy/entropy fell to {entropy[-1]:.3g}: nothing new is tried. "
                "Lower the learning rate, or raise the temperature, the entropy or the KL weight."
            )
    evaluations = [row for row in rows if "eval/train/blind_accuracy" in row][-2:]
    if len(evaluations) == 2 and all(
        (row["eval/train/blind_accuracy"] or 0) >= (row["eval/train/accuracy_lo"] or 0)
        for row in evaluations
    ):
        found["pictures_unused"] = (
            "eval/train/accuracy is no better than with another question's picture: the answers do "
            "not depend on the pictures."
        )
    return found
