"""What an explanation says in words."""

from collections.abc import Mapping
from typing import Any

from mmrl_jax.monitoring.health_checks import UNUSED_SHARE

SHARED = {"behavior": "actions", "prediction": "value estimates"}  # Targets with shares, in words.
PARTS = {"all": "inputs", "pixels": "patches", "words": "words"}  # Ranked units, in words.


def sentences(numbers: Mapping[str, Any]) -> list[str]:
    """Returns what the policy uses and whether the explanation can be trusted, in words."""
    return [*usage(numbers), *trust(numbers)]


def usage(numbers: Mapping[str, Any]) -> list[str]:
    """Returns what the policy uses, in words."""
    lines = []
    for target, what in SHARED.items():
        share = numbers["modalities"][target]["share"]
        lines.append(f"Shares of the modalities in the {what}: {_listed(share)}.")
        unused = [name for name, x in share.items() if x < UNUSED_SHARE]
        if unused:
            lines.append(f"The {what} do not depend on {' or '.join(unused)}.")
    if "frames" in numbers:
        share = numbers["frames"]["behavior"]["share"]
        lines.append(f"Shares of the frames in the actions, oldest first: {_listed(share)}.")
    if "instruction_swap" in numbers:
        change, low, high = numbers["instruction_swap"]
        lines.append(
            "On the same images with the instruction of another episode, the most likely action "
            f"changes by {change:.0%} [{low:.0%}, {high:.0%}] of the mean distance between two "
            "episodes."
        )
    return lines


def trust(numbers: Mapping[str, Any]) -> list[str]:
    """Returns whether the explanation can be trusted, in words; the last one is the verdict."""
    lines = []
    method, gains = numbers["method"], numbers["faithfulness"][numbers["method"]]
    faithful = [part for part in PARTS if gains[part][1] > 0]
    label = method.replace("_", " ")
    for part, what in PARTS.items():
        mean, low, high = gains[part]
        verdict = "better than" if part in faithful else "no better than"
        lines.append(
            f"The ranking of the {what} by {label} is {verdict} random ones: gain {mean:.3g} nats "
            f"[{low:.3g}, {high:.3g}]."
        )
    correlation = numbers["randomization_correlation"]
    depends = correlation < 0.5
    lines.append(
        f"With randomized weights the ranking {'changes' if depends else 'stays similar'} "
        f"(rank correlation {correlation:.2f})."
    )
    if not depends or "all" not in faithful:
        lines.append("Do not trust the heat maps and the colors of the words.")
    elif len(faithful) == len(PARTS):
        lines.append("The heat maps and the colors of the words can be trusted.")
    else:
        shown = {"pixels": "heat maps", "words": "colors of the words"}
        doubtful = [name for part, name in shown.items() if part not in faithful]
        lines.append(f"Do not trust the {' and the '.join(doubtful)}.")
    return lines


def _listed(share: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {x:.0%}" for name, x in share.items())
