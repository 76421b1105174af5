"""The plan of a run on a topology: what each of its stages needs on a device.

The program of an update is traced from shapes, for the share of the samples that one device has,
and analyzed, see `usage`. Nothing is compiled, and neither weights nor devices are needed.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
import ml_collections

from mmrl_jax import problems
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.models import lora
from mmrl_jax.planning import evaluations, parts, placement
from mmrl_jax.planning.chips import Topology
from mmrl_jax.planning.program import Value, simplified
from mmrl_jax.planning.usage import Analyzer, Usage
from mmrl_jax.problems import Problem
from mmrl_jax.problems import problem as problem_lib
from mmrl_jax.training.stage import Carry, Stage

# Keys of a stage that are numbers of samples, which the devices share.
SAMPLES = ("prompts_per_update", "num_envs", "batch_size")


def samples_of(stage: ml_collections.ConfigDict) -> dict[str, int]:
    """Returns the numbers of samples of a stage that the devices share, by their keys."""
    found = {key: stage[key] for key in SAMPLES if key in stage}
    for key, group in stage.items():
        if isinstance(group, ml_collections.ConfigDict):
            found |= {f"{key}.{name}": size for name, size in samples_of(group).items()}
    return found


@dataclasses.dataclass
class StagePlan:
    """What a stage needs on one device.

    Attributes:
      name: Name of the stage.
      parameters: Number of parameters that are 'trained' and 'frozen', on all devices.
      held: Bytes that are held during the whole stage, by part.
      moments: Bytes of parts that exist at some moments only, by part.
      peak: Largest sum of bytes at a time.
      parts: Usage of the update by part, 'rollout' and 'learning', and of an 'evaluation'.
      update: Usage of a whole update, with the exchange of gradients.
      evaluation_peak: Largest sum of bytes at a time in an evaluation; 0 if it is not planned.
    """

    name: str
    parameters: dict[str, int]
    held: dict[str, float]
    moments: dict[str, float]
    peak: float
    parts: dict[str, Usage]
    update: Usage
    evaluation_peak: float = 0.0

    @property
    def peak_part(self) -> str:
        """Part of the update, or the evaluation, that has the peak."""
        if self.evaluation_peak > self.peak:
            return "evaluation"
        updates = {name: x for name, x in self.parts.items() if name != "evaluation"}
        return max(updates, key=lambda name: updates[name].peak, default="update")

    @property
    def needed(self) -> float:
        """Largest sum of bytes at a time in updates and evaluations."""
        return max(self.peak, self.evaluation_peak)


@dataclasses.dataclass
class Plan:
    """What a run needs on each device of a topology.

    Attributes:
      topology: Devices.
      mesh: Sizes of the axes of the mesh.
      stages: Plans of the stages.
    """

    topology: Topology
    mesh: dict[str, int]
    stages: list[StagePlan]

    @property
    def limit(self) -> float:
        """Bytes of a device that a program can have."""
        return self.topology.chip.memory * self.topology.chip.usable

    @property
    def needed(self) -> float:
        """Bytes of a device that the largest stage needs."""
        return max(stage.needed for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit


class Planner:
    """Makes plans, and keeps what it has traced.

    Args:
      evaluations: Whether evaluations are planned too.
    """

    def __init__(self, *, evaluations: bool = True):
        self._evaluations = evaluations
        self._traced: dict[str, list[_Traced]] = {}

    def plan(self, config: ml_collections.ConfigDict, topology: Topology) -> Plan:
        """Returns the plan of a config on a topology.

        Args:
          config: Complete config of the run.
          topology: Devices.

        Raises:
          ValueError: If the config is invalid, or does not fit the number of devices.
        """
        mesh = mesh_sizes(config, topology.devices)
        local = local_config(config, mesh)
        key = json.dumps(local.to_dict(), sort_keys=True, default=str)
        if key not in self._traced:
            self._traced[key] = _trace(local, self._evaluations)
        analyzer = Analyzer(topology.chip, mesh)
        return Plan(topology, mesh, [_stage_plan(x, analyzer) for x in self._traced[key]])


def mesh_sizes(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Returns the sizes of the axes of a run's mesh on some devices.

    Raises:
      ValueError: If the config needs more devices, or its samples cannot be shared equally.
    """
    m = config.mesh
    data = m.data or devices // (m.fsdp * m.tensor)
    if not 1 <= data * m.fsdp * m.tensor <= devices:
        raise ValueError(
            f"mesh.data={m.data}, mesh.fsdp={m.fsdp}, mesh.tensor={m.tensor}: the topology has "
            f"{devices} devices. Lower a number; mesh.data=0 uses all devices that the other axes "
            "leave."
        )
    mesh = {mesh_lib.DATA: data, mesh_lib.FSDP: m.fsdp, mesh_lib.TENSOR: m.tensor}
    sizes: dict[str, int] = {}
    for stage in config.stages:
        g = config[stage]
        steps = g.get("num_minibatches", 1) * g.get("grad_accum_steps", 1)
        for key, size in samples_of(g).items():
            sizes[f"{stage}.{key}"] = size
        if "prompts_per_update" in g:
            name = f"{stage}.prompts_per_update / {stage}.num_minibatches / grad_accum_steps"
            sizes[name] = g.prompts_per_update // steps
        if "num_envs" in g:
            name = f"{stage}.num_envs * {stage}.unroll_length / {stage}.num_minibatches"
            sizes[name] = g.num_envs * g.unroll_length // steps
    problem_lib.check_divisible(sizes, placement.abstract_mesh(mesh))
    return mesh


def local_config(
    config: ml_collections.ConfigDict, mesh: Mapping[str, int]
) -> ml_collections.ConfigDict:
    """Returns the config of one device: its share of the samples, and a mesh of one device."""
    shards = mesh_lib.batch_shards(placement.abstract_mesh(mesh))
    changes: dict[str, Any] = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    for stage in config.stages:
        changes[stage] = {}
        for key, size in samples_of(config[stage]).items():
            *groups, field = key.split(".")
            table = changes[stage]
            for group in groups:
                table = table.setdefault(group, {})
            table[field] = size // shards
    if "eval_episodes" in config.run:
        changes["run"] = {"eval_episodes": -(-config.run.eval_episodes // shards)}
    return problems.complete(config.to_dict(), changes)


# -- Tracing ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Traced:
    """A stage that is traced for one device."""

    name: str
    problem: Problem
    carry: Carry
    constants: Any
    program: ClosedJaxpr
    evaluation: evaluations.Evaluation | None


def _trace(config: ml_collections.ConfigDict, with_evaluations: bool) -> list[_Traced]:
    """Traces the stages of a config for one device."""
    traced: list[_Traced] = []
    with mesh_lib.described_devices(jax.devices()[:1]):
        problem = problems.make(config)
        variables, evaluation = None, None
        for name in config.stages:
            stage = problem.stage(name, start=variables)
            carry = jax.eval_shape(stage.init)
            program = simplified(jax.make_jaxpr(_update(stage))(carry, stage.constants))
            variables = problem.variables(stage, carry.learner)
            if with_evaluations and evaluation is None:
                evaluation = evaluations.trace(problem, variables)
            traced.append(_Traced(name, problem, carry, stage.constants, program, evaluation))
    return traced


def _update(stage: Stage) -> Any:
    assert stage.update is not None
    return stage.update


# -- Plans of stages -------------------------------------------------------------------------------


def _stage_plan(traced: _Traced, analyzer: Analyzer) -> StagePlan:
    carry, constants, mesh = traced.carry, traced.constants, placement.abstract_mesh(analyzer.mesh)
    placed = placement.placements(carry, constants, mesh)
    ins = [
        Value(x, split=placement.split_of(x, s))
        for x, s in placement.pairs((carry, constants), placed)
    ]
    donated = len(jax.tree.leaves(carry))
    found = analyzer.program(traced.program, ins, donated)
    trained, frozen = variables_of(traced)
    size = functools.partial(placement.tree_bytes, analyzer=analyzer)
    learner, learner_placed = carry.learner, placed[0].learner
    held = {
        "weights, trained": size(trained, partition.shardings(trained, mesh)),
        "weights, frozen": size(frozen, partition.shardings(frozen, mesh)),
        "optimizer state": size(learner.opt_state, learner_placed.opt_state),
        "extras": size(getattr(learner, "extras", ()), getattr(learner_placed, "extras", ())),
        "reference": size(
            getattr(learner, "reference", ()), getattr(learner_placed, "reference", ())
        ),
        "environments": size(carry.env_state, placed[0].env_state),
        "data set": size(constants.data, placed[1].data),
    }
    arguments = sum(map(analyzer.nbytes, ins))
    held["other"] = max(arguments - sum(held.values()), 0.0)
    gradients = held["weights, trained"]
    update = dataclasses.replace(found.whole, exchanged=found.whole.exchanged.copy())
    _exchange_gradients(update, trained, traced, analyzer)
    moments = {"gradients": gradients} | parts.moments(traced.problem, traced.name, carry, analyzer)
    usages = {name: x for name, x in found.scopes.items() if name in parts.SCOPES}
    stage = StagePlan(
        traced.name,
        {"trained": placement.count(trained), "frozen": placement.count(frozen)},
        {name: x for name, x in held.items() if x},
        {name: x for name, x in moments.items() if x},
        arguments + found.whole.peak,
        usages,
        update,
    )
    if traced.evaluation is not None:
        usage = evaluations.usage(traced.evaluation, analyzer)
        stage.parts["evaluation"] = usage
        stage.evaluation_peak = arguments + usage.peak
    return stage


def _exchange_gradients(update: Usage, trained: Any, traced: _Traced, analyzer: Analyzer) -> None:
    """Adds the sums of the gradients over devices with different samples to an update."""
    mesh = analyzer.mesh
    g = traced.problem.config[traced.name]
    steps = g.get("num_epochs", 1) * g.get("num_minibatches", 1)
    sent = 0.0
    for x, sharding in placement.pairs(
        trained, partition.shardings(trained, placement.abstract_mesh(mesh))
    ):
        split = {axis for axes in placement.split_of(x, sharding) for axis in axes}
        axes = [axis for axis in (mesh_lib.DATA, mesh_lib.FSDP) if axis not in split]
        ways = math.prod(mesh[axis] for axis in axes)
        size = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        sent += steps * 2 * size * (ways - 1) / ways
    if sent:
        update.exchanged["all-reduce"] += sent  # type: ignore[assignment]
        update.seconds += sent / analyzer.chip.link


def variables_of(traced: _Traced) -> tuple[Any, Any]:
    """Returns the variables that a stage trains, and the frozen ones."""
    params, frozen = traced.carry.learner.params, traced.constants.frozen
    if frozen != ():
        return params, frozen
    return lora.split(params, traced.problem.config[traced.name].trainable)
