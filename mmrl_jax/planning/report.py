"""Plans as text and as JSON."""

from collections.abc import Mapping
from typing import Any

from mmrl_jax.planning.chips import Topology
from mmrl_jax.planning.plan import Plan, StagePlan
from mmrl_jax.planning.usage import Usage

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(x: float, unit: str) -> str:
    """Returns a number with a unit and its prefix, for example '1.5 GB'."""
    for step, prefix in _STEPS:
        if abs(x) >= step:
            return f"{x / step:.3g} {prefix}{unit}"
    return f"{x:.3g} {unit}"


def count(x: float) -> str:
    """Returns a number with a prefix, for example '1.5M'."""
    return amount(x, "").replace(" ", "")


def duration(seconds: float) -> str:
    """Returns a time with a unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _listed(sizes: Mapping[str, float], unit: str) -> str:
    return ", ".join(f"{name} {amount(x, unit)}" for name, x in sizes.items()) or "nothing"


def utilization(usage: Usage, topology: Topology) -> float:
    """Returns the model FLOPs utilization that the assumed times give, in [0, 1]."""
    return usage.model_flops / (usage.seconds * topology.chip.flops) if usage.seconds else 0.0


def assumptions(plan: Plan) -> str:
    """Returns the assumptions of the times, in a sentence."""
    chip = plan.topology.chip
    peaks = f"{amount(chip.flops, 'FLOP/s')} ({amount(chip.flops32, 'FLOP/s')} for float32 factors)"
    return (
        f"Times assume {peaks}, {amount(chip.bandwidth, 'B/s')} of memory, "
        f"{amount(chip.link, 'B/s')} to other devices in rings, {duration(chip.launch_s)} a "
        "kernel, and nothing at the same time; completions of the largest length; and one step of "
        "a loop of unknown length."
    )


def summary(plan: Plan) -> str:
    """Returns the verdict of a plan in a line."""
    verdict = "fits" if plan.fits else "does not fit"
    return (
        f"{amount(plan.needed, 'B')} a device are needed, of {amount(plan.limit, 'B')} that a "
        f"program can have of {amount(plan.topology.chip.memory, 'B')}: the run {verdict} "
        f"{plan.topology.name}."
    )


def remedy(found: tuple[Mapping[str, Any], Plan] | None) -> str:
    """Returns the nearest change that makes a run fit, in a sentence."""
    if found is None:
        return "No change of mesh, recomputation, precision or batch sizes makes it fit."
    change, plan = found
    changes = " ".join(f"--config.{key}={value}" for key, value in change.items())
    return f"The nearest change that makes it fit: {changes} ({amount(plan.needed, 'B')} a device)."


def text(plan: Plan) -> str:
    """Returns a plan as text."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [f"{plan.topology.name}: {plan.topology.devices} devices, mesh {mesh}"]
    for stage in plan.stages:
        lines += ["", *_stage(stage, plan)]
    return "\n".join([*lines, "", summary(plan), assumptions(plan)])


def _stage(stage: StagePlan, plan: Plan) -> list[str]:
    update = stage.update
    held = sum(stage.held.values())
    lines = [
        f"Stage {stage.name}",
        f"  parameters  {count(stage.parameters['trained'])} trained, "
        f"{count(stage.parameters['frozen'])} frozen",
        f"  held        {amount(held, 'B')} a device: {_listed(stage.held, 'B')}",
        f"  at times    {_listed(stage.moments, 'B')}",
        f"  peak        {amount(stage.needed, 'B')} in the {stage.peak_part}: "
        f"{_listed(breakdown(stage), 'B')}",
    ]
    for name, usage in stage.parts.items():
        lines.append(
            f"  {name:11} {amount(usage.flops, 'FLOP')}, {duration(usage.seconds)} a device"
            + (" for a whole evaluation" if name == "evaluation" else " an update")
        )
    lines.append(
        f"  update      {amount(update.flops, 'FLOP')} a device, {duration(update.seconds)}, MFU "
        f"{100 * utilization(update, plan.topology):.2g} %; sent to other devices: "
        f"{_listed(update.exchanged, 'B')}"
    )
    if update.arrays:
        size, what = update.arrays[0]
        lines.append(f"  largest     {amount(size, 'B')}: {what}")
    return lines


def breakdown(stage: StagePlan) -> dict[str, float]:
    """Returns the bytes of the parts of the peak, which add up to it."""
    parts = {"held": sum(stage.held.values())}
    known = {
        "learning": ("gradients",),
        "rollout": ("KV cache", "logits", "images"),
    }.get(stage.peak_part, ())
    left = stage.needed - parts["held"]
    for name in known:
        size = min(stage.moments.get(name, 0.0), left)
        if size:
            parts[name] = size
            left -= size
    return parts | {"activations and other arrays": left}


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as a dictionary for JSON; sizes are bytes of a device, times are seconds."""
    return {
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "mesh": plan.mesh,
        "memory": plan.topology.chip.memory,
        "limit": plan.limit,
        "needed": plan.needed,
        "fits": plan.fits,
        "stages": {stage.name: _stage_dict(stage, plan) for stage in plan.stages},
    }


def _stage_dict(stage: StagePlan, plan: Plan) -> dict[str, Any]:
    return {
        "parameters": stage.parameters,
        "held": stage.held,
        "at_times": stage.moments,
        "peak": {"bytes": stage.needed, "part": stage.peak_part, "parts": breakdown(stage)},
        "update": _usage_dict(stage.update, plan),
        **{name: _usage_dict(usage, plan) for name, usage in stage.parts.items()},
        "largest_arrays": [{"bytes": size, "what": what} for size, what in stage.update.arrays],
        "loops_of_unknown_length": sorted(stage.update.unknown),
    }


def _usage_dict(usage: Usage, plan: Plan) -> dict[str, Any]:
    return {
        "flops": usage.flops,
        "model_flops": usage.model_flops,
        "moved": usage.moved,
        "kernels": usage.kernels,
        "seconds": usage.seconds,
        "mfu": utilization(usage, plan.topology),
        "exchanged": dict(usage.exchanged),
    }
