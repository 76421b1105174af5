"""Sources of the experience of a control policy: rollouts, alone or beside demonstrations."""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.config.options import POSITIVE, group, option
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.learners.bc import Batch
from mmrl_jax.learners.dapg import DemonstratedRollout
from mmrl_jax.learners.learner import Apply, Rollout, policy_function
from mmrl_jax.problems import problem
from mmrl_jax.problems.demonstrations import DemonstrationOptions
from mmrl_jax.problems.sources import (
    Collected,
    Constants,
    Learn,
    Source,
    make_update,
    update_keys,
)
from mmrl_jax.rl import losses
from mmrl_jax.rollouts.unroll import unroll
from mmrl_jax.training.stage import Carry
from mmrl_jax.types import Metrics, Transition

# Number that is folded into the key of a stage for the order of the demonstrations beside its
# rollouts. No update has this number, so that no update has the same key.
_ORDER = np.uint32(2**32 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Options of the rollout of an update."""

    num_envs: int = option(
        256,
        "Number of environments that step in parallel; a multiple of mesh.data * mesh.fsdp.",
        POSITIVE,
    )
    unroll_length: int = option(16, "Number of steps of each environment in an update.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstratedRolloutOptions(RolloutOptions):
    """Options of a rollout with demonstrated steps beside it."""

    demonstrations: DemonstrationOptions = group(DemonstrationOptions)


# Options of the source of each kind of experience.
SOURCES: Mapping[str, type] = {
    "rollout": RolloutOptions,
    "demonstrated_rollout": DemonstratedRolloutOptions,
    "demonstrations": DemonstrationOptions,
    "one_step": DemonstrationOptions,
}


def rollout_metrics(batch: Transition) -> Metrics:
    """Returns the metrics of an unroll; those of episodes are NaN if no episode ended in it."""
    ended = batch.terminated + batch.truncated

    def at_end(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.any(ended > 0), losses.masked_mean(x, ended), jnp.nan)

    metrics = {
        "episode/return": at_end(batch.metrics["episode_return"]),
        "episode/length": at_end(batch.metrics["episode_length"]),
        "rollout/reward": losses.masked_mean(batch.reward, batch.valid),
        "rollout/valid_fraction": jnp.mean(batch.valid),
        "rollout/nonfinite_envs": jnp.sum(batch.metrics["broken"]),
    }
    if "success" in batch.metrics:
        metrics["episode/success"] = at_end(batch.metrics["success"])
    return metrics


def rollout(env: Env, apply: Apply, *, num_envs: int, unroll_length: int) -> Source:
    """Returns a source of rollouts of the learner's policy.

    Args:
      env: Batched environment.
      apply: Policy network as a function of parameters and observations.
      num_envs: Number of environments that step in parallel.
      unroll_length: Number of steps of each environment in an update.
    """

    def reset(key: jax.Array) -> State:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_envs))
        return env.reset(keys)

    def collect(carry: Carry, constants: Constants) -> Collected:
        act_key, learn_key = update_keys(carry, 2)
        policy = policy_function(apply, carry.learner, deterministic=False)
        env_state, batch = unroll(env, carry.env_state, policy, act_key, unroll_length)
        experience = Rollout(batch, env_state.obs)
        return Collected(env_state, experience, learn_key, rollout_metrics(batch))

    samples = num_envs * unroll_length
    return Source(
        stream=problem.ROLLOUT,
        samples_per_update=samples,
        env_steps_per_update=samples,
        reset=reset,
        collect=collect,
    )


def beside(demonstrations: Source, rollout: Source) -> Source:
    """Returns a source of rollouts, each with a batch of demonstrated steps.

    The batch depends on the number of the update alone. If the demonstrations are read on the host,
    the rollout is part of the compiled program behind the reading.

    Args:
      demonstrations: Source of batches of demonstrated steps, traced or on the host.
      rollout: Traced source of rollouts.
    """
    collect_rollout = rollout.collect
    assert collect_rollout is not None

    def with_batch(carry: Carry, constants: Constants, batch: Batch) -> Collected:
        collected = collect_rollout(carry, constants)
        experience = DemonstratedRollout(collected.batch, batch.samples, carry.updates)
        return collected._replace(batch=experience)

    if demonstrations.collect is not None:
        draw = demonstrations.collect

        def collect(carry: Carry, constants: Constants) -> Collected:
            order = carry.replace(rng=jax.random.fold_in(carry.rng, _ORDER))
            return with_batch(carry, constants, draw(order, constants).batch)

        return dataclasses.replace(rollout, data=demonstrations.data, collect=collect)

    def learn_beside(learn: Learn) -> Learn:
        def both(carry: Carry, constants: Constants, read: Collected) -> tuple[Carry, Metrics]:
            source = dataclasses.replace(
                rollout, collect=lambda carry, constants: with_batch(carry, constants, read.batch)
            )
            return make_update(source, learn)(carry, constants)

        return both

    on_host = demonstrations.on_host
    assert on_host is not None
    return dataclasses.replace(
        rollout, collect=None, on_host=lambda learn: on_host(learn_beside(learn))
    )
