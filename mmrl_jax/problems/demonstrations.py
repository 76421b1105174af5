"""Demonstrations of a scripted expert, which are recorded once and learned from in epochs."""

import dataclasses

import jax
import jax.numpy as jnp

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, between, group, option
from mmrl_jax.distributed.mesh import computed, only_described
from mmrl_jax.envs import language_reach
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.learners import bc
from mmrl_jax.learners.learner import LearnerState, epoch_indices
from mmrl_jax.problems import problem
from mmrl_jax.problems.demonstration_data import DataOptions
from mmrl_jax.problems.sources import Collected, Constants, Source, update_keys
from mmrl_jax.rl import losses, normalization
from mmrl_jax.rollouts.unroll import (
    ActorOutput,
    PolicyFunction,
    deterministic_output,
    unroll,
)
from mmrl_jax.training.stage import Carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Options of the group `expert`: the scripted expert of `language_reach`, made imperfect."""

    gain: float = option(1.5, "Action per rad of error.", POSITIVE)
    undershoot: float = option(
        0.15,
        "Fraction of the distance to the target by which the expert stops short.",
        between(0, 1),
    )
    noise: float = option(
        0.2, "Standard deviation of the noise on the expert's actions.", NON_NEGATIVE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstrationOptions:
    """Options of the demonstrations of a stage."""

    episodes: int = option(
        4096,
        "Number of episodes of the scripted expert that are recorded before training, unless "
        "data.directory is given.",
        POSITIVE,
    )
    batch_size: int = option(512, "Number of samples in an optimizer step.", POSITIVE)
    expert: ExpertOptions = group(ExpertOptions)
    data: DataOptions = group(DataOptions)


def expert(*, gain: float, undershoot: float, noise: float) -> PolicyFunction:
    """Returns the scripted expert of `language_reach`.

    Args:
      gain: Action per rad of error.
      undershoot: Fraction of the distance to the target by which the expert stops short.
      noise: Standard deviation of the noise on the expert's actions.
    """

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        action = language_reach.expert_action(
            state, rng, gain=gain, undershoot=undershoot, noise=noise
        )
        return deterministic_output(action)

    return policy


def record(
    env: Env,
    policy: PolicyFunction,
    rng: jax.Array,
    *,
    episodes: int,
    discount: float,
    one_step: bool,
) -> tuple[bc.Demonstrations, float]:
    """Records complete episodes of a policy, which depend on the PRNG key alone.

    Args:
      env: Batched environment.
      policy: Policy function of the demonstrator.
      rng: PRNG key of the episodes and of the policy.
      episodes: Number of episodes.
      discount: Discount factor per step of the returns, which are the targets of the value.
      one_step: Whether these have one reward, see `bc.demonstrations`.

    Returns:
      The samples as numpy arrays, and the fraction of episodes with success. If devices are only
      described, these are the shapes of the samples, and 0.
    """

    def run(rng: jax.Array) -> tuple[bc.Demonstrations, jax.Array]:
        reset_key, rng = jax.random.split(rng)
        state = env.reset(jax.random.split(reset_key, episodes))
        last, batch = unroll(env, state, policy, rng, env.episode_length)
        ended = batch.terminated + batch.truncated
        success = losses.masked_mean(batch.metrics["success"], ended)
        data = bc.demonstrations(
            batch, batch.action, last.obs, discount=discount, one_step=one_step
        )
        return data, success

    data, success = computed(run, rng)
    if only_described():
        return data, 0.0
    # The samples are kept on the host, and are on the devices only while their stage runs.
    data, success = jax.device_get((data, success))
    return data, float(success)


def source(data: bc.Demonstrations, *, batch_size: int) -> Source:
    """Returns a source of demonstrations, which are replicated on every device.

    Args:
      data: Demonstrations.
      batch_size: Number of samples in an update.
    """

    def collect(carry: Carry, constants: Constants) -> Collected:
        data = constants.data
        indices = epoch_indices(
            carry.rng, carry.updates, batch_size=batch_size, size=len(data.action)
        )
        return Collected(None, bc.gather(data, indices), update_keys(carry, 1)[0], {})

    def prepare(learner: LearnerState) -> LearnerState:
        proprio = data.observation["proprio"][: len(data.action)]
        mask = jnp.ones(proprio.shape[:-1])
        normalizer = normalization.update(learner.normalizer, proprio, mask)
        return learner.replace(normalizer=normalizer)

    return Source(
        stream=problem.FIXED_SET,
        samples_per_update=batch_size,
        data=data,
        collect=collect,
        prepare=prepare,
    )
