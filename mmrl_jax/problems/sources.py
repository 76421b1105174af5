"""Sources of experience, and the construction of a stage from an algorithm and a source.

A source provides the batch of an update. A traced source is part of the compiled update:

    carry -> source.collect -> batch -> algorithm.update -> carry

A host source runs between two compiled programs, for example to call reward functions in Python.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from mmrl_jax.config.options import build
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.envs.brax_api import State
from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import Optimizer, OptimizerOptions
from mmrl_jax.learners.registry import Algorithm
from mmrl_jax.problems import problem
from mmrl_jax.stability import learning_rate
from mmrl_jax.stability.divergence import RollbackOptions
from mmrl_jax.stability.learning_rate import AdaptiveKLOptions
from mmrl_jax.training.dispatch import TRANSIENT
from mmrl_jax.training.prefetch import Prefetch
from mmrl_jax.training.stage import Carry, HostUpdate
from mmrl_jax.types import Metrics

# Names of the two parts of an update, which a profile and `planning` show.
ROLLOUT, LEARNING = "rollout", "learning"


class Collected(NamedTuple):
    """Experience that a source has collected for an update.

    Attributes:
      env_state: State of all environments after the experience; None without environments.
      batch: Experience, of the type that the algorithm learns from.
      key: PRNG key for the algorithm.
      metrics: Metrics of the experience by their names, float32 [] each.
    """

    env_state: State | None
    batch: Any
    key: jax.Array
    metrics: Metrics


class Constants(NamedTuple):
    """Arrays that all updates of a stage read and none changes.

    Attributes:
      frozen: Variables that the stage does not train; () for control policies, whose learner has
        all parameters.
      data: Data set of the source; None if it has none.
    """

    frozen: Any
    data: Any


# The learning part of an update: (carry, constants, collected) -> (carry, metrics).
Learn = Callable[[Carry, Constants, Collected], tuple[Carry, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Source of the experience of a stage.

    Attributes:
      stream: Number of the stage's stream of random numbers, see `problem.stream`.
      samples_per_update: Number of samples in an update, for the rate on the console.
      env_steps_per_update: Number of environment steps in an update, including resets.
      data: Data set from which `collect` samples; it becomes part of the constants of the stage.
      reset: PRNG key -> states of all environments at the start of an episode; None without
        environments.
      collect: (carry, constants) -> experience of an update; traced. None for a host source.
      on_host: Learning part of an update -> `Stage.on_host`; None for a traced source.
      prepare: Changes the learner of a policy from scratch before training, for example to compute
        the normalizer from the data set.
      in_flight: Shapes of `Carry.in_flight`; None if an update samples its own experience.
      console: Names of the metrics that the console shows.
    """

    stream: int
    samples_per_update: int
    env_steps_per_update: int = 0
    data: Any = None
    reset: Callable[[jax.Array], State] | None = None
    collect: Callable[[Carry, Constants], Collected] | None = None
    on_host: Callable[[Learn], Callable[[Carry, Any], HostUpdate]] | None = None
    prepare: Callable[[Any], Any] = lambda learner: learner
    in_flight: Any = None
    console: tuple[str, ...] = ()


def update_keys(carry: Carry, count: int) -> jax.Array:
    """Returns the PRNG keys [count] of an update, of which the last is for the algorithm."""
    return jax.random.split(jax.random.fold_in(carry.rng, carry.updates), count)


def fresh_carry(learner: Any, source: Source, rng: jax.Array) -> Carry:
    """Returns the initial carry of a stage.

    Args:
      learner: Initial learner.
      source: Source of the stage's experience.
      rng: PRNG key of the stage's stream.
    """
    env_state = None
    if source.reset is not None:
        # The reset is not sharded, because rounding differs between batch sizes, and initial states
        # must not depend on the number of devices.
        env_state = jax.jit(source.reset)(jax.random.fold_in(rng, 0))
        rng = jax.random.fold_in(rng, 1)
    in_flight = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), source.in_flight)
    return Carry(learner, env_state, rng, jnp.zeros((), jnp.int32), in_flight)


def make_optimizer(
    config: ml_collections.ConfigDict,
    name: str,
    options: Any,
    is_trained: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Optimizer:
    """Returns the optimizer of a stage, whose schedule covers the steps of all updates.

    Args:
      config: Config of the run.
      name: Name of the stage.
      options: Options of the algorithm of the stage.
      is_trained: Returns whether the parameter at a path is trained, see `optimizers.make`; None
        if all are.
    """
    steps = config[name].num_updates * steps_per_update(options)
    return optimizers.make(
        build(OptimizerOptions, config[name].optimizer),
        steps,
        is_trained=is_trained,
        scalable=config[name].rollback.max_retries > 0,
        adaptive=options if isinstance(options, AdaptiveKLOptions) else None,
    )


def steps_per_update(options: Any) -> int:
    """Returns the number of optimizer steps of an update: epochs times minibatches, or else 1."""
    return getattr(options, "num_epochs", 1) * getattr(options, "num_minibatches", 1)


def make_learn(
    update: Callable[[Any, Constants, Any, jax.Array], tuple[Any, Metrics]], optimizer: Optimizer
) -> Learn:
    """Returns the learning part of an update.

    Args:
      update: Update of the algorithm, (learner, constants, batch, key) -> (learner, metrics).
      optimizer: Optimizer whose learning rate is logged.
    """

    def learn(carry: Carry, constants: Constants, collected: Collected) -> tuple[Carry, Metrics]:
        learner, metrics = update(carry.learner, constants, collected.batch, collected.key)
        rate = jnp.asarray(optimizer.rate(learner.steps), jnp.float32)
        scale = learning_rate.scale_of(learner.opt_state)
        metrics |= {"lr": rate if scale is None else rate * scale}
        return carry.replace(
            learner=learner, env_state=collected.env_state, updates=carry.updates + 1
        ), metrics

    return learn


def batches_on_host(
    read: Callable[[int], Any], *, num_updates: int, mesh: Mesh
) -> Callable[[Learn], Callable[[Carry, Any], HostUpdate]]:
    """Returns `Source.on_host` of a source that only reads batches, one batch ahead.

    Args:
      read: Returns the batch of an update on the devices, which depends on the number of the update
        alone.
      num_updates: Number of updates of the stage.
      mesh: Device mesh.
    """

    def on_host(learn: Learn) -> Callable[[Carry, Any], HostUpdate]:
        def step(carry: Carry, constants: Constants, batch: Any) -> tuple[Carry, Metrics]:
            return learn(carry, constants, Collected(None, batch, update_keys(carry, 1)[0], {}))

        def compiled(carry: Carry, constants: Constants) -> HostUpdate:
            replicated = mesh_lib.replicated(mesh)
            shardings = problem.shard_carry(carry, mesh=mesh), replicated
            jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
            lowered = jitted.lower(carry, constants, multihost.on_all(lambda: read(0)))
            program, batches = lowered.compile(), Prefetch(read, updates=num_updates)

            def collect(carry: Carry, _: Any) -> Any:
                update = int(jax.device_get(carry.updates))
                return multihost.on_all(lambda: batches(update), transient=TRANSIENT)

            shapes = mesh_lib.placed_shapes(lowered.out_info[1], replicated)
            return HostUpdate(collect, program, shapes)

        return compiled

    return on_host


def make_update(source: Source, learn: Learn) -> Callable[[Carry, Constants], tuple]:
    """Returns the traced update of a stage with a traced source."""
    assert source.collect is not None
    collect = source.collect

    def update(carry: Carry, constants: Constants) -> tuple[Carry, Metrics]:
        with jax.named_scope(ROLLOUT):
            collected = collect(carry, constants)
        with jax.named_scope(LEARNING):
            carry, metrics = learn(carry, constants, collected)
        return carry, metrics | collected.metrics

    return update


def stage_fields(
    config: ml_collections.ConfigDict, name: str, algorithm: Algorithm, source: Source, best: str
) -> dict[str, Any]:
    """Returns the fields of a `Stage` that do not depend on the kind of problem.

    Args:
      config: Config of the run.
      name: Name of the stage.
      algorithm: Algorithm of the stage.
      source: Source of the stage's experience.
      best: Name of the metric by which the best checkpoint is chosen.
    """
    names = ("num_updates", "updates_per_dispatch", "eval_interval", "checkpoint_interval")
    return {field: config[name][field] for field in names} | {
        "name": name,
        "max_to_keep": config.run.max_to_keep,
        "rollback": build(RollbackOptions, config[name].rollback),
        "env_steps_per_update": source.env_steps_per_update,
        "samples_per_update": source.samples_per_update,
        "best_metric": best,
        "console": (*algorithm.console, *source.console, best, "time/samples_per_s"),
    }
