"""The checks of an audit with their thresholds, and the report of all of them."""

from collections.abc import Callable, Mapping
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.auditing import demonstrations, image_text
from mmrl_jax.auditing.samples import Finding, Samples
from mmrl_jax.data import files, weights
from mmrl_jax.data.weights import SampleWeight

UNREADABLE = "unreadable"
AUDIT, WEIGHTS = "audit.json", "weights"


class Check(NamedTuple):
    """A check.

    Attributes:
      score: Function from samples to their scores.
      meaning: What a flagged sample is, for people.
      threshold: Least score of a flagged sample.
      limit: Fraction of the samples, in [0, 1], that may be flagged in clean data.
      weight: Weight of a flagged sample, at least 0; 1 if the check only informs.
    """

    score: Callable[[Any], Finding]
    meaning: str
    threshold: float
    limit: float = 0.01
    weight: float = 0.0


IMAGE_TEXT: dict[str, Check] = {
    "constant_image": Check(image_text.constant_image, "The image is of one color", 0.5),
    "noise_image": Check(image_text.noise_image, "The image is noise", 0.6),
    "near_duplicate": Check(
        image_text.near_duplicate, "Another record has the same prompt and nearly this image", 0.95
    ),
    "split_leak": Check(
        image_text.split_leak, "Another split has nearly this image", 0.95, limit=0.0
    ),
    "label_noise": Check(
        image_text.label_noise, "The image suggests another answer", 0.3, limit=0.02
    ),
    "text_only": Check(image_text.text_only, "The prompt alone gives the answer", 0.7),
    "answer_imbalance": Check(
        image_text.answer_imbalance, "Most records have this answer", 0.8, limit=0.0, weight=1.0
    ),
}

DEMONSTRATIONS: dict[str, Check] = {
    "broken_images": Check(demonstrations.broken_images, "Images are noise or of one color", 0.05),
    "frozen_images": Check(
        demonstrations.frozen_images, "The image stays the same while the robot moves", 0.8
    ),
    "random_actions": Check(
        demonstrations.random_actions, "The actions follow from nothing that is seen", 0.7
    ),
    "near_duplicate": Check(
        demonstrations.near_duplicate, "Another episode has nearly these steps", 0.8
    ),
    "split_leak": Check(
        demonstrations.split_leak, "An episode of another split has nearly these steps", 0.8, 0.0
    ),
    "mismatched_instruction": Check(
        demonstrations.mismatched_instruction, "Another instruction fits the episode better", 0.7
    ),
    "instruction_imbalance": Check(
        demonstrations.instruction_imbalance,
        "Most episodes have this instruction",
        0.8,
        limit=0.0,
        weight=1.0,
    ),
    "action_imbalance": Check(
        demonstrations.action_imbalance,
        "Nearly all actions are the most frequent one of the data",
        0.95,
        limit=0.0,
        weight=1.0,
    ),
}


class Result(NamedTuple):
    """The result of one check.

    Attributes:
      check: The check, with the threshold and the limit that were used.
      finding: Scores.
      flagged: Whether the score of each sample is at least the threshold, bool [N].
    """

    check: Check
    finding: Finding
    flagged: np.ndarray

    @property
    def scored(self) -> int:
        """Number of samples that have a score."""
        return int(np.isfinite(self.finding.scores).sum())

    @property
    def fraction(self) -> float:
        """Flagged samples as a fraction of those with a score."""
        return int(self.flagged.sum()) / max(self.scored, 1)

    @property
    def failed(self) -> bool:
        """Whether more samples are flagged than the limit allows."""
        return self.fraction > self.check.limit


class Report(NamedTuple):
    """The result of an audit.

    Attributes:
      samples: Samples.
      results: Result of each check by its name.
      max_unreadable: Fraction of samples that may be unreadable.
    """

    samples: Samples
    results: dict[str, Result]
    max_unreadable: float

    @property
    def unreadable(self) -> float:
        """Unreadable samples as a fraction of all."""
        count = len(self.samples.unreadable)
        return count / max(count + len(self.samples), 1)

    @property
    def failed(self) -> list[str]:
        """Names of the checks whose limit is exceeded."""
        names = [UNREADABLE] if self.unreadable > self.max_unreadable else []
        return names + [name for name, result in self.results.items() if result.failed]

    def weights(self) -> np.ndarray:
        """Returns the weight of each sample, the least of its flags, float64 [N]."""
        lowest = np.ones(len(self.samples))
        for result in self.results.values():
            lowest = np.where(result.flagged, np.minimum(lowest, result.check.weight), lowest)
        return lowest

    def flags(self, i: int) -> tuple[str, ...]:
        """Returns the names of the checks that flagged a sample."""
        return tuple(name for name, result in self.results.items() if result.flagged[i])


def refuse_unknown(
    checks: Mapping[str, Check], *, thresholds: Mapping[str, float], limits: Mapping[str, float]
) -> None:
    """Raises ValueError if thresholds or limits name a check that has none."""
    for kind, given, known in (
        ("threshold", thresholds, {*checks}),
        ("limit", limits, {UNREADABLE, *checks}),
    ):
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{name!r} is no check of these data with a {kind}; there are {sorted(known)}."
                )


def run(
    samples: Samples,
    checks: Mapping[str, Check],
    *,
    thresholds: Mapping[str, float],
    limits: Mapping[str, float],
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Runs all checks.

    Args:
      samples: Samples.
      checks: Checks by their names, IMAGE_TEXT or DEMONSTRATIONS.
      thresholds: Thresholds by the names of checks, where they differ from those of the rows.
      limits: Limits by the names of checks, or 'unreadable', where they differ.
      progress: Function that is called with the name of a check before it starts.
    """
    results = {}
    for name, check in checks.items():
        progress(name)
        check = check._replace(
            threshold=thresholds.get(name, check.threshold), limit=limits.get(name, check.limit)
        )
        finding = check.score(samples)
        # NaN, for a sample without a score, is not flagged.
        results[name] = Result(check, finding, finding.scores >= check.threshold)
    return Report(samples, results, limits.get(UNREADABLE, 0.01))


def table(report: Report) -> str:
    """Returns the counts of all checks as text."""
    count = len(report.samples.unreadable)
    rows = [("check", "flagged", "of", "threshold", "limit", "")]
    everything = str(count + len(report.samples))
    exceeded = {name: "exceeded" for name in report.failed}
    rows.append(
        (UNREADABLE, str(count), everything, "", f"{report.max_unreadable:.1%}",
         exceeded.get(UNREADABLE, ""))
    )  # fmt: skip
    for name, result in report.results.items():
        note = exceeded.get(name, "" if result.scored else "no scores")
        check = result.check
        rows.append(
            (name, str(int(result.flagged.sum())), str(result.scored), f"{check.threshold:g}",
             f"{check.limit:.1%}", note)
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            x.ljust(width) if i in (0, 5) else x.rjust(width)
            for i, (x, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def to_json(report: Report) -> dict[str, Any]:
    """Returns counts, thresholds, scores and flags in values that JSON supports."""
    samples = report.samples
    return {
        "samples": len(samples),
        "failed": report.failed,
        "splits": list(samples.splits),
        "split": samples.split.tolist(),
        "ids": list(samples.ids),
        "unreadable": {
            "limit": report.max_unreadable,
            "samples": [
                {"split": samples.splits[x.split], "id": x.id, "reason": x.reason}
                for x in samples.unreadable
            ],
        },
        "checks": {
            name: {
                "meaning": result.check.meaning,
                "threshold": result.check.threshold,
                "limit": result.check.limit,
                "scored": result.scored,
                "flagged": np.flatnonzero(result.flagged).tolist(),
                "scores": [
                    round(float(x), 4) if np.isfinite(x) else None for x in result.finding.scores
                ],
            }
            for name, result in report.results.items()
        },
    }


def write(report: Report, directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes audit.json and the weights of each split; returns the paths of the latter.

    An unreadable sample has the weight 0. If it is a record, it has no digest.
    """
    samples, values = report.samples, report.weights()
    text = json.dumps(to_json(report), ensure_ascii=False, indent=1, allow_nan=False)
    files.write_text(directory / AUDIT, text + "\n")
    paths = []
    for k, split in enumerate(samples.splits):
        rows = [
            SampleWeight(samples.ids[i], samples.digests[i], float(values[i]), report.flags(int(i)))
            for i in np.flatnonzero(samples.split == k)
        ]
        lost = [x for x in samples.unreadable if x.split == k]
        rows += [SampleWeight(x.id, x.digest, 0.0, (UNREADABLE,)) for x in lost]
        name = f"{WEIGHTS}.jsonl" if len(samples.splits) == 1 else f"{WEIGHTS}-{split}.jsonl"
        paths.append(directory / name)
        weights.write(paths[-1], rows)
    return paths
