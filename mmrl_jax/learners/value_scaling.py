"""The scales of value targets and of advantages in PPO."""

import dataclasses
from typing import Any, Literal

import jax

from mmrl_jax.config.options import BELOW_ONE, option
from mmrl_jax.rl import losses
from mmrl_jax.stability import popart, return_range
from mmrl_jax.types import Metrics, Params

_POPART, _RANGE = "popart", "return_range"  # In the extras of a learner.
_HEAD = "value_head/value/"  # End of the path of the last layer of the value, see `ValueHead`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueScalingOptions:
    """The options of the scales of value targets and advantages."""

    popart: bool = option(
        False,
        "Whether the value is learned in units of the standard deviation of its targets (PopArt), "
        "in which value_clip and loss/value then are too.",
    )
    popart_decay: float = option(
        0.99,
        "Factor, per update, of the weight of earlier targets in the statistics of PopArt.",
        BELOW_ONE,
    )
    advantage_scaling: Literal["whiten", "percentile"] = option(
        "whiten",
        "Scale of the advantages: 'whiten' gives those of a batch mean 0 and standard deviation 1, "
        "and 'percentile' divides by the moving range of the returns from the 5th to the 95th "
        "percentile, at least 1, as DreamerV3 does. In the stage 'rnd' they are the returns of the "
        "environment's reward alone.",
    )


def extras(options: ValueScalingOptions) -> dict[str, Any]:
    """Returns what a learner needs in its extras for the scales."""
    added: dict[str, Any] = {_POPART: popart.init()} if options.popart else {}
    if options.advantage_scaling == "percentile":
        added[_RANGE] = return_range.init()
    return added


def scale_advantages(
    options: ValueScalingOptions,
    extras: dict[str, Any],
    advantage: jax.Array,
    target: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, dict[str, Any], Metrics]:
    """Returns scaled advantages, the extras of the learner with them, and metrics.

    Args:
      options: Options of the scales.
      extras: Extras of the learner.
      advantage: Advantages, float32 [...].
      target: Value targets, which are the returns, float32 [...].
      valid: 1 for steps that are learned from, float32 [...].
    """
    if options.advantage_scaling == "whiten":
        return losses.whiten(advantage, valid), extras, {}
    moving = return_range.update(extras[_RANGE], target, valid)
    scaled = return_range.scale(moving, advantage)
    return scaled, extras | {_RANGE: moving}, {"value/return_range": moving.value}


def observe_targets(
    options: ValueScalingOptions, extras: dict[str, Any], target: jax.Array, valid: jax.Array
) -> tuple[dict[str, Any], Metrics]:
    """Returns extras whose statistics of PopArt include the targets of an update, and metrics."""
    if not options.popart:
        return extras, {}
    statistics = popart.update(extras[_POPART], target, valid, options.popart_decay)
    metrics = {"value/target_mean": statistics.mean, "value/target_std": statistics.scale}
    return extras | {_POPART: statistics}, metrics


def normalize(
    options: ValueScalingOptions,
    extras: dict[str, Any],
    params: Params,
    values: tuple[jax.Array, ...],
) -> tuple[Params, tuple[jax.Array, ...]]:
    """Returns parameters with which the network outputs normalized values, and values alike.

    Only an update uses these parameters. The policy that acts and is stored outputs values in units
    of the reward, so that they stay where the statistics move.

    Args:
      options: Options of the scales; without PopArt nothing is changed.
      extras: Extras of the learner.
      params: Parameters of the network.
      values: Arrays of values in units of the reward.
    """
    if not options.popart:
        return params, values
    statistics = extras[_POPART]
    changed = _with_last_layer(params, statistics, popart.normalized_layer)
    return changed, tuple(popart.normalized(statistics, x) for x in values)


def unnormalize(options: ValueScalingOptions, extras: dict[str, Any], params: Params) -> Params:
    """Returns the parameters with which the network outputs values in units of the reward."""
    if not options.popart:
        return params
    return _with_last_layer(params, extras[_POPART], popart.value_layer)


def _with_last_layer(params: Params, statistics: popart.TargetStatistics, change: Any) -> Params:
    """Returns parameters in which kernel and bias of the last layer of the value are changed."""
    names, (new, structure) = _names(params), jax.tree.flatten(params)
    i, j = (names.index(path) for path in last_layer(params))
    new[i], new[j] = change(statistics, new[i], new[j])
    return jax.tree.unflatten(structure, new)


def last_layer(params: Params) -> tuple[str, str]:
    """Returns the paths of kernel and bias of the last layer of the value, 'params/...' each.

    Args:
      params: Parameters of the network, or their shapes.

    Raises:
      ValueError: If the network does not have exactly one such layer.
    """
    found = [x for x in _names(params) if x.endswith((f"{_HEAD}kernel", f"{_HEAD}bias"))]
    if [x.rpartition("/")[2] for x in sorted(found)] != ["bias", "kernel"]:
        raise ValueError(
            f"popart=True needs one layer '{_HEAD[:-1]}' with kernel and bias, but the network has "
            f"{found or 'none'}: set it to False."
        )
    bias, kernel = sorted(found)
    return kernel, bias


def _names(params: Params) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
