"""The plan that a run prints before it starts, and the refusal of what cannot fit.

The parameters of a stage and what an optimizer keeps of them are known before anything is read. The
peak of an update is known once its program is traced, which a run does anyway before it compiles.
Where there are several devices, or an update is more than one program, the run is planned as by the
command `mmrl-plan`, which takes a few seconds.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from mmrl_jax.config.options import build
from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.models import lora
from mmrl_jax.planning import chips, placement, remedies, report
from mmrl_jax.planning.chips import Topology
from mmrl_jax.planning.plan import Plan, Planner, StagePlan
from mmrl_jax.planning.program import Value, simplified
from mmrl_jax.planning.report import amount
from mmrl_jax.planning.usage import Analyzer, Usage
from mmrl_jax.problems import Problem, demonstration_data
from mmrl_jax.training.stage import Carry, Stage

# A run is refused if its planned peak is above the limit by more than the error of plans.
SLACK = 1.25


class DoesNotFit(RuntimeError):
    """A run needs more memory than its devices have."""


def check(problem: Problem, tell: Callable[[str], None] = print) -> None:
    """Prints what a run needs, as far as that is known before its weights are read.

    Args:
      problem: Problem of the run.
      tell: Function that prints a line.

    Raises:
      DoesNotFit: If the run cannot fit its devices; the message names the nearest remedy.
    """
    topology = chips.found(problem.mesh.size)
    if problem.mesh.size > 1 or _needs_host(problem):
        plan = Planner(evaluations=False).plan(problem.config, topology)
        for stage in plan.stages:
            tell(_line(stage, plan))
        if plan.needed > SLACK * plan.limit:
            raise DoesNotFit(_refusal(problem, topology, plan))
        return
    stages = [_storage(problem, name) for name in problem.config.stages]
    plan = Plan(topology, dict(problem.mesh.shape), stages)
    for stage in stages:
        held = ", ".join(f"{name} {amount(x, 'B')}" for name, x in stage.held.items())
        tell(f"Plan of {stage.name}: {_parameters(stage)}; {held}.")
    if plan.needed > plan.limit:
        raise DoesNotFit(_refusal(problem, topology, plan))


def _needs_host(problem: Problem) -> bool:
    """Returns whether the host takes part in an update of a stage, with records or rewards."""
    config = problem.config
    return "dataset" in config or bool(demonstration_data.directories(config))


def inspected(stage: Stage, problem: Problem, tell: Callable[[str], None] = print) -> Stage:
    """Returns a stage that compares the peak of its traced program with the memory of the device.

    Args:
      stage: Stage of a run.
      problem: Problem of the run.
      tell: Function that prints a line.

    Returns:
      The stage. Its first compilation raises DoesNotFit for a program that cannot fit.
    """
    topology = chips.found(problem.mesh.size)
    if problem.mesh.size > 1:
        return stage
    sizes: list[float] = []

    def inspect(program: ClosedJaxpr, carry: Carry) -> None:
        if sizes:  # The last dispatch of a stage may have fewer updates.
            return
        analyzer = Analyzer(topology.chip, {})
        closed = simplified(program)
        ins = [Value(v.aval) for v in closed.jaxpr.invars]
        usage = analyzer.program(closed, ins, len(jax.tree.leaves(carry))).whole
        sizes.append(sum(map(analyzer.nbytes, ins)) + usage.peak)
        plan = Plan(topology, dict(problem.mesh.shape), [_with_peak(stage.name, sizes[0])])
        tell(f"Plan of {stage.name}: {report.summary(plan)}")
        if plan.needed > SLACK * plan.limit:
            raise DoesNotFit(_refusal(problem, topology, plan))

    return dataclasses.replace(stage, inspect=inspect)


def _with_peak(name: str, peak: float) -> StagePlan:
    return StagePlan(name, {"trained": 0, "frozen": 0}, {}, {}, peak, {}, Usage())


def _parameters(stage: StagePlan) -> str:
    trained, frozen = stage.parameters["trained"], stage.parameters["frozen"]
    return f"{report.count(trained + frozen)} parameters, {report.count(trained)} trained"


def _line(stage: StagePlan, plan: Plan) -> str:
    held = sum(stage.held.values())
    return (
        f"Plan of {stage.name}: {_parameters(stage)}; {amount(held, 'B')} a device are held, "
        f"{amount(stage.needed, 'B')} are the peak, of {amount(plan.limit, 'B')}."
    )


def _storage(problem: Problem, name: str) -> StagePlan:
    """Returns what a stage keeps of its parameters on one device."""
    config, found = problem.config[name], problem.checkpoint_parts(name)["params"]
    if hasattr(problem, "partition"):  # A token policy.
        trained, frozen = problem.partition(problem.shapes(), name)  # type: ignore[attr-defined]
    else:
        trained, frozen = lora.split(found, config.trainable)
    optimizer = optimizers.make(build(OptimizerOptions, config.optimizer), 1).transformation
    state = jax.eval_shape(optimizer.init, trained)
    held = {
        "weights": _nbytes((trained, frozen)),
        "optimizer state": _nbytes(state),
        "gradients": _nbytes(trained),
    }
    parameters = {"trained": placement.count(trained), "frozen": placement.count(frozen)}
    return StagePlan(name, parameters, held, {}, sum(held.values()), {}, Usage())


def _nbytes(tree: Any) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _refusal(problem: Problem, topology: Topology, plan: Plan) -> str:
    """Returns the message about a run that cannot fit, with the nearest remedy."""
    planner = Planner(evaluations=False)
    whole = planner.plan(problem.config, topology)
    found = None if whole.fits else remedies.remedy(planner, problem.config, topology, whole)
    return f"{report.summary(plan)} {report.remedy(found)}"
