"""Loading of trained policies from their working directories.

loaded = mmrl_jax.load("runs/reach")
loaded.evaluate("train")
"""

from collections.abc import Collection, Mapping, Sequence
import types
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections

from mmrl_jax import envs, problems
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.problems import Problem, completion
from mmrl_jax.problems.control import Control
from mmrl_jax.problems.text_agent import TextAgent
from mmrl_jax.problems.token_problem import TokenProblem
from mmrl_jax.reporting import explanation
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.rollouts.unroll import PolicyFunction
from mmrl_jax.training import checkpoint, fingerprints


def _check_begun(config: ml_collections.ConfigDict, stage: str, directory: epath.Path) -> None:
    """Raises ValueError for a stage without a checkpoint; it names an earlier one that has some.

    Args:
      config: Config of the run.
      stage: Name of the stage.
      directory: Directory of the stage, which may have been copied without those of the others.
    """
    if workdir_lib.saved_steps(directory):
        return
    root = directory if stage == config.stages[-1] else directory.parent
    hint = ""
    for name in config.stages[: list(config.stages).index(stage)]:
        earlier = workdir_lib.stage_directory(config, name, root)
        if steps := workdir_lib.saved_steps(earlier):
            hint = f" The stage {name!r} has one at update {steps[-1]}: give {earlier}."
    raise ValueError(f"The stage {stage!r} of the run in {root} has no checkpoint yet.{hint}")


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
        stop_strings: Sequence[str] = (),
        sort_by: completion.Order | None = None,
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
          stop_strings: Texts any of which ends a completion, which is truncated before it.
          sort_by: 'log_prob' or 'mean_log_prob' to sort the completions of each prompt by it, the
            largest first; None for the order in which they were sampled.

        Returns:
          The completions of each prompt.

        Raises:
          ValueError: If the run has no token policy, or an input is invalid.
        """
        return completion.complete(
            self._token_problem(),
            self.variables,
            prompts,
            images,
            num_completions=num_completions,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop_strings=stop_strings,
            sort_by=sort_by,
        )

    def choose(
        self,
        prompts: Sequence[str],
        images: Sequence[completion.Image],
        choices: Sequence[str],
    ) -> list[list[completion.Choice]]:
        """Computes the probabilities of given completions, see `completion.choose`.

        Args:
          prompts: Texts of N prompts.
          images: Image of each prompt, see `generate`.
          choices: Texts of the completions, at least 2.

        Returns:
          The choices of each prompt, the most likely one first.

        Raises:
          ValueError: If the run has no token policy, or an input is invalid.
        """
        return completion.choose(self._token_problem(), self.variables, prompts, images, choices)

    def _token_problem(self) -> TokenProblem:
        if not isinstance(self.problem, TokenProblem):
            raise ValueError("The run has a control policy, which completes no prompts.")
        return self.problem

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
      The problem, whose records of a dataset are opened when they are first used, and the name of
      the stage of the directory.

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
    problem = problems.make(config, open_data=False)
    return problem, config.stages[-1] if run is None else run.stage


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
    fingerprints.check(directory, problem.dependencies(of_policy=True), accept=accept)
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
    _check_begun(problem.config, stage, directory)
    parts, step = {}, 0
    for name in problem.checkpoint_stages(stage):
        shapes = problem.checkpoint_parts(name)
        like = mesh_lib.placed_shapes(shapes, partition.shardings(shapes, problem.mesh))
        # A stage starts from the last checkpoint of the stage before it.
        chosen = which if name == stage else str(problem.config[name].num_updates)
        restored, step = checkpoint.restore_parts(
            directory if name == stage else workdir_lib.stage_directory(problem.config, name, root),
            {f"learner/{part}": x for part, x in like.items()},
            which=int(chosen) if chosen.isdecimal() else chosen,
        )
        parts[name] = {part: restored[f"learner/{part}"] for part in like}
    return Loaded(problem, problem.from_checkpoint(parts), stage, step)
