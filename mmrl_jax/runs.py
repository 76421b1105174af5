"""Training, loading and evaluation of runs, given a config and a working directory.

    config = mmrl_jax.get_config("reach_ppo")
    trained = mmrl_jax.train(config, "runs/reach")
    loaded = mmrl_jax.load("runs/reach")

A run can be stopped at any time; the same call resumes it from its newest checkpoint.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json
import time
import types
from typing import Any, NamedTuple, NoReturn

from etils import epath
import jax
import ml_collections

from mmrl_jax import envs, probes, problems
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config import load_config, to_json
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost, partition
from mmrl_jax.monitoring import loggers, metrics
from mmrl_jax.problems import Problem, completion
from mmrl_jax.problems.control import Control
from mmrl_jax.problems.text_agent import TextAgent
from mmrl_jax.problems.token_problem import TokenProblem
from mmrl_jax.reporting import explanation, report
from mmrl_jax.reporting import summary as summary_lib
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.rollouts.unroll import PolicyFunction
from mmrl_jax.training import checkpoint, fingerprints, loop, provenance
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


def stage_directory(
    config: ml_collections.ConfigDict, name: str, workdir: workdir_lib.PathLike
) -> epath.Path:
    """Returns the directory of a stage: `workdir` for the last stage, else <workdir>/<name>."""
    directory = workdir_lib.as_path(workdir)
    return directory if name == config.stages[-1] else directory / name


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
    directories = {name: stage_directory(config, name, directory) for name in config.stages}
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
        stage_workdir = stage_directory(config, name, directory)
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


def _raise_not_begun(
    config: ml_collections.ConfigDict, stage: str, directory: epath.Path
) -> NoReturn:
    """Raises ValueError for a stage without a checkpoint; it names an earlier one that has some."""
    earlier = {name: directory / name for name in config.stages if directory.name != name}
    begun = {name: workdir_lib.saved_steps(path) for name, path in earlier.items()}
    hints = [
        f" The stage {name!r} has one at update {steps[-1]}: give {earlier[name]}."
        for name, steps in begun.items()
        if steps
    ]
    raise ValueError(
        f"The stage {stage!r} of the run in {directory} has no checkpoint yet.{''.join(hints[-1:])}"
    )


class Loaded(NamedTuple):
    """A trained policy that was restored from its working directory.

    Attributes:
      problem: Problem of the run, with its environments or prompts.
      variables: Variables of the policy, see `problems.Problem.variables`.
      stage: Name of the stage whose checkpoint was restored.
      step: Number of updates of the checkpoint.
    """

    problem: Problem
    variables: Any
    stage: str
    step: int

    def __repr__(self) -> str:
        return (
            f"Loaded(stage={self.stage!r}, step={self.step}, splits={tuple(self.problem.splits)})"
        )

    def evaluate(self, split: str, *, episodes: int | None = None) -> dict[str, float]:
        """Returns the metrics of the policy on a split, with 95 % intervals.

        Args:
          split: Name of the split, one of problem.splits.
          episodes: Number of episodes, or prompts; None for that of the run's own evaluations.

        Raises:
          ValueError: If `episodes` is below 2.
        """
        if episodes is not None and episodes < 2:
            raise ValueError(f"episodes={episodes}, but an interval needs at least 2.")
        return self.problem.measure(episodes=episodes)(self.variables, split)

    def explain(self, split: str, *, episodes: int = 32) -> explanation.Explanation:
        """Explains a control policy on episodes of a split, see `reporting.explanation.explain`.

        Args:
          split: Name of the split, one of problem.splits.
          episodes: Number of episodes.
        """
        return explanation.explain(self.problem, self.variables, split, episodes=episodes)

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[completion.Image],
        *,
        num_completions: int = 1,
        sampling: Sampling = completion.GREEDY,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[list[completion.Completion]]:
        """Completes prompts about images with a token policy, see `completion.complete`.

        Args:
          prompts: Texts of N prompts.
          images: Image of each prompt: pixels uint8 [H, W, 3] of any size, the bytes of an encoded
            image, or the path of a file.
          num_completions: Number of completions of each prompt.
          sampling: How tokens are sampled; greedy by default.
          max_new_tokens: Maximum number of tokens of a completion; None for that of the run.
          seed: Seed of the sampling.

        Returns:
          The completions of each prompt.

        Raises:
          ValueError: If the run has no token policy, or an input is invalid.
        """
        if not isinstance(self.problem, TokenProblem):
            raise ValueError("The run has a control policy, which completes no prompts.")
        return completion.complete(
            self.problem,
            self.variables,
            prompts,
            images,
            num_completions=num_completions,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )

    def policy(self, *, deterministic: bool = True) -> PolicyFunction:
        """Returns the policy function for `rollouts.unroll`, of a problem with an environment.

        Args:
          deterministic: Whether actions are the most likely ones rather than sampled.

        Raises:
          ValueError: If the problem has no environment.
        """
        if not isinstance(self.problem, Control | TextAgent):
            raise ValueError(
                "The run has prompts and no environment, so that its policy has no actions; use "
                "`generate`."
            )
        return self.problem.policy(self.variables, deterministic=deterministic)


def read_problem(
    workdir: workdir_lib.PathLike,
    *,
    trust_modules: bool = False,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[Problem, str]:
    """Makes the problem of an existing run.

    The problem uses one device. If the run split its parameters over devices, and this machine has
    enough of them, it uses the devices over which one copy of the parameters is split. In a run of
    several processes it uses all devices.

    Args:
      workdir: Working directory of the run, or of one of its stages.
      trust_modules: Whether modules that the config names may be imported if they are not part of
        this package.
      changes: Nested dictionary of config keys with other values than in the run.

    Returns:
      The problem, and the name of the stage of the directory.

    Raises:
      ValueError: If there is no run, its config is invalid in this version, or it names modules
        that are not trusted.
    """
    directory = workdir_lib.as_path(workdir)
    config = workdir_lib.stored_config(directory)
    if config is None:
        raise ValueError(f"Workdir {directory} holds no run (no config.json that can be read).")
    modules = _modules(config)
    if modules and not trust_modules:
        raise ValueError(
            f"The run in {directory} names {', '.join(modules)}, which would be imported and run "
            "here. If you trust what these names find on this machine, add --trust_modules, or "
            "trust_modules=True in Python."
        )
    config = problems.complete(config)  # An earlier version may have had no mesh.
    available = jax.device_count()
    tensor = config.mesh.tensor if config.mesh.tensor <= available else 1
    # The parameters are split over as many of the run's devices as there are.
    counts = range(1, available // tensor + 1)
    fsdp = max(count for count in counts if config.mesh.fsdp % count == 0)
    mesh = {"data": 1 if jax.process_count() == 1 else 0, "fsdp": fsdp, "tensor": tensor}
    config = problems.complete(config, {"mesh": mesh}, changes)
    run = fingerprints.read(directory)
    return problems.make(config), config.stages[-1] if run is None else run.stage


def _modules(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the modules that a config names and that are not part of this package."""
    keys = {("rewards", "functions"), ("env", "name"), ("task", "name"), ("run", "probes")}
    modules = set(config.get("imports", ()))
    for group, key in keys:
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
      workdir: Working directory of the run, or of one of its stages, which may have been trained on
        any number of devices.
      which: Checkpoint to restore: 'latest', 'best' or a number of updates.
      trust_modules: Whether modules that the config names may be imported if they are not part of
        this package.
      accept: Names of inputs that may have changed since training, see `fingerprints.check`.
      changes: Nested dictionary of config keys with other values than in the run.

    Raises:
      ValueError: If the problem cannot be made, see `read_problem`, the checkpoint does not exist,
        or an input of the policy has changed.
      CheckpointDamaged: If the checkpoint cannot be read.
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
    """Restores a trained policy, without comparing the inputs of its run, see `load`.

    Args:
      problem: Problem of the run, see `read_problem`.
      stage: Name of the stage of the directory.
      workdir: Working directory of the stage.
      which: Checkpoint to restore: 'latest', 'best' or a number of updates.

    Raises:
      ValueError: If the checkpoint does not exist.
      CheckpointDamaged: If the checkpoint cannot be read.
    """
    directory = workdir_lib.as_path(workdir)
    root = directory if stage == problem.config.stages[-1] else directory.parent
    if not workdir_lib.saved_steps(directory):
        _raise_not_begun(problem.config, stage, directory)
    parts, step = {}, 0
    for name in problem.checkpoint_stages(stage):
        shapes = problem.checkpoint_parts(name)
        like = mesh_lib.placed_shapes(shapes, partition.shardings(shapes, problem.mesh))
        # A stage starts from the last checkpoint of the stage before it.
        chosen = which if name == stage else str(problem.config[name].num_updates)
        restored, step = checkpoint.restore_parts(
            directory if name == stage else stage_directory(problem.config, name, root),
            {f"learner/{part}": x for part, x in like.items()},
            which=int(chosen) if chosen.isdecimal() else chosen,
        )
        parts[name] = {part: restored[f"learner/{part}"] for part in like}
    return Loaded(problem, problem.from_checkpoint(parts), stage, step)
