"""Plans next to what the compiler reports."""

import os
from typing import Any

import jax
import ml_collections
import numpy as np

from mmrl_jax import problems
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.planning.chips import Topology
from mmrl_jax.planning.plan import Plan
from mmrl_jax.training.dispatch import make_dispatch

# Shapes of slices for libtpu, by the number of chips. It describes no slice of fewer than a host's.
_FLAT = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "v4": _CUBES}


def described(topology: Topology) -> list[Any]:
    """Returns descriptions of the devices of a topology, for which programs can be compiled.

    Raises:
      ValueError: If no compiler for these devices is installed.
    """
    if topology.chip.kind == "cpu":
        return jax.devices()[: topology.devices]
    chip = topology.name.split("-")[0]
    shapes = _SHAPES.get(chip)
    if shapes is None or topology.devices > max(shapes):
        raise ValueError(
            f"--check: there is no compiler for {topology.name} here; {', '.join(_SHAPES)} and cpu "
            f"can be checked, up to {max(_FLAT)} devices."
        )
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--check of {topology.name} needs the TPU's compiler: "
            f"pip install 'jax[tpu]=={jax.__version__}'."
        ) from error
    # While one process compiles, others may use the library too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    size = min(size for size in shapes if size >= topology.devices)
    found = topologies.get_topology_desc(f"{chip}:{shapes[size]}", platform="tpu")
    return list(np.array(found.devices).reshape(-1)[: topology.devices])


def rows(
    config: ml_collections.ConfigDict, topology: Topology, plan: Plan
) -> dict[str, dict[str, float]]:
    """Compiles the updates of a run, and returns the bytes of a device, planned and compiled.

    Args:
      config: Complete config of the run.
      topology: Devices.
      plan: Plan of the config.

    Returns:
      By the name of each stage: 'planned_arguments', 'compiled_arguments', 'planned_temporaries',
      'compiled_temporaries', 'ratio', that of the planned to the compiled sum of both.

    Raises:
      ValueError: If the devices cannot be compiled for.
    """
    devices = described(topology)
    found: dict[str, dict[str, float]] = {}
    with mesh_lib.described_devices(devices):
        problem = problems.make(config)
        variables = None
        for stage_plan in plan.stages:
            stage = problem.stage(stage_plan.name, start=variables)
            carry = jax.eval_shape(stage.init)
            shardings = stage.shardings(carry)
            placed = mesh_lib.placed_shapes(carry, shardings)
            assert stage.update is not None
            dispatch = make_dispatch(stage.update, 1, shardings)
            memory = dispatch.lower(placed, stage.constants).compile().memory_analysis()
            held = sum(stage_plan.held.values())
            arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            found[stage_plan.name] = {
                "planned_arguments": held,
                "compiled_arguments": float(arguments),
                "planned_temporaries": stage_plan.peak - held,
                "compiled_temporaries": float(temporaries),
                "ratio": stage_plan.peak / (arguments + temporaries),
            }
            variables = problem.variables(stage, carry.learner)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Returns the rows as text, in megabytes of a device."""
    header = f"{'':12}{'arguments, MB':>24}{'temporaries, MB':>24}{'planned /':>12}"
    lines = [
        header,
        f"{'stage':12}{2 * ('planned'.rjust(12) + 'compiled'.rjust(12))}{'compiled':>12}",
    ]
    for name, row in found.items():
        sizes = [x / 1e6 for key, x in row.items() if key != "ratio"]
        lines.append(f"{name:12}{''.join(f'{x:12.2f}' for x in sizes)}{row['ratio']:12.2f}")
    return "\n".join(lines)
