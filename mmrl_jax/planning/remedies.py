"""The nearest change of a config that makes a run fit its devices."""

from collections.abc import Iterator
from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.config import schema
from mmrl_jax.planning.chips import Topology
from mmrl_jax.planning.plan import Plan, Planner

Change = dict[str, Any]  # Values by the full names of keys.
# Keys that set how much is in memory at once, and numbers of samples, which are halved.
_PARTS = ("grad_accum_steps", "num_minibatches")
_HALVED = (
    *("num_completions", "prompts_per_update", "num_envs", "batch_size"),
    "demonstrations.batch_size",
)


def remedy(
    planner: Planner, config: ml_collections.ConfigDict, topology: Topology, plan: Plan
) -> tuple[Change, Plan] | None:
    """Returns the nearest change with which a run fits, and the plan with it.

    Changes that leave what is learned as it is come first: a mesh that splits the parameters,
    recomputation, accumulation of gradients. They are followed by those of precision, and by
    smaller batches. If no single change is enough, those that help are combined in this order.

    Args:
      planner: Planner that made the plan.
      config: Complete config of the run.
      topology: Devices.
      plan: Plan of the config, which does not fit.

    Returns:
      None if no combination fits.
    """
    helpful: list[tuple[Change, float]] = []
    for change in candidates(config, topology, plan):
        changed = _plan(planner, config, topology, change)
        if changed is None:
            continue
        if changed.fits:
            return change, changed
        if changed.needed < 0.98 * plan.needed:
            helpful.append((change, changed.needed))
    combined: Change = {}
    best = plan
    for change, _ in helpful:
        wider = {**combined, **change}
        changed = _plan(planner, config, topology, wider)
        if changed is None or changed.needed >= 0.98 * best.needed:
            continue
        combined, best = wider, changed
        if best.fits:
            return _shortest(planner, config, topology, combined, best)
    return None


def _shortest(
    planner: Planner,
    config: ml_collections.ConfigDict,
    topology: Topology,
    change: Change,
    plan: Plan,
) -> tuple[Change, Plan]:
    """Returns a change without the keys that it does not need."""
    for key in list(change):
        shorter = {name: x for name, x in change.items() if name != key}
        changed = _plan(planner, config, topology, shorter)
        if changed is not None and changed.fits:
            change, plan = shorter, changed
    return change, plan


def _plan(
    planner: Planner, config: ml_collections.ConfigDict, topology: Topology, change: Change
) -> Plan | None:
    """Returns the plan of a changed config; None if the change is not valid."""
    try:
        return planner.plan(changed_config(config, change), topology)
    except ValueError:
        return None


def changed_config(config: ml_collections.ConfigDict, change: Change) -> ml_collections.ConfigDict:
    """Returns a config with other values of some keys."""
    nested: dict[str, Any] = {}
    for key, value in change.items():
        *groups, field = key.split(".")
        table = nested
        for group in groups:
            table = table.setdefault(group, {})
        table[field] = value
    return problems.complete(config.to_dict(), nested)


def candidates(
    config: ml_collections.ConfigDict, topology: Topology, plan: Plan
) -> Iterator[Change]:
    """Yields single changes, the nearest ones first.

    Args:
      config: Complete config of the run.
      topology: Devices.
      plan: Plan of the config, which does not fit.
    """
    keys = schema.flatten(config)
    stages = [stage.name for stage in plan.stages if stage.needed > plan.limit]
    yield from _meshes(config, topology, "fsdp")
    if keys.get("model.remat") is False:
        yield {"model.remat": True}
    if keys.get("model.remat_policy") == "dots":
        yield {"model.remat_policy": "nothing"}
    for stage in stages:
        for key in _PARTS:
            value = keys.get(f"{stage}.{key}")
            if value is not None:
                yield from ({f"{stage}.{key}": value * 2**i} for i in range(1, 5))
                break
    if any(stage.parameters["frozen"] for stage in plan.stages):
        for dtype in ("bfloat16", "int8"):
            if keys.get("model.frozen_dtype", dtype) != dtype:
                yield {"model.frozen_dtype": dtype}
    if keys.get("model.dtype") == "float32":
        yield {"model.dtype": "bfloat16"}
    yield from _meshes(config, topology, "tensor")
    for stage in stages:
        for key in _HALVED:
            value = keys.get(f"{stage}.{key}")
            while value is not None and value % 2 == 0 and value > 2:
                value //= 2
                yield {f"{stage}.{key}": value}
    if "run.eval_episodes" in keys:
        yield {"run.eval_episodes": max(keys["run.eval_episodes"] // 4, 1)}


def _meshes(config: ml_collections.ConfigDict, topology: Topology, axis: str) -> Iterator[Change]:
    """Yields meshes with a longer axis, on the same number of devices."""
    m = config.mesh
    size = getattr(m, axis) * 2
    while size <= topology.devices:
        # The axis 'data' takes what the others leave.
        change: Change = {f"mesh.{axis}": size}
        if m.data:
            change["mesh.data"] = 0
        yield change
        size *= 2
