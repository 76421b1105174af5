"""Problems by name: a policy, the sources of its experience, and its evaluation."""

from collections.abc import Collection, Mapping
import functools
import types
from typing import Any

import ml_collections

from mmrl_jax import envs
from mmrl_jax.config import schema
from mmrl_jax.config.loading import import_module
from mmrl_jax.config.options import Group, build
from mmrl_jax.learners import optimizers, registry
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.problems import (
    control,
    control_models,
    dataset,
    renamed,
    task,
    text_agent,
    token_options,
)
from mmrl_jax.problems.problem import MAY_CHANGE, Problem

__all__ = [
    "DECIDING",
    "KINDS",
    "Problem",
    "complete",
    "elsewhere",
    "make",
    "may_change",
    "options",
    "remarks",
    "with_env_options",
]

# Module with `options`, and class, of each kind of problem. Users may add a row for their own kind.
KINDS: dict[str, tuple[types.ModuleType, type]] = {
    "control": (control, control.Control),
    "text_agent": (text_agent, text_agent.TextAgent),
    "task": (task, task.TaskProblem),
    "dataset": (dataset, dataset.Dataset),
}


# Keys on which the other keys of a config depend.
DECIDING = ("problem", "stages", "imports", "model.kind", "env.name")


def _kind(config: Mapping[str, Any] | ml_collections.ConfigDict) -> tuple[types.ModuleType, type]:
    for module in config.get("imports") or ():
        import_module(module, "imports")
    name = config.get("problem")
    if name not in KINDS:
        is_old = any(key in config for key in ("algorithm", "devices"))
        hint = " This is a config of an earlier version: see the changelog." if is_old else ""
        raise ValueError(
            f"Config key 'problem' is {name!r}, but must be one of "
            f"{', '.join(map(repr, KINDS))}.{hint}"
        )
    return KINDS[name]


def options(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Group:
    """Returns the keys of a config, which depend on its problem, stages and kind of model.

    Raises:
      ValueError: If the problem, a stage or the kind of model is unknown.
    """
    return _kind(config)[0].options(config)


def complete(*differences: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Completes a config with the defaults of all keys that it does not set.

    The groups of algorithms that are not in `stages` are dropped, so that a config may contain
    settings for several algorithms.

    Args:
      *differences: Nested dictionaries of values that differ from the defaults, including 'problem'
        and 'stages'. A later dictionary overrides single keys of earlier ones.

    Raises:
      ValueError: If the problem, a stage or the kind of model is unknown.
    """
    given = schema.merge(*differences)
    keys = options(given)
    unused = {*registry.CONTROL, *registry.TOKEN} - set(keys)
    return schema.complete({name: x for name, x in given.items() if name not in unused}, keys)


def remarks(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns sentences for the help of keys whose valid values depend on other keys of a config.

    Returns:
      A sentence for 'env.options', if the problem has an environment: the options of the config's
      environment, with their defaults.
    """
    name = config.get("env", {}).get("name")
    if name is None:
        return {}
    defaults = envs.default_options(name, pixels=config.env.height > 0)
    texts = (k if x is envs.REQUIRED else f"{k}={x!r}" for k, x in defaults.items())
    return {"env.options": f"Those of {name!r} and their defaults: {', '.join(texts) or 'none'}."}


def with_env_options(
    config: ml_collections.ConfigDict, keys: Collection[str] | None = None
) -> ml_collections.ConfigDict:
    """Returns a config in which options of the environment that it does not set have defaults.

    Args:
      config: A complete config.
      keys: Keys of options that are added, as 'env.options.<name>'; None for all options.
    """
    env = config.get("env")
    if env is None:
        return config
    defaults = envs.default_options(env.name, pixels=env.height > 0)
    unset = ml_collections.config_dict.placeholder(object)
    added = {
        name: unset if x is None or x is envs.REQUIRED else x
        for name, x in defaults.items()
        if name not in env.options and (keys is None or f"env.options.{name}" in keys)
    }
    # A copy that `ml_collections` makes has no types of values that are None, and the command line
    # could not set them.
    config = complete(config)
    config.env.options = ml_collections.ConfigDict(env.options.to_dict() | added)
    return config


def elsewhere(config: Mapping[str, Any] | ml_collections.ConfigDict, key: str) -> str | None:
    """Returns which other configs have a key that this one does not have, for a message.

    Args:
      config: A whole config.
      key: The key, or the name of a group, with dots.

    Returns:
      The end of a sentence that begins with the key; None where no config has it. For a name of
      another library it has the key of this config.
    """

    def has(problem: str, kind: str) -> bool:
        names = _all_keys(problem, kind)
        return any(name == key or name.startswith(f"{key}.") for name in names)

    group, _, name = key.rpartition(".")
    known = schema.flatten_group(options(config))
    here = renamed.FOREIGN.get(name)
    for candidate in (f"{group}.{here}", here):
        if key not in known and candidate in known:
            unit = renamed.UNITS.get(name, "")
            return f"is {candidate!r} here{unit}: {known[candidate].help.rstrip('.')}"
    problem, kind = config["problem"], config["model"]["kind"]
    kinds = (*control_models.MODELS, *token_options.MODELS)
    if has(problem, kind):
        stage, stages = key.partition(".")[0], tuple(config["stages"])
        if stage not in stages and stage in {*registry.CONTROL, *registry.TOKEN}:
            return f"is a key of the stage {stage!r}; this config has stages={stages}"
        if problem == "task" and key not in known:  # The other tasks have no keys of their own.
            name = config["task"]["name"]
            return f"is a key of the task 'shapes' alone; this config has task.name={name!r}"
        return None
    models = [name for name in dict.fromkeys(kinds) if has(problem, name)]
    if models:
        return (
            f"is a key of {', '.join(map(repr, models))} models; this config has "
            f"model.kind={kind!r}"
        )
    others = [name for name in KINDS if any(has(name, other) for other in kinds)]
    if others:
        return (
            f"is a key of {', '.join(map(repr, others))} problems; this config has "
            f"problem={problem!r}"
        )
    return None


def _all_keys(problem: str, kind: str) -> set[str]:
    """The keys that configs of a kind of problem with a kind of model have, whatever the stages."""
    names: set[str] = set()
    for stage in {*registry.CONTROL, *registry.TOKEN}:
        config = {"problem": problem, "stages": (stage,), "model": {"kind": kind}}
        try:
            names |= schema.flatten_group(options(config)).keys()
        except ValueError:  # The problem has no such stage, or no such model.
            continue
    return names


def make(config: ml_collections.ConfigDict, *, open_data: bool = True) -> Problem:
    """Makes the problem of a config. No code outside of the problem reads the config afterwards.

    Args:
      config: A complete config, or one of an earlier version, whose missing keys get their
        defaults.
      open_data: Whether the records of a dataset are opened and checked now, and not when they are
        first used.

    Raises:
      ValueError: If the config is invalid, or the records cannot be used. The message lists all
        keys that are unknown, missing or out of range, or else the first inconsistency.
    """
    config = complete(config)
    config.lock()
    schema.check(
        config,
        options(config),
        renamed=renamed.KEYS,
        elsewhere=functools.partial(elsewhere, config),
    )
    for name in config.stages:
        group = build(OptimizerOptions, config[name].optimizer)
        optimizers.check(group, f"{name}.optimizer")
    problem = _kind(config)[1](config)
    if open_data:
        problem.open_data()
    return problem


def may_change(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the keys that a resumed run may change.

    They set its number of updates, its reports, and the devices on which it runs.
    """
    return ("run", "mesh", *(f"{stage}.{key}" for stage in config.stages for key in MAY_CHANGE))
