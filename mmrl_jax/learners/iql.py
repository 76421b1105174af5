"""Implicit Q-learning of demonstrations (Kostrikov et al., 2021, arXiv 2110.06169).

Advantage-weighted regression whose advantages come from critics of observations and actions. They
learn from single steps, so that good parts of episodes that failed are found too.
"""

import dataclasses
from typing import Any, cast

from flax import struct
import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import (
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    Valid,
    option,
)
from mmrl_jax.learners import awr, bc
from mmrl_jax.learners.learner import (
    Apply,
    LearnerState,
    Shard,
    apply_gradients,
    auxiliary_losses,
    run_network,
)
from mmrl_jax.models.action_values import ActionValues
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import losses
from mmrl_jax.rl.distributions import Categorical
from mmrl_jax.stability import learning_rate
from mmrl_jax.types import Metrics, Observation, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQL(bc.BC):
    """The options of implicit Q-learning."""

    value_coef: float = option(
        0.5,
        "Coefficient of the value loss; without a value there is no advantage.",
        POSITIVE,
    )
    expectile: float = option(
        0.7,
        "Expectile of the values of the demonstrated actions that the value learns: 0.5 for their "
        "mean, near 1 for the best of them.",
        Valid(lambda x: 0 < x < 1, "above 0 and below 1"),
    )
    inverse_temperature: float = option(
        3.0,
        "Factor of the advantages in the weights of the steps; 0 for behavior cloning.",
        NON_NEGATIVE,
    )
    max_weight: float = option(100.0, "Maximum weight of a demonstrated step.", POSITIVE)
    target_rate: float = option(
        0.005,
        "Fraction by which the target critics move to the critics in an optimizer step.",
        POSITIVE_FRACTION,
    )
    critic_learning_rate: float = option(3e-4, "Learning rate of Adam for the critics.", POSITIVE)


class Critics(struct.PyTreeNode):
    """What implicit Q-learning learns beside the policy: critics of observations and actions.

    Attributes:
      params: Parameters of the critics.
      opt_state: State of their optimizer.
      steps: Number of their optimizer steps taken, int32 [].
      target: Parameters of the target critics, which follow slowly.
    """

    params: Params
    opt_state: optax.OptState
    steps: jax.Array
    target: Params


def _optimizer(options: IQL) -> optax.GradientTransformation:
    # A rollback lowers this learning rate too.
    return optax.chain(optax.adam(options.critic_learning_rate), learning_rate.scale_by_state())


def extras(
    options: IQL, observation: Observation, output: PolicyOutput, rng: jax.Array
) -> dict[str, Any]:
    """Returns new `Critics`, whose targets equal them, as 'critics'.

    Args:
      options: Options of the algorithm.
      observation: Not used.
      output: Output of the network for observations [B, ...], or its shapes.
      rng: PRNG key of the parameters.
    """
    distribution, features = output.distribution, output.features
    assert features is not None
    sizes = distribution.logits if isinstance(distribution, Categorical) else distribution.mean
    features, action = (jnp.zeros((1, x.shape[-1])) for x in (features, sizes))
    params = ActionValues().init(rng, features, action)["params"]
    return {
        "critics": Critics(
            params=params,
            opt_state=_optimizer(options).init(params),
            steps=jnp.zeros((), jnp.int32),
            target=jax.tree.map(jnp.copy, params),
        )
    }


def action_values(params: Params, output: PolicyOutput, action: jax.Array) -> jax.Array:
    """Returns the values of actions by each of C critics, float32 [C, n].

    The features of the network have no gradient.

    Args:
      params: Parameters of C critics.
      output: Output of the network for n observations.
      action: Actions of the environment, float32 [n, A] or int32 [n].
    """
    if isinstance(output.distribution, Categorical):
        action = jax.nn.one_hot(action, output.distribution.logits.shape[-1])
    features = jax.lax.stop_gradient(output.features)
    return cast(jax.Array, ActionValues().apply({"params": params}, features, action))


def update(
    state: LearnerState,
    batch: bc.Batch,
    rng: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    options: IQL,
    shard: Shard = lambda batch: batch,
) -> tuple[LearnerState, Metrics]:
    """Takes one optimizer step on a batch of demonstrated steps.

      value    |expectile - 1(u < 0)| * u^2,  u = min_i Q'_i(s, a) - V(s)
      critics  0.5 * (Q_i(s, a) - r - discount * V(s'))^2
      policy   min(exp(inverse_temperature * u), max_weight) * cloning_loss(a)

    with the target critics Q', which then move to Q. The losses have no gradient but those of V, Q
    and the policy.

    Args:
      state: State of the learner, with the `extras` of this algorithm and a normalizer that has
        seen the demonstrations.
      batch: Demonstrated steps [n], whose value targets are of one reward each.
      rng: Not used.
      apply: Function of parameters and observations that returns a PolicyOutput with features.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of implicit Q-learning.
      shard: Function that places the batch on the mesh.

    Returns:
      The new state, and the losses with the metrics of the weights and of `apply_gradients`.
    """
    h, (samples, next_observation) = options, shard(batch)
    critics = state.extras["critics"]
    target = bc.value_target(state, samples, next_observation, apply)

    def total(params: Params) -> tuple[jax.Array, tuple[PolicyOutput, Metrics]]:
        output = run_network(apply, state.replace(params=params), samples.observation)
        old = action_values(critics.target, output, samples.action)
        error = jnp.min(old, axis=0) - output.value
        weight = losses.advantage_weights(h.inverse_temperature * error, h.max_weight)
        parts = {
            "loss/awr": jnp.mean(weight * output.distribution.cloning_loss(samples.action)),
            "loss/value": jnp.mean(losses.expectile_loss(error, h.expectile)),
        } | auxiliary_losses(output, samples.privileged, jnp.ones_like(target))
        value = bc.weighted_sum(parts["loss/awr"], parts, h)
        return value, (output, parts | awr.weight_metrics(weight))

    (loss, (output, parts)), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
    state, metrics = apply_gradients(state, loss, gradients, optimizer)
    critics, learned = _learn(critics, output, samples.action, target, h)
    state = state.replace(extras=state.extras | {"critics": critics})
    metrics["optimizer/skipped_steps"] += learned.pop("optimizer/skipped_steps")
    return state, metrics | parts | learned


def _learn(
    critics: Critics, output: PolicyOutput, action: jax.Array, target: jax.Array, options: IQL
) -> tuple[Critics, Metrics]:
    """Takes an optimizer step of the critics, and returns them with the sum of their losses, []."""

    def total(params: Params) -> jax.Array:
        value = action_values(params, output, action)
        return jnp.mean(jnp.sum(losses.value_loss(value, target, value, None), axis=0))

    loss, gradients = jax.value_and_grad(total)(critics.params)
    critics, metrics = apply_gradients(critics, loss, gradients, _optimizer(options))
    followed = optax.incremental_update(critics.params, critics.target, options.target_rate)
    skipped = metrics["optimizer/skipped_steps"]
    return critics.replace(target=followed), {
        "loss/critic": loss,
        "optimizer/skipped_steps": skipped,
    }
