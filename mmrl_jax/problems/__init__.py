"""Problems by name: a policy, where its experience comes from, and how it is evaluated."""

from collections.abc import Mapping
import types
from typing import Any

import ml_collections

from mmrl_jax.config import schema
from mmrl_jax.config.loading import import_module
from mmrl_jax.config.options import Group, build
from mmrl_jax.learners import optimizers, registry
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.problems import control, dataset, renamed, task, text_agent
from mmrl_jax.problems.problem import MAY_CHANGE, Problem

__all__ = ["KINDS", "Problem", "complete", "make", "may_change", "options"]

# The module of each kind has `options` and a class; a kind of your own is one more row.
KINDS: dict[str, tuple[types.ModuleType, type]] = {
    "control": (control, control.Control),
    "text_agent": (text_agent, text_agent.TextAgent),
    "task": (task, task.TaskProblem),
    "dataset": (dataset, dataset.Dataset),
}


def _kind(config: Mapping[str, Any] | ml_collections.ConfigDict) -> tuple[types.ModuleType, type]:
    for module in config.get("imports") or ():
        import_module(module, "imports")
    name = config.get("problem")
    if name not in KINDS:
        old = [key for key in ("algorithm", "devices") if key in config]
        hint = " This is a config of an earlier version: see the changelog." if old else ""
        raise ValueError(
            f"Config key 'problem' is {name!r}, but must be one of "
            f"{', '.join(map(repr, KINDS))}.{hint}"
        )
    return KINDS[name]


def options(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Group:
    """Returns the keys that a config has, by its kind of problem, its stages and its model.

    Raises:
      ValueError: One of these is unknown.
    """
    return _kind(config)[0].options(config)


def complete(*differences: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns a whole config, made of what differs from the defaults.

    The groups of algorithms that are not among the stages are left out, so that a config may hold
    settings for several algorithms, of which 'stages' chooses.

    Args:
      *differences: Nested dictionaries with at least 'problem' and 'stages'; a later one replaces
        single keys of those before.

    Raises:
      ValueError: The problem, a stage or the kind of model is unknown.
    """
    given = schema.merge(*differences)
    keys = options(given)
    unused = {*registry.CONTROL, *registry.TOKEN} - set(keys)
    return schema.complete({name: x for name, x in given.items() if name not in unused}, keys)


def make(config: ml_collections.ConfigDict) -> Problem:
    """Makes the problem of a config; after it, no other code reads the config.

    Args:
      config: A whole config, or one of an earlier version: keys that it lacks get their defaults.

    Raises:
      ValueError: The config cannot run. All keys that are unknown, missing or impossible are named
        at once; what does not fit together is named by its first fault.
    """
    config = complete(config)
    config.lock()
    schema.check(config, options(config), renamed=renamed.KEYS)
    for name in config.stages:
        group = build(OptimizerOptions, config[name].optimizer)
        optimizers.check(group, f"{name}.optimizer")
    return _kind(config)[1](config)


def may_change(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the keys that a resumed run may change.

    They say how long it continues, what it reports, and on how many devices it runs.
    """
    return ("run", "mesh", *(f"{stage}.{key}" for stage in config.stages for key in MAY_CHANGE))
