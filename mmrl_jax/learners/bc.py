"""Behaviour cloning of demonstrations, with a critic and auxiliary targets: the warm start."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import optax

from mmrl_jax.learners.learner import (
    Apply,
    LearnerState,
    Shard,
    apply_gradients,
    auxiliary_losses,
    run_network,
)
from mmrl_jax.rl import advantages, losses
from mmrl_jax.types import Metrics, Observation, Params, Transition


@struct.dataclass
class Demonstrations:
    """A fixed set of N demonstrated decisions, on the device.

    Attributes:
      observation: [N, ...].
      action: what the environment was given, float32 [N, A] in [-1, 1] or int32 [N].
      value_target: float32 [N], discounted return from there under the demonstrator.
      privileged: training-only targets, [N, ...].
    """

    observation: Observation
    action: jax.Array
    value_target: jax.Array
    privileged: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Behaviour cloning's hyperparameters.

    Attributes:
      batch_size: samples an optimiser step.
      value_weight, auxiliary_weight, pointing_weight: of the losses' parts.
    """

    batch_size: int
    value_weight: float
    auxiliary_weight: float
    pointing_weight: float


def demonstrations(
    transitions: Transition, environment_action: jax.Array, *, discount: float
) -> Demonstrations:
    """Turns recorded whole episodes [T, B, ...] into N = T * B samples."""
    returns = advantages.discounted_returns(
        reward=transitions.reward,
        last_value=jnp.zeros(transitions.reward.shape[1]),
        terminated=transitions.terminated,
        truncated=transitions.truncated,
        discount=discount,
    )
    data = Demonstrations(
        transitions.observation, environment_action, returns, transitions.privileged
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)


def update(
    state: LearnerState,
    data: Demonstrations,
    rng: jax.Array,
    *,
    apply: Apply,
    optimiser: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    shard: Shard = lambda batch: batch,
) -> tuple[LearnerState, Metrics]:
    """One optimiser step on a random minibatch of the demonstrations.

    The loss is the cloning loss of the action distribution, plus weighted squared errors of the
    value and of the auxiliary predictions. The state's statistics must have been computed.
    """
    h = hyperparameters
    indices = jax.random.randint(rng, (h.batch_size,), 0, data.value_target.shape[0])
    batch = shard(jax.tree.map(lambda x: x[indices], data))

    def total(params: Params) -> tuple[jax.Array, Metrics]:
        output = run_network(apply, state.replace(params=params), batch.observation)
        ones = jnp.ones(h.batch_size)
        parts = {
            "loss/cloning": jnp.mean(output.distribution.cloning_loss(batch.action)),
            "loss/value": jnp.mean(
                losses.value_loss(output.value, batch.value_target, output.value, None)
            ),
        } | auxiliary_losses(output, batch.privileged, ones)
        value = (
            parts["loss/cloning"]
            + h.value_weight * parts["loss/value"]
            + h.auxiliary_weight * parts["loss/auxiliary"]
            + h.pointing_weight * parts["loss/pointing"]
        )
        return value, parts

    (loss, parts), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
    state, metrics = apply_gradients(state, loss, gradients, optimiser)
    return state, metrics | parts
