"""Runs: a config and a working directory in, a trained policy and its reports out.

    config = mmrl_jax.get_config("reach_ppo")
    trained = mmrl_jax.train(config, "runs/reach")
    loaded = mmrl_jax.load("runs/reach")

A run can be stopped at any time; the same call resumes it from its newest checkpoint.
"""

from collections.abc import Collection, Mapping
import contextlib
import dataclasses
import json
import math
import sys
import time
import types
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections

from mmrl_jax import envs, probes, problems
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config import load_config
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.monitoring import metric_definitions, metrics
from mmrl_jax.problems import Problem
from mmrl_jax.reporting import report
from mmrl_jax.rollouts.unroll import PolicyFunction
from mmrl_jax.training import checkpoint, fingerprints, loop, provenance
from mmrl_jax.training.lock import locked
from mmrl_jax.training.loop import Result

SAMPLES = 24  # Completions in samples.html.


def get_config(
    spec: str, changes: Mapping[str, Any] = types.MappingProxyType({})
) -> ml_collections.ConfigDict:
    """Returns a config by its name or path, with changes.

    Args:
      spec: Name of a public config, e.g. 'reach_ppo', or path of a config file; either may be
        followed by ':argument'.
      changes: Nested dictionary of the keys that differ, e.g. {"ppo": {"num_updates": 20}}.

    Raises:
      ValueError: There is no such config, or it cannot be executed.
    """
    return problems.complete(load_config(spec), changes)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves in memory.

    Attributes:
      problem: The problem that was trained on.
      results: How each stage that ran has ended, by its name, in order. Only the last one has its
        carry: the others' are in their checkpoints.
      variables: What the policy acts with after the last stage that ran, see
        `problems.Problem.variables`.
      tested: Metrics of the test split, by the names that they are logged with; empty where the
        problem has no such split.
    """

    problem: Problem
    results: dict[str, Result]
    variables: Any
    tested: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Whether a SIGTERM or SIGINT came, so that nothing more should be started."""
        return any(result.interrupted for result in self.results.values())

    @property
    def last(self) -> Result:
        """How the last stage that ran has ended."""
        return list(self.results.values())[-1]


def stage_directory(
    config: ml_collections.ConfigDict, name: str, workdir: workdir_lib.PathLike
) -> epath.Path:
    """Returns the directory of a stage: that of the run for the last one, <workdir>/<name> else."""
    directory = workdir_lib.as_path(workdir)
    return directory if name == config.stages[-1] else directory / name


def claim(
    problem: Problem, workdir: workdir_lib.PathLike, *, accept: Collection[str] = ()
) -> contextlib.AbstractContextManager[object]:
    """Claims a working directory for a run.

    Args:
      problem: Of the run.
      workdir: Directory of the run; made if absent.
      accept: Changes of what the run depends on that are intended, see `fingerprints.check`.

    Returns:
      The lock of the directory, held until its context is left.

    Raises:
      ValueError: The directory belongs to another config, is in use by another process, or cannot
        be written; or what the run depends on has changed.
    """
    config, directory = problem.config, workdir_lib.as_path(workdir)
    directories = {name: stage_directory(config, name, directory) for name in config.stages}
    begun = [name for name, place in directories.items() if workdir_lib.saved_steps(place)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(directory))
        workdir_lib.claim_workdir(
            directory,
            config,
            may_change=problems.may_change(config),
            fixed=fixed_on_resume(config, begun),
            begun=bool(begun),
            complete=problems.complete,
        )
        depends_on = problem.dependencies()
        if begun:
            fingerprints.check(directory, depends_on, accept=accept)
        for name, place in directories.items():
            fingerprints.write(
                place, fingerprints.Run(name, depends_on), made_with=provenance.provenance()
            )
        return stack.pop_all()


def fixed_on_resume(config: ml_collections.ConfigDict, begun: Collection[str]) -> dict[str, str]:
    """Returns the keys that a run must keep although others may change, and why.

    Args:
      config: Of the run.
      begun: The stages that have checkpoints.
    """
    return {
        f"{name}.num_updates": (
            f"{name}.optimizer.schedule={config[name].optimizer.schedule!r} ends at "
            f"{name}.num_updates, so that another number would make the learning rate jump. Keep "
            "it; a longer run starts in a fresh workdir, and with the schedule 'constant' a run "
            "may be extended at any time"
        )
        for name in begun
        if config[name].optimizer.schedule != "constant" or config[name].optimizer.warmup
    }


def train(
    config: ml_collections.ConfigDict,
    workdir: workdir_lib.PathLike,
    *,
    accept: Collection[str] = (),
) -> Trained:
    """Runs the stages of a config, each resumed from its newest checkpoint.

    Writes to the working directory what the documentation lists; summary.json is written only by a
    run that nothing interrupted.

    Args:
      config: Of the run, see `problems.complete`.
      workdir: Directory of the run, local or gs://bucket/directory.
      accept: See `claim`.

    Raises:
      ValueError: The config cannot run, or see `claim`.
      FloatingPointError: Training diverged.
      HostFailed: Reward functions, or files, failed each time that an update asked for them.
    """
    started = time.perf_counter()
    problem = problems.make(config)
    with claim(problem, workdir, accept=accept):
        return train_stages(problem, workdir, started=started)


def train_stages(
    problem: Problem, workdir: workdir_lib.PathLike, *, started: float | None = None
) -> Trained:
    """Runs the stages of a problem in a directory that is claimed for it, see `train`.

    Args:
      problem: Of the run.
      workdir: Directory of the run.
      started: The time.perf_counter() of the start of the run, for its total time.
    """
    started = time.perf_counter() if started is None else started
    config, directory = problem.config, workdir_lib.as_path(workdir)
    results: dict[str, Result] = {}
    variables = None
    for name in config.stages:
        place = stage_directory(config, name, directory)
        stage = probes.attach(problem, problem.stage(name, start=variables), place)
        variables = None  # The stage alone holds what it starts with, and releases it.
        result = loop.run(
            stage, workdir=place, config=config, may_change=problems.may_change(config)
        )
        assert result.carry is not None  # A later stage alone takes it.
        variables = problem.variables(stage, result.carry.learner)
        steps = "env_steps" if result.counters.env_steps else "updates"
        draw_curves(place, x=f"progress/{steps}")
        if name != config.stages[-1] and not result.interrupted:
            # What this stage held on the devices goes before the next one takes its place.
            result, stage = dataclasses.replace(result, carry=None), None
        results[name] = result
        if result.interrupted:
            break
    trained = Trained(problem, results, variables)
    if trained.interrupted or jax.process_index() != 0:
        return trained
    with report.tolerate_errors("Writing samples.html"):
        samples, tested = problem.samples(variables, SAMPLES)
        trained = dataclasses.replace(trained, tested=tested)
        if samples:
            report.sample_table(directory / "samples.html", samples, f"{directory.name}: samples")
    with report.tolerate_errors("Writing summary.json"):
        summary = final_evaluation(directory, trained.tested) | totals(results.values(), started)
        write_json(directory / "summary.json", summary)
    return trained


def draw_curves(workdir: epath.Path, *, x: str) -> None:
    """Draws a stage's learning_curves.png; not of a stage stopped before it logged anything."""
    path = workdir / metrics.JSONL_NAME
    with report.tolerate_errors("Drawing learning_curves.png"):
        if jax.process_index() == 0 and metrics.read_jsonl(path):
            report.learning_curves(path, workdir / "learning_curves.png", x=x)


def final_evaluation(workdir: epath.Path, tested: Mapping[str, float]) -> dict[str, float]:
    """Returns 'final/<split>/success', '_lo' and '_hi', of a test split or as last logged.

    Where there is no success they are of 'return', or of 'accuracy' for verifiable questions; where
    rewards can fail there is 'failed_fraction' too. Without an evaluation in the last row nothing
    is returned, and a message says so: it failed, or metrics.jsonl was deleted.

    Args:
      workdir: Of the last stage.
      tested: Metrics of a test split by their logged names; empty where there is none.
    """
    rows = metrics.read_jsonl(workdir / metrics.JSONL_NAME)
    # An evaluation of earlier parameters says nothing about the final ones.
    row = tested or (rows[-1] if rows and any(map(_is_evaluation, rows[-1])) else None)
    if row is None:
        print(
            f"summary.json has no final evaluation, for the last row of "
            f"{workdir / metrics.JSONL_NAME} has none: "
            f"python -m experiments.evaluate --workdir={workdir}",
            file=sys.stderr,
            flush=True,
        )
        return {}
    for score in ("success", "accuracy", "return"):
        names = [name for name in row if metric_definitions.matches(f"eval/<split>/{score}", name)]
        if names:
            break
    name = names[0].removeprefix("eval/")
    final = {f"final/{name}{end}": row[f"eval/{name}{end}"] for end in ("", "_lo", "_hi")}
    failed = f"{name.rpartition('/')[0]}/failed_fraction"
    return final | ({f"final/{failed}": row[f"eval/{failed}"]} if f"eval/{failed}" in row else {})


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval/") and name != "eval/failed"


def totals(results: Collection[Result], started: float) -> dict[str, float]:
    """Returns times and steps of a run of several stages.

    Args:
      results: Of the stages.
      started: The time.perf_counter() when this process began the run.

    Returns:
      wall_s: Seconds that this process took, and those that earlier processes took for the stages
        up to the checkpoints from which this one resumed.
      compile_s: Seconds of initializing and compiling the stages, of all processes.
      env_steps: Decisions of the policy in environments during training; a step that only resets
        is not one.
      env_steps_per_s: env_steps over the time of the updates that took them; 0 without any.
    """
    stepping = [result for result in results if result.counters.env_steps]
    steps = sum(result.counters.env_steps for result in stepping)
    return {
        "wall_s": time.perf_counter() - started + sum(result.earlier_s for result in results),
        "compile_s": sum(result.counters.compile_s for result in results),
        "env_steps": steps,
        "env_steps_per_s": steps / sum(result.wall_s for result in stepping) if stepping else 0.0,
    }


def write_json(path: epath.Path, values: Mapping[str, float]) -> None:
    """Writes a flat dictionary in one atomic replacement; what is not finite becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    workdir_lib.write_text(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")


class Loaded(NamedTuple):
    """A trained policy, restored from its working directory.

    Attributes:
      problem: The problem that it was trained on: its environments, or its prompts.
      variables: What the policy acts with, see `problems.Problem.variables`.
      stage: The stage whose checkpoint was restored.
      step: The update of the checkpoint.
    """

    problem: Problem
    variables: Any
    stage: str
    step: int

    def evaluate(self, split: str, *, episodes: int | None = None) -> dict[str, float]:
        """Returns the metrics of the policy on a split, with 95 % intervals.

        Args:
          split: One of problem.splits.
          episodes: Episodes, or prompts; by default as many as in the run's own evaluations.
        """
        return self.problem.measure(episodes=episodes)(self.variables, split)

    def policy(self, *, deterministic: bool = True) -> PolicyFunction:
        """Returns the policy of a problem with an environment, for `rollouts.unroll`.

        Args:
          deterministic: Take the most likely action; else a sample.
        """
        return self.problem.policy(self.variables, deterministic=deterministic)


def read_problem(
    workdir: workdir_lib.PathLike,
    *,
    trust_modules: bool = False,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[Problem, str]:
    """Makes the problem of a run that was trained before.

    It is made on one device; or, where the run split its parameters and there are as many devices
    here, on those that a copy of the parameters was split over.

    Args:
      workdir: Directory of the run, or of one of its stages.
      trust_modules: Import the modules that the config names, although they are not of this
        package.
      changes: Nested dictionary of the keys of the config that differ from the run's.

    Returns:
      The problem, and the stage that the directory is of.

    Raises:
      ValueError: There is no run, its config is not one of this version, or it names modules of
        others and these are not trusted.
    """
    directory = workdir_lib.as_path(workdir)
    config = workdir_lib.stored_config(directory)
    if config is None:
        raise ValueError(f"--workdir={directory} holds no run (no config.json that can be read).")
    modules = _modules(config)
    if modules and not trust_modules:
        raise ValueError(
            f"--workdir={directory} names {', '.join(modules)}, which would be imported and run "
            "here. If you trust the module that this name finds on this machine, add "
            "--trust_modules."
        )
    axes = config.mesh.fsdp, config.mesh.tensor
    fsdp, tensor = axes if math.prod(axes) <= jax.device_count() else (1, 1)
    mesh = {"data": 1, "fsdp": fsdp, "tensor": tensor}
    config = problems.complete(config, {"mesh": mesh}, changes)
    run = fingerprints.read(directory)
    return problems.make(config), config.stages[-1] if run is None else run.stage


def _modules(config: ml_collections.ConfigDict) -> list[str]:
    """The modules that a config names and that are not of this package."""
    named = {("rewards", "functions"), ("env", "name"), ("task", "name"), ("run", "probes")}
    modules = set(config.get("imports", ()))
    for group, key in named:
        section = config.get(group)
        value = section.get(key) if isinstance(section, ml_collections.ConfigDict) else None
        names = (value,) if isinstance(value, str) else value or ()
        modules |= {str(name).partition(":")[0] for name in names if ":" in str(name)}
    ours = {"mmrl_jax", *envs.PREFIXES}
    return sorted(module for module in modules if module.partition(".")[0] not in ours)


def load(
    workdir: workdir_lib.PathLike,
    *,
    which: str = "latest",
    trust_modules: bool = False,
    accept: Collection[str] = (),
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> Loaded:
    """Restores a trained policy.

    Args:
      workdir: Directory of the run, or of one of its stages, trained on any number of devices.
      which: Checkpoint: 'latest', 'best' or an update.
      trust_modules: See `read_problem`.
      accept: Changes of what the policy depends on that are intended, see `fingerprints.check`.
      changes: See `read_problem`.

    Raises:
      ValueError: See `read_problem`; there is no such checkpoint; or what the policy depends on has
        changed.
      CheckpointDamaged: The checkpoint cannot be read.
    """
    directory = workdir_lib.as_path(workdir)
    problem, stage = read_problem(directory, trust_modules=trust_modules, changes=changes)
    now = problem.dependencies()
    of_model = {name: x for name, x in now.items() if name in fingerprints.OF_MODEL}
    fingerprints.check(directory, of_model, accept=accept)
    return restore(problem, stage, directory, which=which)


def restore(
    problem: Problem, stage: str, workdir: workdir_lib.PathLike, *, which: str = "latest"
) -> Loaded:
    """Restores a trained policy of a problem that was made before, see `load`.

    Args:
      problem: See `read_problem`; what it depends on is not compared with anything.
      stage: The stage that the directory is of.
      workdir: Directory of the stage.
      which: Checkpoint: 'latest', 'best' or an update.

    Raises:
      ValueError: There is no such checkpoint.
      CheckpointDamaged: The checkpoint cannot be read.
    """
    directory = workdir_lib.as_path(workdir)
    root = directory if stage == problem.config.stages[-1] else directory.parent
    parts, step = {}, 0
    for name in problem.checkpoint_stages(stage):
        shapes = problem.checkpoint_parts(name)
        like = mesh_lib.placed_shapes(shapes, partition.shardings(shapes, problem.mesh))
        # A stage begins where the one before ended, and nowhere before.
        chosen = which if name == stage else str(problem.config[name].num_updates)
        restored, step = checkpoint.restore_parts(
            directory if name == stage else stage_directory(problem.config, name, root),
            {f"learner/{part}": x for part, x in like.items()},
            which=int(chosen) if chosen.isdecimal() else chosen,
        )
        parts[name] = {part: restored[f"learner/{part}"] for part in like}
    return Loaded(problem, problem.from_checkpoint(parts), stage, step)
