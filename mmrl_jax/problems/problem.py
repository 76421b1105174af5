"""What all problems share: their options, the seeds of their random streams, and their interface.

A problem is made once from a config, and the config ends there: it holds the policy, the sources of
experience, the splits and the evaluation of a run, and builds the run's stages.

    problem = problems.make(config)
    for name in config.stages:                      # ("bc", "ppo"), ("sft", "grpo"), ...
        stage = problem.stage(name, start=variables)
        variables = loop.run(stage, ...)
"""

from collections.abc import Callable, Mapping
import dataclasses
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
    group,
    option,
    options_of,
)
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.questions import Sample
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.monitoring.loggers import LOGGERS
from mmrl_jax.rollouts.unroll import PolicyFunction
from mmrl_jax.training.stage import Carry, Stage

# Streams of random numbers of a run: each is fold_in(PRNGKey(seed), number).
PARAMETERS, DATA, FIXED_SET, COMPLETIONS, ROLLOUT, EVALUATION = range(6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """The group `mesh`: how many devices each axis of the mesh has."""

    data: int = option(
        0, "Devices that batches are split over; 0 for all that the other axes leave.", NON_NEGATIVE
    )
    fsdp: int = option(1, "Devices that parameters are split over, by their input axes.", POSITIVE)
    tensor: int = option(1, "Devices that matrix products are split over.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The group `run`: what a run reports and keeps, without an effect on what it learns."""

    eval_episodes: int = option(
        512, "Episodes, or prompts, of an evaluation during training.", POSITIVE
    )
    max_to_keep: int = option(
        2,
        "Number of newest checkpoints that are kept beside the best.",
        at_least(2, "so that a damaged checkpoint has one before it"),
    )
    loggers: tuple[str, ...] = option(
        ("tensorboard",),
        f"Where metrics go beside metrics.jsonl, any of {', '.join(LOGGERS)}.",
        Valid(lambda x: set(x) <= set(LOGGERS), f"some of {', '.join(LOGGERS)}"),
    )
    probes: tuple[str, ...] = option(
        (),
        "What else is measured during training: names of mmrl_jax.probes.PROBES, or "
        "'module:function' for one of yours.",
        TEXTS,
    )
    probe_interval: int = option(100, "Updates between two calls of the probes.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What the group of every stage has, whatever it learns with."""

    num_updates: int = option(100, "Update at which the stage ends.", POSITIVE)
    updates_per_dispatch: int = option(1, "Updates in one compiled call.", POSITIVE)
    eval_interval: int = option(
        50,
        "Updates between two evaluations; there is one before the first update too.",
        POSITIVE,
    )
    checkpoint_interval: int = option(50, "Updates between two checkpoints.", POSITIVE)
    trainable: str = option(
        ".*",
        "Regular expression of the whole paths of the variables that are trained, params/... or "
        "lora/...; the others are frozen.",
        PATTERN,
    )
    optimizer: OptimizerOptions = group(OptimizerOptions)


# What a resumed run may change: how long it continues and how often it reports.
MAY_CHANGE = ("num_updates", "updates_per_dispatch", "eval_interval", "checkpoint_interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """The keys that the configs of all problems have."""

    # A larger seed would begin the same streams as what is left of it in 32 bits.
    seed: int = option(0, "Seed of every random number of the run.", between(0, 2**32 - 1))
    problem: str = option(dataclasses.MISSING, "Kind of problem.")
    stages: tuple[str, ...] = option(
        dataclasses.MISSING, "Algorithms that the policy is trained with, in order.", TEXTS
    )
    imports: tuple[str, ...] = option(
        (), "Modules of yours that are imported first: they register algorithms and metrics.", TEXTS
    )
    mesh: MeshOptions = group(MeshOptions)
    run: RunOptions = group(RunOptions)


class Problem(Protocol):
    """A policy, where its experience comes from, and how it is evaluated.

    Attributes:
      config: Of the run; complete and checked.
      mesh: The devices.
      splits: The splits of the problem, and the number of episodes, or prompts, that the run's own
        evaluations have of each.
      best_metric: The metric by which the best checkpoint is chosen.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    splits: Mapping[str, int]
    best_metric: str

    def dependencies(self) -> dict[str, str]:
        """Returns the fingerprints of what the run depends on beside its config."""

    def stage(self, name: str, /, *, start: Any = None) -> Stage:
        """Returns a stage of the run.

        Args:
          name: One of config.stages.
          start: What the stage before it ended with, as `variables` gives it; None for the first.
        """

    def variables(self, stage: Stage, learner: Any) -> Any:
        """Returns what a policy acts with, from the learner of a stage."""

    def stored(self, name: str) -> dict[str, Any]:
        """Returns the parts of a stage's learner that a policy acts with, as shapes."""

    def restored_from(self, name: str) -> tuple[str, ...]:
        """Returns the stages whose checkpoints hold what a policy of this stage acts with."""

    def restored(self, parts: dict[str, dict[str, Any]]) -> Any:
        """Returns what a policy acts with, see `variables`.

        Args:
          parts: Stage -> what `stored` names, of the stages of `restored_from`.
        """

    def policy(self, variables: Any, *, deterministic: bool = True) -> PolicyFunction:
        """Returns the policy, of a problem with an environment, for `rollouts.unroll`."""

    def samples(self, variables: Any, count: int) -> tuple[list[Sample], dict[str, float]]:
        """Returns what a policy answers, for people to read, and the metrics of a test split.

        Args:
          variables: What it acts with.
          count: The most samples; there are none where no prompt shows what a policy does.
        """

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Any, str], dict[str, float]]:
        """Returns the reported evaluation: (variables, split) -> metrics.

        Args:
          episodes: Episodes, or prompts, of an evaluation; by default those of `splits`.
          ablations: Measure also with each modality shuffled in turn, as
            'shuffled_<modality>/<metric>'. Verifiable questions always are, prompts from files
            never: their reward functions would be called twice.
        """


def stream(config: ml_collections.ConfigDict, number: int) -> jax.Array:
    """Returns the key of one of a run's streams of random numbers."""
    return jax.random.fold_in(jax.random.PRNGKey(config.seed), number)


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """Returns the mesh of a run.

    Raises:
      ValueError: There are fewer devices than the config asks for.
    """
    m, available = config.mesh, jax.device_count()
    data = m.data or available // (m.fsdp * m.tensor)
    if not 1 <= data * m.fsdp * m.tensor <= available:
        raise ValueError(
            f"mesh.data={m.data}, mesh.fsdp={m.fsdp}, mesh.tensor={m.tensor}: JAX sees {available} "
            "devices. Lower a number; mesh.data=0 takes what the others leave."
        )
    if m.fsdp * m.tensor > 1:
        raise ValueError(
            f"mesh.fsdp={m.fsdp}, mesh.tensor={m.tensor}: parameters are not split over devices by "
            "training yet; set both to 1."
        )
    return mesh_lib.make_mesh(data)


def stage_names(config: Any, algorithms: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the stages of a config.

    Args:
      config: Of the run; may lack keys.
      algorithms: Those that the problem's policy can be trained with, by name.

    Raises:
      ValueError: There is no stage, one is unknown, or one is named twice.
    """
    names = config.get("stages") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in algorithms]
    if not names or unknown or len(set(names)) < len(names):
        raise ValueError(
            f"Config key 'stages' is {names!r}, but must name algorithms, each once, of "
            f"{', '.join(map(repr, algorithms))}."
        )
    return names


def check_divisible(sizes: Mapping[str, int], devices: int) -> None:
    """Checks that the devices divide sizes, which are given by their names in the config.

    Raises:
      ValueError: They do not divide one of them.
    """
    for name, size in sizes.items():
        if size % devices:
            raise ValueError(
                f"{devices} devices do not divide {name} = {size}; change it, or set mesh.data."
            )


def options_of_problem(*kinds: type, **groups: Group) -> dict[str, Any]:
    """Returns the keys of a problem: those of all, of further dataclasses, and groups."""
    return {**options_of(ProblemOptions, *kinds), **groups}


def shard_carry(carry: Carry, *, mesh: Mesh) -> Carry:
    """Returns shardings of a carry: environments over the data axis, the rest replicated."""
    replicated = jax.tree.map(lambda _: mesh_lib.replicated(mesh), carry)
    # XLA replicates arrays without elements, whatever is asked for.
    by_env = jax.tree.map(
        lambda x: mesh_lib.batch_sharding(mesh, 0) if x.size else mesh_lib.replicated(mesh),
        carry.env_state,
    )
    return replicated.replace(env_state=by_env)
