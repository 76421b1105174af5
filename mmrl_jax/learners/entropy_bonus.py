"""The entropy bonus of the policy gradient algorithms, with a fixed or an adaptive coefficient."""

import dataclasses
from typing import Any

import jax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, option
from mmrl_jax.exploration import entropy as adaptive
from mmrl_jax.types import Metrics

_NAME = "entropy_bonus"  # In the extras of a learner.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyOptions:
    """The options of the entropy bonus."""

    entropy_coef: float = option(
        0.0,
        "Coefficient of the entropy bonus; with an entropy_target the value from which the "
        "coefficient starts.",
        NON_NEGATIVE,
    )
    entropy_target: float | None = option(
        None,
        "Entropy in nats below which the bonus is applied, with a coefficient that rises while the "
        "entropy is below it and falls while it is above it; None for a fixed coefficient.",
    )
    entropy_coef_step: float = option(
        0.005, "Change of the coefficient in each update with an entropy_target.", POSITIVE
    )
    entropy_coef_max: float = option(
        1.0, "Largest coefficient with an entropy_target.", NON_NEGATIVE
    )


def extras(options: EntropyOptions) -> dict[str, Any]:
    """Returns what a learner needs in its extras for the entropy bonus."""
    if options.entropy_target is None:
        return {}
    return {_NAME: adaptive.init(options.entropy_coef)}


def coefficient(options: EntropyOptions, extras: dict[str, Any]) -> float | jax.Array:
    """Returns the coefficient of the entropy bonus in an update."""
    return options.entropy_coef if options.entropy_target is None else extras[_NAME].applied


def adapted(
    options: EntropyOptions, extras: dict[str, Any], entropy: jax.Array
) -> tuple[dict[str, Any], Metrics]:
    """Returns the extras after an update, and the coefficient of the next one as a metric.

    Args:
      options: Options of the algorithm.
      extras: Extras of the learner before the update.
      entropy: Mean entropy in the update, float32 []; NaN if nothing was learned from.
    """
    if options.entropy_target is None:
        return extras, {}
    bonus = adaptive.adapt(
        extras[_NAME],
        entropy,
        target=options.entropy_target,
        step=options.entropy_coef_step,
        maximum=options.entropy_coef_max,
    )
    return extras | {_NAME: bonus}, {"exploration/entropy_coef": bonus.applied}
