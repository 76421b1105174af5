"""Behavior cloning of demonstrations, which also trains the critic and auxiliary predictions."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import NON_NEGATIVE, between, option
from mmrl_jax.learners.learner import (
    Apply,
    LearnerState,
    Shard,
    apply_gradients,
    auxiliary_losses,
    run_network,
)
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import advantages, losses
from mmrl_jax.types import Metrics, Observation, Params, Transition


@struct.dataclass
class Demonstrations:
    """A fixed set of N demonstrated steps of B environments, on the device.

    The value target of a step is value_return + bootstrap_weight * v(observation[bootstrap]). As in
    PPO, truncated episodes are bootstrapped.

    Attributes:
      observation: Observations of the N steps, followed by those after the last step of each of the
        B environments, [N + B, ...].
      action: Actions of the environment, float32 [N, A] in [-1, 1] or int32 [N].
      value_return: Discounted sums of the rewards until the episode ended, float32 [N].
      bootstrap: Indices of the observations after the ends of episodes, int32 [N] in [0, N + B).
      bootstrap_weight: Discounts of the values of these observations, float32 [N]; 0 where the
        episode terminated.
      privileged: Targets for training, each [N, ...].
    """

    observation: Observation
    action: jax.Array
    value_return: jax.Array
    bootstrap: jax.Array
    bootstrap_weight: jax.Array
    privileged: dict[str, jax.Array]


class Batch(NamedTuple):
    """A batch of n demonstrated steps.

    Attributes:
      samples: Demonstrated steps [n].
      next_observation: Observations that their value targets are bootstrapped from, [n, ...].
    """

    samples: Demonstrations
    next_observation: Observation


@dataclasses.dataclass(frozen=True, kw_only=True)
class BC:
    """The options of behavior cloning."""

    discount: float = option(
        0.99,
        "Discount factor per control step of the returns that the critic learns.",
        between(0, 1),
    )
    value_coef: float = option(0.1, "Coefficient of the value loss.", NON_NEGATIVE)
    auxiliary_coef: float = option(
        0.0, "Coefficient of the squared errors of predicted privileged targets.", NON_NEGATIVE
    )
    pointing_coef: float = option(
        0.0, "Coefficient of the cross-entropy of pointing.", NON_NEGATIVE
    )


def gather(data: Demonstrations, indices: jax.Array) -> Batch:
    """Returns the demonstrated steps with the indices int32 [n]."""
    return Batch(
        jax.tree.map(lambda x: x[indices], data),
        jax.tree.map(lambda x: x[data.bootstrap[indices]], data.observation),
    )


def demonstrations(
    transitions: Transition,
    environment_action: jax.Array,
    last_observation: Observation,
    *,
    discount: float,
    one_step: bool = False,
) -> Demonstrations:
    """Returns the N = T * B demonstrated steps of whole episodes.

    Args:
      transitions: Transitions of the episodes, [T, B, ...].
      environment_action: Actions of the environments, [T, B, ...].
      last_observation: Observations after the last transitions and before any reset, [B, ...].
      discount: Discount factor per step, in [0, 1].
      one_step: Whether value targets have one reward, and are bootstrapped from the observation
        after it.
    """
    truncated = transitions.truncated
    returns, weight, step = advantages.bootstrapped_returns(
        reward=transitions.reward,
        terminated=transitions.terminated,
        truncated=jnp.ones_like(truncated) if one_step else truncated,
        discount=discount,
    )
    batch = returns.shape[1]
    observation = jax.tree.map(
        lambda x, last: jnp.concatenate([x, last[None]]), transitions.observation, last_observation
    )
    data = Demonstrations(
        observation=observation,
        action=environment_action,
        value_return=returns,
        bootstrap=step * batch + jnp.arange(batch),
        bootstrap_weight=weight,
        privileged=transitions.privileged,
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)


def value_target(
    state: LearnerState, samples: Demonstrations, next_observation: Observation, apply: Apply
) -> jax.Array:
    """Returns the value targets of demonstrated steps, float32 [n], see `Demonstrations`.

    Args:
      state: State of the learner.
      samples: Demonstrated steps [n].
      next_observation: Observations that their value targets are bootstrapped from, [n, ...].
      apply: Function of parameters and observations that returns a PolicyOutput.
    """
    next_value = run_network(apply, state, next_observation).value
    # A select instead of a product: the value after a terminated episode may be NaN.
    return samples.value_return + jnp.where(
        samples.bootstrap_weight > 0, samples.bootstrap_weight * next_value, 0.0
    )


# Function (output of the network, demonstrated steps [n], value targets float32 [n], *, options) ->
# loss of the policy [] and metrics, which have the loss under its name.
PolicyLoss = Callable[..., tuple[jax.Array, Metrics]]


def policy_loss(
    output: PolicyOutput, samples: Demonstrations, target: jax.Array, *, options: BC
) -> tuple[jax.Array, Metrics]:
    """Returns the mean cloning loss of the action distribution, [], also as a metric.

    Args:
      output: Output of the network for n observations.
      samples: Demonstrated steps [n].
      target: Not used.
      options: Not used.
    """
    loss = jnp.mean(output.distribution.cloning_loss(samples.action))
    return loss, {"loss/bc": loss}


def weighted_sum(policy: jax.Array, parts: Metrics, options: BC) -> jax.Array:
    """Returns the loss that is minimized, [], from that of the policy and its other parts."""
    return (
        policy
        + options.value_coef * parts["loss/value"]
        + options.auxiliary_coef * parts["loss/auxiliary"]
        + options.pointing_coef * parts["loss/pointing"]
    )


def update(
    state: LearnerState,
    batch: Batch,
    rng: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    options: BC,
    shard: Shard = lambda batch: batch,
    policy_loss: PolicyLoss = policy_loss,
) -> tuple[LearnerState, Metrics]:
    """Takes one optimizer step on a batch of demonstrated steps.

    The loss is that of the policy, plus the weighted losses of the value and of the auxiliary
    predictions.

    Args:
      state: State of the learner; its normalizer must have seen the demonstrations.
      batch: Demonstrated steps [n].
      rng: Not used.
      apply: Function of parameters and observations that returns a PolicyOutput.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of behavior cloning, or of an algorithm that has more.
      shard: Function that places the batch on the mesh.
      policy_loss: Loss of the policy.

    Returns:
      The new state, and the losses with the metrics of `policy_loss` and of `apply_gradients`.
    """
    h, (batch, next_observation) = options, shard(batch)
    target = value_target(state, batch, next_observation, apply)

    def total(params: Params) -> tuple[jax.Array, Metrics]:
        output = run_network(apply, state.replace(params=params), batch.observation)
        policy, metrics = policy_loss(output, batch, target, options=h)
        parts = {
            "loss/value": jnp.mean(losses.value_loss(output.value, target, output.value, None)),
        } | auxiliary_losses(output, batch.privileged, jnp.ones(len(batch.action)))
        return weighted_sum(policy, parts, h), metrics | parts

    (loss, parts), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
    state, metrics = apply_gradients(state, loss, gradients, optimizer)
    return state, metrics | parts
