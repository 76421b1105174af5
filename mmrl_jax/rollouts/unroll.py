"""Unrolls of environments in one `jax.lax.scan`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.types import Transition


class ActorOutput(NamedTuple):
    """The output of a policy function for B environments.

    Attributes:
      environment_action: Action that the environment takes, float32 [B, A] in [-1, 1], or int32
        [B] for discrete actions.
      action: Sample before tanh, as in `Transition.action`; Completions for token policies.
      log_prob: Log-probability of `action`, float32 [B].
      value: Value estimate, float32 [B].
    """

    environment_action: jax.Array
    action: Any
    log_prob: jax.Array
    value: jax.Array


PolicyFunction = Callable[[State, jax.Array], ActorOutput]


def deterministic_output(action: jax.Array) -> ActorOutput:
    """Returns the output for `action` [B, A] or [B], with 0 for log-probabilities and values."""
    zero = jnp.zeros(action.shape[0])
    return ActorOutput(environment_action=action, action=action, log_prob=zero, value=zero)


def unroll(
    env: Env, state: State, policy: PolicyFunction, rng: jax.Array, length: int
) -> tuple[State, Transition]:
    """Steps a batch of auto-resetting environments `length` times.

    Args:
      env: Batched environment with `AutoReset` semantics.
      state: State of B environments.
      policy: Function of a state and a key that returns an ActorOutput; network policies read
        `state.obs` only.
      rng: PRNG key; step t uses fold_in(rng, t).
      length: Number T of steps.

    Returns:
      The state after the last step, and the transitions [T, B, ...].
    """

    def step(state: State, t: jax.Array) -> tuple[State, Transition]:
        with jax.named_scope("policy"):
            output = policy(state, jax.random.fold_in(rng, t))
        with jax.named_scope("env_step"):
            next_state = env.step(state, output.environment_action)
        truncated = next_state.info["truncation"] * next_state.done
        return next_state, Transition(
            observation=state.obs,
            action=output.action,
            log_prob=output.log_prob,
            value=output.value,
            reward=next_state.reward,
            terminated=next_state.done - truncated,
            truncated=truncated,
            valid=1 - next_state.info["was_reset"],
            privileged=state.info["privileged"],
            metrics=next_state.metrics,
        )

    return jax.lax.scan(step, state, jnp.arange(length))
