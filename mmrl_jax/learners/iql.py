"""Implicit Q-learning of demonstrations (Kostrikov et al., 2021, arXiv 2110.06169).

Advantage-weighted regression whose advantages come from critics of observations and actions. They
learn from single steps, so that good parts of episodes that failed are found too.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, Valid, between, option
from mmrl_jax.learners import awr, bc
from mmrl_jax.learners.learner import (
    CRITICS,
    Apply,
    Critics,
    LearnerState,
    Shard,
    apply_gradients,
    auxiliary_losses,
    run_network,
    trained_params,
)
from mmrl_jax.models.action_values import ActionValues
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import losses
from mmrl_jax.rl.distributions import Categorical
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQL:
    """The options of implicit Q-learning."""

    discount: float = option(0.99, "Discount factor per control step.", between(0, 1))
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
        Valid(lambda x: 0 < x <= 1, "above 0 and at most 1"),
    )
    value_coef: float = option(0.5, "Coefficient of the value loss.", POSITIVE)
    auxiliary_coef: float = option(
        0.0, "Coefficient of the squared errors of predicted privileged targets.", NON_NEGATIVE
    )
    pointing_coef: float = option(
        0.0, "Coefficient of the cross-entropy of pointing.", NON_NEGATIVE
    )


def init_critics(output: PolicyOutput, key: jax.Array) -> Critics:
    """Returns new critics, and target critics that equal them.

    Args:
      output: Output of the network for one observation, or its shapes.
      key: PRNG key of the parameters.
    """
    assert output.features is not None
    distribution = output.distribution
    sizes = distribution.logits if isinstance(distribution, Categorical) else distribution.mean
    features, action = (jnp.zeros((1, x.shape[-1])) for x in (output.features, sizes))
    params = ActionValues().init(key, features, action)["params"]
    return Critics(params, jax.tree.map(jnp.copy, params))


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
    values = ActionValues().apply({"params": params}, features, action)
    return cast(jax.Array, values)


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
      state: State of the learner with critics; its normalizer must have seen the demonstrations.
      batch: Demonstrated steps [n], whose value targets are of one reward each.
      rng: Not used.
      apply: Function of parameters and observations that returns a PolicyOutput with features.
      optimizer: Optimizer whose state is `state.opt_state`, of `trained_params(state)`.
      options: Options of implicit Q-learning.
      shard: Function that places the batch on the mesh.

    Returns:
      The new state, and the losses with the metrics of the weights and of `apply_gradients`.
    """
    h, (samples, next_observation) = options, shard(batch)
    target = bc.value_target(state, samples, next_observation, apply)
    assert state.critics is not None
    target_critics = state.critics.target

    def total(params: Params) -> tuple[jax.Array, Metrics]:
        output = run_network(apply, state.replace(params=params), samples.observation)
        old = action_values(target_critics, output, samples.action)
        error = jnp.min(old, axis=0) - output.value
        weight = losses.advantage_weights(h.inverse_temperature * error, h.max_weight)
        new = action_values(params[CRITICS], output, samples.action)
        parts = {
            "loss/awr": jnp.mean(weight * output.distribution.cloning_loss(samples.action)),
            "loss/value": jnp.mean(losses.expectile_loss(error, h.expectile)),
            "loss/critic": jnp.mean(jnp.sum(losses.value_loss(new, target, new, None), axis=0)),
        } | auxiliary_losses(output, samples.privileged, jnp.ones_like(target))
        value = (
            parts["loss/awr"]
            + h.value_coef * parts["loss/value"]
            + parts["loss/critic"]
            + h.auxiliary_coef * parts["loss/auxiliary"]
            + h.pointing_coef * parts["loss/pointing"]
        )
        return value, parts | awr.weight_metrics(weight)

    joint = state.replace(params=trained_params(state))
    (loss, parts), gradients = jax.value_and_grad(total, has_aux=True)(joint.params)
    joint, metrics = apply_gradients(joint, loss, gradients, optimizer)
    critics = joint.params[CRITICS]
    moved = optax.incremental_update(critics, target_critics, h.target_rate)
    network = {name: x for name, x in joint.params.items() if name != CRITICS}
    state = joint.replace(params=network, critics=Critics(critics, moved))
    return state, metrics | parts
