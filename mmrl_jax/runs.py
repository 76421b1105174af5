"""Training of runs, given a config and a working directory.

    config = mmrl_jax.get_config("reach_ppo")
    trained = mmrl_jax.train(config, "runs/reach")

A run can be stopped at any time; the same call resumes it from its newest checkpoint.
"""

from collections.abc import Callable, Collection, Mapping
import contextlib
import dataclasses
import itertools
import json
import time
import types
from typing import Any

from etils import epath
import ml_collections

from mmrl_jax import probes, problems
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config import load_config, to_json
from mmrl_jax.distributed import multihost
from mmrl_jax.monitoring import loggers, metrics
from mmrl_jax.problems import Problem
from mmrl_jax.reporting import report
from mmrl_jax.reporting import summary as summary_lib
from mmrl_jax.training import fingerprints, loop, provenance
from mmrl_jax.training.lock import locked
from mmrl_jax.training.loop import Result
from mmrl_jax.training.stage import Stage

SAMPLES = 24  # Number of completions in samples.html.


def get_config(
    spec: str, changes: Mapping[str, Any] = types.MappingProxyType({})
) -> ml_collections.ConfigDict:
    """Returns a config by its name or path, with changes.

    Args:
      spec: Name of a public config, e.g. 'reach_ppo', or path of a config file; either may be
        followed by ':argument'.
      changes: Nested dictionary of the keys that differ, e.g. {"ppo": {"num_updates": 20}}.

    Raises:
      ValueError: If the config does not exist or cannot be executed, or a key in `changes` has
        dots.
    """
    for key in changes:
        if "." in key:
            raise ValueError(
                f"changes has the key {key!r}; write nested dictionaries, e.g. "
                '{"ppo": {"num_updates": 20}}.'
            )
    return problems.complete(load_config(spec), changes)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Result of a run.

    Attributes:
      problem: Problem of the run.
      results: Results of the stages that ran, by their names, in order. Only the last result has
        its carry; the carries of earlier stages are in their checkpoints.
      variables: Variables of the policy after the last stage that ran, see
        `problems.Problem.variables`.
      test_metrics: Metrics of the test split by their logged names; empty if the problem has no
        test split.
    """

    problem: Problem
    results: dict[str, Result]
    variables: Any
    test_metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        done = {name: result.updates for name, result in self.results.items()}
        return f"Trained(updates={done}, interrupted={self.interrupted})"

    @property
    def interrupted(self) -> bool:
        """Whether a SIGTERM or SIGINT was received, so that nothing more should be started."""
        return any(result.interrupted for result in self.results.values())

    @property
    def last(self) -> Result:
        """Result of the last stage that ran."""
        return list(self.results.values())[-1]


def claim(
    problem: Problem, workdir: workdir_lib.PathLike, *, accept: Collection[str] = ()
) -> contextlib.AbstractContextManager[object]:
    """Claims a working directory for a run.

    Args:
      problem: Problem of the run.
      workdir: Working directory of the run, which is created if it does not exist.
      accept: Names of inputs that may have changed since the run began, see `fingerprints.check`.

    Returns:
      A context manager that holds the lock of the directory until its context is left.

    Raises:
      ValueError: If a probe does not exist, the package of a logger is not installed, the directory
        belongs to another config, is in use by another process, or cannot be written, or an input
        of the run has changed.
    """
    config, directory = problem.config, workdir_lib.as_path(workdir)
    fingerprints.check_accepted(accept)
    for probe in config.run.probes:
        probes.find(probe)
    if multihost.is_primary():
        loggers.modules(config.run.loggers)
    directories = {
        name: workdir_lib.stage_directory(config, name, directory) for name in config.stages
    }
    begun = [name for name, path in directories.items() if workdir_lib.saved_steps(path)]
    made_with = provenance.provenance()
    for name in begun:
        done = workdir_lib.saved_steps(directories[name])[-1]
        if config[name].num_updates < done:
            raise ValueError(
                f"{name}.num_updates={config[name].num_updates}, but the run in {directory} has "
                f"completed {done} updates of this stage; give at least {done}, or a fresh workdir."
            )

    def check() -> dict[str, str]:
        workdir_lib.claim_workdir(
            directory,
            config,
            may_change=problems.may_change(config),
            fixed=fixed_on_resume(config, begun),
            begun=bool(begun),
            complete=problems.complete,
        )
        dependencies = problem.dependencies()
        if begun:
            fingerprints.check(directory, dependencies, accept=accept)
            # An input that is missing now keeps its fingerprint, until it is there again.
            stored = fingerprints.read(directory)
            dependencies = (stored.fingerprints if stored else {}) | dependencies
        return dependencies

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(directory))
        dependencies = multihost.on_all(check)
        multihost.check_same(
            {
                "config": to_json(config),
                "inputs": json.dumps(dependencies, sort_keys=True),
                "version of the code": f"{made_with['commit'].strip('+')} {made_with['versions']}",
            }
        )
        for name, path in directories.items():
            fingerprints.write(path, fingerprints.Run(name, dependencies), made_with=made_with)
        return stack.pop_all()


def fixed_on_resume(config: ml_collections.ConfigDict, begun: Collection[str]) -> dict[str, str]:
    """Returns the keys that a resumed run must not change, with the reasons.

    Args:
      config: Config of the run.
      begun: Names of the stages that have checkpoints.
    """
    stages = list(config.stages)
    scheduled = {
        f"{name}.num_updates": (
            f"{name}.optimizer.schedule={config[name].optimizer.schedule!r} ends at "
            f"{name}.num_updates, so that another number would make the learning rate jump. Keep "
            "it, or start a longer run in a fresh workdir; with the schedule 'constant' a run can "
            "be extended at any time"
        )
        for name in begun
        if config[name].optimizer.schedule != "constant" or config[name].optimizer.warmup
    }
    followed = {
        f"{name}.num_updates": (
            f"the stage {after!r} has begun from the last update of {name!r}. Keep it, or start a "
            "longer run in a fresh workdir"
        )
        for name, after in itertools.pairwise(stages)
        if after in begun
    }
    return scheduled | followed


def train(
    config: ml_collections.ConfigDict,
    workdir: workdir_lib.PathLike,
    *,
    accept: Collection[str] = (),
    profile: bool = False,
) -> Trained:
    """Trains a policy in the stages of a config, each resumed from its newest checkpoint.

    docs/runs.md describes the files in the working directory. summary.json is written only if no
    signal interrupted the run.

    Args:
      config: Config of the run, see `problems.complete`.
      workdir: Working directory of the run, local or gs://bucket/directory.
      accept: Names of inputs that may have changed since the run began, see `fingerprints.check`.
      profile: Whether a few dispatches of each stage are traced, see docs/runs.md.

    Raises:
      ValueError: If the config is invalid, or the directory cannot be claimed, see `claim`.
      FloatingPointError: If training diverges.
      HostFailed: If reward functions or files fail in every retry of an update.
    """
    if isinstance(config, str):
        raise ValueError(f"config={config!r} is a name; give mmrl_jax.get_config({config!r}).")
    started = time.perf_counter()
    problem = multihost.on_all(lambda: problems.make(config))
    with claim(problem, workdir, accept=accept):
        return train_stages(problem, workdir, started=started, profile=profile)


def train_stages(
    problem: Problem,
    workdir: workdir_lib.PathLike,
    *,
    started: float | None = None,
    inspected: Callable[[Stage], Stage] = lambda stage: stage,
    profile: bool = False,
) -> Trained:
    """Trains a policy in the stages of a problem, see `train`.

    Args:
      problem: Problem of the run.
      workdir: Working directory of the run, which must be claimed, see `claim`.
      started: Value of time.perf_counter() at the start of the run, for its total time; None for
        the current time.
      inspected: Function that returns a stage that also inspects its traced program, see
        `Stage.inspect`.
      profile: Whether a few dispatches of each stage are traced, see docs/runs.md.
    """
    started = time.perf_counter() if started is None else started
    config, directory = problem.config, workdir_lib.as_path(workdir)
    results: dict[str, Result] = {}
    variables = None
    for name in config.stages:
        stage_workdir = workdir_lib.stage_directory(config, name, directory)
        stage = probes.attach(problem, problem.stage(name, start=variables), stage_workdir)
        stage = inspected(stage)
        # Only the stage may refer to its initial variables, so that it can release them.
        variables = None
        result = loop.run(
            stage,
            workdir=stage_workdir,
            config=config,
            may_change=problems.may_change(config),
            profile=profile,
        )
        assert result.carry is not None
        variables = problem.variables(stage, result.carry.learner)
        steps = "env_steps" if result.counters.env_steps else "updates"
        draw_curves(stage_workdir, x=f"progress/{steps}")
        if name != config.stages[-1] and not result.interrupted:
            # The memory of this stage is released before the next one allocates its own.
            result, stage = dataclasses.replace(result, carry=None), None
        results[name] = result
        if result.interrupted:
            break
    trained = Trained(problem, results, variables)
    if trained.interrupted:
        return trained
    if split := problem.test_split:
        with report.tolerate_errors("The evaluation of the test split"):
            measured = problem.measure()(variables, split)
            test_metrics = {f"eval/{split}/{name}": x for name, x in measured.items()}
            trained = dataclasses.replace(trained, test_metrics=test_metrics)
    with report.tolerate_errors("Writing samples.html"):
        samples = problem.samples(variables, SAMPLES)
        if samples and multihost.is_primary():
            report.sample_table(directory / "samples.html", samples, f"{directory.name}: samples")
    if multihost.is_primary():
        with report.tolerate_errors("Writing summary.json"):
            final = summary_lib.final_evaluation(directory, trained.test_metrics)
            totals = summary_lib.totals(results.values(), started)
            summary_lib.write_json(directory / "summary.json", final | totals)
    return trained


def draw_curves(workdir: epath.Path, *, x: str) -> None:
    """Writes the learning_curves.png of a stage, unless it was stopped before it logged a row.

    Args:
      workdir: Working directory of the stage.
      x: Name of the metric on the horizontal axis.
    """
    path = workdir / metrics.JSONL_NAME
    with report.tolerate_errors("Drawing learning_curves.png"):
        if multihost.is_primary() and metrics.read_jsonl(path):
            report.learning_curves(path, workdir / "learning_curves.png", x=x)
