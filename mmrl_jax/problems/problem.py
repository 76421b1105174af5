"""The interface of problems, and the options and random streams that all problems have.

A problem is made once from a config, which no other code reads afterwards. It has the policy, the
sources of experience, the splits and the evaluation of a run, and builds the stages of the run:

    problem = problems.make(config)
    for name in config.stages:                      # ("bc", "ppo"), ("sft", "grpo"), ...
        stage = problem.stage(name, start=variables)
        variables = loop.run(stage, ...)
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
import ml_collections

from mmrl_jax.config.options import (
    NON_NEGATIVE,
    PATTERN,
    POSITIVE,
    TEXTS,
    Group,
    Valid,
    at_least,
    between,
    build,
    group,
    option,
    options_of,
)
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.evaluation.prompts import Sample
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.monitoring.loggers import LOGGERS
from mmrl_jax.rollouts.unroll import PolicyFunction
from mmrl_jax.stability.divergence import RollbackOptions
from mmrl_jax.training.stage import Carry, Stage

# Numbers of a run's streams of random numbers. The key of a stream is
# fold_in(PRNGKey(seed), number).
PARAMETERS, DATA, FIXED_SET, COMPLETIONS, ROLLOUT, EVALUATION, LATER_LABELS = range(7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Options of the group `mesh`: the number of devices of each mesh axis."""

    data: int = option(
        0,
        "Number of groups of devices, each of which holds all parameters and learns from its share "
        "of a batch; 0 for as many as the other axes leave.",
        NON_NEGATIVE,
    )
    fsdp: int = option(
        1,
        "Number of devices in a group over which its parameters and its samples are split; a "
        "matrix is gathered when it is used.",
        POSITIVE,
    )
    tensor: int = option(
        1,
        "Number of devices over which each matrix product is split, for the same samples.",
        POSITIVE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the group `run`, which affect reports and checkpoints but not what is learned."""

    eval_episodes: int = option(
        512, "Number of episodes, or prompts, in an evaluation during training.", POSITIVE
    )
    max_to_keep: int = option(
        2,
        "Number of newest checkpoints that are kept in addition to the best.",
        at_least(2, "so that a run can fall back to an earlier one if the newest is damaged"),
    )
    loggers: tuple[str, ...] = option(
        ("tensorboard",),
        f"Loggers of metrics in addition to metrics.jsonl, any of {', '.join(LOGGERS)}.",
        Valid(lambda x: set(x) <= set(LOGGERS), f"a subset of {', '.join(LOGGERS)}"),
    )
    probes: tuple[str, ...] = option(
        (),
        "Further measurements during training: names in mmrl_jax.probes.PROBES, or "
        "'module:function' for your own.",
        TEXTS,
    )
    probe_interval: int = option(100, "Number of updates between two calls of a probe.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options that the groups of all stages have."""

    num_updates: int = option(100, "Number of updates after which the stage ends.", POSITIVE)
    updates_per_dispatch: int = option(1, "Number of updates in one compiled call.", POSITIVE)
    eval_interval: int = option(
        50,
        "Number of updates between two evaluations; a stage is also evaluated before its first "
        "update.",
        POSITIVE,
    )
    checkpoint_interval: int = option(50, "Number of updates between two checkpoints.", POSITIVE)
    trainable: str = option(
        ".*",
        "Regular expression that matches the full paths of the variables to train, params/... or "
        "lora/...; the other variables are frozen.",
        PATTERN,
    )
    optimizer: OptimizerOptions = group(OptimizerOptions)
    rollback: RollbackOptions = group(RollbackOptions)


# Keys of a stage that a resumed run may change: its length and the frequency of its reports.
MAY_CHANGE = ("num_updates", "updates_per_dispatch", "eval_interval", "checkpoint_interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """Options that the configs of all problems have."""

    # PRNGKey truncates a larger seed to 32 bits.
    seed: int = option(0, "Seed of all random numbers of the run.", between(0, 2**32 - 1))
    problem: str = option(dataclasses.MISSING, "Kind of problem.")
    stages: tuple[str, ...] = option(
        dataclasses.MISSING, "Algorithms with which the policy is trained, in order.", TEXTS
    )
    imports: tuple[str, ...] = option(
        (),
        "Your own modules that are imported first, to register algorithms and metrics.",
        TEXTS,
    )
    mesh: MeshOptions = group(MeshOptions)
    run: RunOptions = group(RunOptions)


class Problem(Protocol):
    """Interface of a problem: a policy, the sources of its experience, and its evaluation.

    Attributes:
      config: Config of the run, complete and checked.
      mesh: Device mesh.
      splits: Number of episodes, or prompts, in the run's own evaluations by the name of the split;
        of prompts from files, it is known after `open_data`.
      best_metric: Name of the metric by which the best checkpoint is chosen.
      test_split: Name of a split that is evaluated once, with the final policy, for the summary;
        None if the summary reports the last evaluation during training.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    splits: Mapping[str, int]
    best_metric: str
    test_split: str | None

    def open_data(self) -> None:
        """Opens and checks files that only training and evaluation read; they are opened once.

        Raises:
          ValueError: If the files cannot be used.
        """

    def dependencies(self, *, of_policy: bool = False) -> dict[str, str]:
        """Returns the fingerprints of the inputs of the run other than its config.

        Args:
          of_policy: Whether to leave out the inputs that the policy was trained on but does not
            need, such as the records of a dataset, which take time to read.
        """

    def stage(self, name: str, /, *, start: Any = None) -> Stage:
        """Returns a stage of the run.

        Args:
          name: Name of the stage, one of config.stages.
          start: Variables with which the previous stage ended, see `variables`; None for the first
            stage.
        """

    def variables(self, stage: Stage, learner: Any) -> Any:
        """Returns all variables of the policy, from the learner of a stage."""

    def checkpoint_parts(self, name: str) -> dict[str, Any]:
        """Returns shapes and dtypes of the parts of a stage's learner that the policy needs."""

    def checkpoint_stages(self, name: str) -> tuple[str, ...]:
        """Returns the stages whose checkpoints are needed to restore the policy of a stage."""

    def from_checkpoint(self, parts: dict[str, dict[str, Any]]) -> Any:
        """Returns the variables of a policy, see `variables`, from parts of checkpoints.

        Args:
          parts: Restored parts, see `checkpoint_parts`, by the name of the stage, for all stages in
            `checkpoint_stages`.
        """

    def policy(self, variables: Any, *, deterministic: bool = True) -> PolicyFunction:
        """Returns the policy function for `rollouts.unroll`, of a problem with an environment."""

    def samples(self, variables: Any, count: int) -> list[Sample]:
        """Returns sample completions for the report.

        Args:
          variables: Variables of the policy.
          count: Maximum number of samples. Problems with an environment return no samples.
        """

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Any, str], dict[str, float]]:
        """Returns the reported evaluation, a function (variables, split) -> metrics.

        Args:
          episodes: Number of episodes, or prompts, in an evaluation; None for those of `splits`.
          ablations: Whether to measure also with each modality shuffled, as
            'shuffled_<modality>/<metric>'. Tasks always measure it, for images.
        """


def stream(config: ml_collections.ConfigDict, number: int) -> jax.Array:
    """Returns the PRNG key of one of a run's streams of random numbers."""
    return jax.random.fold_in(jax.random.PRNGKey(config.seed), number)


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """Returns the device mesh of a run.

    Raises:
      ValueError: If the config needs more devices than there are.
    """
    m, available = config.mesh, len(mesh_lib.available_devices())
    data = m.data or available // (m.fsdp * m.tensor)
    if not 1 <= data * m.fsdp * m.tensor <= available:
        raise ValueError(
            f"mesh.data={m.data}, mesh.fsdp={m.fsdp}, mesh.tensor={m.tensor}: JAX sees {available} "
            "devices. Lower a number; mesh.data=0 uses all devices that the other axes leave."
        )
    sizes = {mesh_lib.DATA: data, mesh_lib.FSDP: m.fsdp, mesh_lib.TENSOR: m.tensor}
    if jax.process_count() > 1 and math.prod(sizes.values()) != available:
        raise ValueError(
            f"mesh.data={m.data}, mesh.fsdp={m.fsdp}, mesh.tensor={m.tensor} leaves some of the "
            f"{available} devices of {jax.process_count()} processes without work, but each "
            "process must take part; set mesh.data=0, and the others so that they divide "
            f"{available}."
        )
    return mesh_lib.make_mesh(math.prod(sizes.values()), sizes)


def stage_names(config: Any, algorithms: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the stages of a config.

    Args:
      config: Config of the run, in which keys may be missing.
      algorithms: Algorithms by their names with which the policy of the problem can be trained.

    Raises:
      ValueError: If there is no stage, a stage is unknown, or a stage occurs twice.
    """
    names = config.get("stages") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in algorithms]
    if not names or unknown or len(set(names)) < len(names):
        raise ValueError(
            f"Config key 'stages' is {names!r}, but must be one or more of "
            f"{', '.join(map(repr, algorithms))}, without duplicates."
        )
    return names


def check_algorithm(config: ml_collections.ConfigDict, name: str, algorithm: Any) -> None:
    """Checks the options of a stage against each other.

    Args:
      config: Config of the run.
      name: Name of the stage.
      algorithm: Algorithm of the stage, see `registry.Algorithm`.

    Raises:
      ValueError: If options contradict each other.
    """
    g = config[name]
    options = build(algorithm.options, g)
    algorithm.check(
        options, build(OptimizerOptions, g.optimizer), build(RollbackOptions, g.rollback), name
    )


def check_divisible(sizes: Mapping[str, int], mesh: Mesh) -> None:
    """Checks that numbers of samples are divisible by the number of parts of a batch.

    Args:
      sizes: Numbers of samples by their names in the config.
      mesh: Device mesh, which splits a batch into `mesh.batch_shards` parts.

    Raises:
      ValueError: If a size is not divisible.
    """
    parts = mesh_lib.batch_shards(mesh)
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"mesh.data * mesh.fsdp = {parts} does not divide {name} = {size}; change one of "
                "them."
            )


def options_of_problem(*kinds: type, **groups: Group) -> dict[str, Any]:
    """Returns the keys of a problem: those of all problems, of more dataclasses, and of groups."""
    return {**options_of(ProblemOptions, *kinds), **groups}


def shard_carry(carry: Carry, *, mesh: Mesh) -> Carry:
    """Returns the shardings of a carry.

    Environments and completions are split like samples, see `distributed.mesh`. Parameters,
    optimizer state and reference are split by the rules of `distributed.partition`.
    """
    replicated = jax.tree.map(lambda _: mesh_lib.replicated(mesh), carry)
    by_env, in_flight = mesh_lib.env_shardings((carry.env_state, carry.in_flight), mesh)
    learner = shard_learner(carry.learner, mesh)
    return replicated.replace(env_state=by_env, learner=learner, in_flight=in_flight)


def shard_learner(learner: Any, mesh: Any) -> Any:
    """Returns the shardings of a learner; what it has beside the policy is small and replicated."""
    extras = jax.tree.map(lambda _: mesh_lib.replicated(mesh), learner.extras)
    return partition.shardings(learner, mesh).replace(extras=extras)
