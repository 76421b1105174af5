"""Sources of experience, and the stage that an algorithm and a source make together.

A source says what an update learns from. A traced source is part of the compiled update:

    carry -> source.collect -> batch -> algorithm.update -> carry

A host source is called between two compiled programs, as reward functions in Python are.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from mmrl_jax.config.options import build
from mmrl_jax.envs.brax_api import State
from mmrl_jax.learners import optimizers
from mmrl_jax.learners.optimizers import Optimizer, OptimizerOptions
from mmrl_jax.learners.registry import Algorithm
from mmrl_jax.training.stage import Carry, HostUpdate
from mmrl_jax.types import Metrics


class Collected(NamedTuple):
    """What a source gives an update.

    Attributes:
      env_state: Of all environments, after the experience; None without environments.
      batch: The experience, of the kind that the algorithm asks for.
      key: Key of the algorithm's own random numbers.
      metrics: What to log of the experience, float32 [] each.
    """

    env_state: State | None
    batch: Any
    key: jax.Array
    metrics: Metrics


class Constants(NamedTuple):
    """What every update of a stage is given, and none changes.

    Attributes:
      frozen: The variables that the stage does not train; () for control policies, whose learner
        holds all parameters.
      data: What the source draws from; None where it needs nothing.
    """

    frozen: Any
    data: Any


# (carry, constants, collected) -> (carry, metrics): the learning half of an update.
Learn = Callable[[Carry, Constants, Collected], tuple[Carry, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the experience of a stage comes from.

    Attributes:
      stream: Of the run's streams of random numbers, the one of the stage, see `problem.stream`.
      samples_per_update: Samples that an update learns from, for the rate on the console.
      env_steps_per_update: Steps of environments in an update, resets among them.
      data: What `collect` draws from, on the devices; it is in the constants of the stage.
      reset: Key -> states of all environments at the start of an episode; None without any.
      collect: (carry, constants) -> what the update learns from; traced.
      on_host: Instead of `collect`: the learning half of an update -> the stage's `on_host`.
      prepare: Learner -> learner with which a policy from scratch begins, as running statistics of
        a data set are computed beforehand.
      console: Metrics that the console shows.
    """

    stream: int
    samples_per_update: int
    env_steps_per_update: int = 0
    data: Any = None
    reset: Callable[[jax.Array], State] | None = None
    collect: Callable[[Carry, Constants], Collected] | None = None
    on_host: Callable[[Learn], Callable[[Carry, Any], HostUpdate]] | None = None
    prepare: Callable[[Any], Any] = lambda learner: learner
    console: tuple[str, ...] = ()


def update_keys(carry: Carry, count: int) -> jax.Array:
    """Returns the keys [count] of an update: those of its source, and as last the algorithm's."""
    return jax.random.split(jax.random.fold_in(carry.rng, carry.updates), count)


def fresh_carry(learner: Any, source: Source, rng: jax.Array) -> Carry:
    """Returns a carry with which a stage begins.

    Args:
      learner: The fresh learner.
      source: Where its experience comes from.
      rng: The key of the stage's stream.
    """
    env_state = None
    if source.reset is not None:
        # Not sharded: by batches of another size, other roundings would start the environments.
        env_state = jax.jit(source.reset)(jax.random.fold_in(rng, 0))
        rng = jax.random.fold_in(rng, 1)
    return Carry(learner, env_state, rng, jnp.zeros((), jnp.int32))


def make_optimizer(
    config: ml_collections.ConfigDict,
    name: str,
    options: Any,
    is_trained: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Optimizer:
    """Returns the optimizer of a stage, whose schedule runs over the steps of all its updates.

    Args:
      config: Of the run.
      name: Of the stage.
      options: The options of its algorithm.
      is_trained: See `optimizers.make`.
    """
    steps = config[name].num_updates * steps_per_update(options)
    return optimizers.make(
        build(OptimizerOptions, config[name].optimizer), steps, is_trained=is_trained
    )


def steps_per_update(options: Any) -> int:
    """Returns the optimizer steps of an update: epochs times minibatches, or else 1."""
    return getattr(options, "num_epochs", 1) * getattr(options, "num_minibatches", 1)


def make_learn(
    update: Callable[[Any, Constants, Any, jax.Array], tuple[Any, Metrics]], optimizer: Optimizer
) -> Learn:
    """Returns the learning half of an update.

    Args:
      update: (learner, constants, batch, key) -> (learner, metrics), of the algorithm.
      optimizer: Whose learning rate is logged.
    """

    def learn(carry: Carry, constants: Constants, collected: Collected) -> tuple[Carry, Metrics]:
        learner, metrics = update(carry.learner, constants, collected.batch, collected.key)
        metrics |= {"lr": jnp.asarray(optimizer.rate(learner.steps), jnp.float32)}
        return carry.replace(
            learner=learner, env_state=collected.env_state, updates=carry.updates + 1
        ), metrics

    return learn


def make_update(source: Source, learn: Learn) -> Callable[[Carry, Constants], tuple]:
    """Returns the traced update of a stage with a traced source."""
    assert source.collect is not None
    collect = source.collect

    def update(carry: Carry, constants: Constants) -> tuple[Carry, Metrics]:
        collected = collect(carry, constants)
        carry, metrics = learn(carry, constants, collected)
        return carry, metrics | collected.metrics

    return update


def stage_fields(
    config: ml_collections.ConfigDict, name: str, algorithm: Algorithm, source: Source, best: str
) -> dict[str, Any]:
    """Returns the fields of a `Stage` that do not depend on the kind of problem.

    Args:
      config: Of the run.
      name: Of the stage.
      algorithm: Of the stage.
      source: Of the stage.
      best: The metric by which the best checkpoint is chosen.
    """
    names = ("num_updates", "updates_per_dispatch", "eval_interval", "checkpoint_interval")
    return {field: config[name][field] for field in names} | {
        "name": name,
        "max_to_keep": config.run.max_to_keep,
        "env_steps_per_update": source.env_steps_per_update,
        "samples_per_update": source.samples_per_update,
        "best_metric": best,
        "console": (*algorithm.console, *source.console, best, "time/samples_per_s"),
    }
