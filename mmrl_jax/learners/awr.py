"""Advantage-weighted regression of demonstrations (Peng et al., 2019, arXiv 1910.00177).

It clones demonstrations of mixed quality: the better an action turned out than the critic expected,
the larger its weight. The demonstrations therefore need rewards, and failures among them help.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mmrl_jax.config.options import POSITIVE, option
from mmrl_jax.learners import bc
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import losses
from mmrl_jax.types import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWR(bc.BC):
    """The options of advantage-weighted regression."""

    value_coef: float = option(
        0.5,
        "Coefficient of the value loss; without a critic there is no advantage.",
        POSITIVE,
    )
    beta: float = option(
        1.0,
        "Temperature by which the normalized advantages are divided; the larger it is, the more "
        "the weights are alike, as in behavior cloning.",
        POSITIVE,
    )
    max_weight: float = option(20.0, "Maximum weight of a demonstrated step.", POSITIVE)


def policy_loss(
    output: PolicyOutput, samples: bc.Demonstrations, target: jax.Array, *, options: AWR
) -> tuple[jax.Array, Metrics]:
    """Returns the mean of the weighted cloning losses, [], and metrics.

      w_t * cloning_loss(a_t),  w_t = min(exp(A_t / beta), max_weight),  A_t = target_t - v_t

    where the advantages A_t are normalized over the batch and have no gradient.

    Args:
      output: Output of the network for n observations.
      samples: Demonstrated steps [n].
      target: Value targets, float32 [n].
      options: Options of advantage-weighted regression.
    """
    value, valid = jax.lax.stop_gradient(output.value), jnp.ones_like(target)
    advantage = losses.whiten(target - value, valid)
    weight = losses.advantage_weights(advantage / options.beta, options.max_weight)
    loss = jnp.mean(weight * output.distribution.cloning_loss(samples.action))
    return loss, {
        "loss/awr": loss,
        "value/explained_variance": losses.explained_variance(value, target, valid),
    } | weight_metrics(weight)


def weight_metrics(weight: jax.Array) -> Metrics:
    """Returns the metrics of the weights of demonstrated steps, float32 [n]."""
    effective = jnp.sum(weight) ** 2 / jnp.maximum(jnp.sum(weight**2), 1e-12)
    return {
        "policy/weight_mean": jnp.mean(weight),
        "policy/weight_max": jnp.max(weight),
        "policy/effective_sample_size": effective / len(weight),
    }


update = functools.partial(bc.update, policy_loss=policy_loss)
