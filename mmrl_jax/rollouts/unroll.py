"""Environment unrolls inside one `scan`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.types import Transition


class ActorOutput(NamedTuple):
    """What a policy function returns for B environments.

    Attributes:
      environment_action: [B, A] in [-1, 1], or int32 [B]: what the environment is given.
      action: the sample before squashing, of `Transition.action`; an agent's text.
      log_prob: float32 [B].
      value: float32 [B].
    """

    environment_action: jax.Array
    action: Any
    log_prob: jax.Array
    value: jax.Array


PolicyFunction = Callable[[State, jax.Array], ActorOutput]


def deterministic_output(action: jax.Array) -> ActorOutput:
    """A decision for `action` [B, A] or [B] of who knows no probabilities and no values: 0."""
    zero = jnp.zeros(action.shape[0])
    return ActorOutput(environment_action=action, action=action, log_prob=zero, value=zero)


def unroll(
    env: Env, state: State, policy: PolicyFunction, rng: jax.Array, length: int
) -> tuple[State, Transition]:
    """Steps a batch of auto-resetting environments `length` times.

    Args:
      env: a batched environment with `AutoReset` semantics.
      state: of B environments.
      policy: (state, key) -> ActorOutput; network policies read `state.obs` only.
      rng: key; step t uses fold_in(rng, t).
      length: T.

    Returns:
      The last state, and transitions [T, B, ...].
    """

    def step(state: State, t: jax.Array) -> tuple[State, Transition]:
        decision = policy(state, jax.random.fold_in(rng, t))
        after = env.step(state, decision.environment_action)
        truncated = after.info["truncation"] * after.done
        return after, Transition(
            observation=state.obs,
            action=decision.action,
            log_prob=decision.log_prob,
            value=decision.value,
            reward=after.reward,
            terminated=after.done - truncated,
            truncated=truncated,
            valid=1 - after.info["was_reset"],
            privileged=state.info["privileged"],
            metrics=after.metrics,
        )

    return jax.lax.scan(step, state, jnp.arange(length))
