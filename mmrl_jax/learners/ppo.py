"""Proximal policy optimization (Schulman et al., 2017, arXiv 1707.06347)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, between, option
from mmrl_jax.learners.learner import (
    Apply,
    LearnerState,
    Rollout,
    Shard,
    apply_gradients,
    auxiliary_losses,
    flatten,
    gather,
    map_in_chunks,
    mean_over_steps,
    minibatch_order,
    run_network,
)
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import advantages, losses, normalization
from mmrl_jax.types import Metrics, Params, Transition

Advantage = Literal["gae", "return"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO:
    """The options of PPO."""

    discount: float = option(0.99, "Discount factor per control step.", between(0, 1))
    gae_lambda: float = option(0.95, "Lambda of the generalized advantage estimate.", between(0, 1))
    advantage: Advantage = option(
        "gae",
        "Advantages: 'gae', generalized ones; 'return', those of the lambda-return behind a step, "
        "as in Brax. The targets of the value are the same.",
    )
    clip: float = option(
        0.2, "Half width of the interval that the probability ratio is clipped to.", POSITIVE
    )
    value_clip: float | None = option(
        None, "Half width of the interval that a value may move in; None to not clip it.", POSITIVE
    )
    value_coef: float = option(0.5, "Coefficient of the value loss.", NON_NEGATIVE)
    entropy_coef: float = option(0.0, "Coefficient of the entropy bonus.", NON_NEGATIVE)
    auxiliary_coef: float = option(
        0.0, "Coefficient of the squared errors of predicted privileged targets.", NON_NEGATIVE
    )
    pointing_coef: float = option(
        0.0, "Coefficient of the cross-entropy of pointing.", NON_NEGATIVE
    )
    num_epochs: int = option(1, "Passes over the batch of an update.", POSITIVE)
    num_minibatches: int = option(
        4, "Optimizer steps of a pass; they divide num_envs * unroll_length.", POSITIVE
    )
    target_kl: float | None = option(
        None,
        "Skip what is left of an update once the KL of a minibatch exceeds this; None to never do.",
        POSITIVE,
    )
    initial_std: float = option(
        0.5,
        "Standard deviation of the Gaussian, before squashing, when the stage begins.",
        POSITIVE,
    )
    # Not a key of a config: the log-probs of the actions are computed anew, in minibatches, before
    # the first step. In less than float32 those of the rollout, which is another program, differ
    # by rounding, so that ratios would not be 1 before the policy has moved.
    recompute: bool = False


def with_std(params: Any, std: float) -> Any:
    """Returns parameters with the policy head's log std set; those without one as they are."""

    def visit(path: tuple, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full_like(x, np.log(std)) if name.endswith("/log_std") else x

    return jax.tree_util.tree_map_with_path(visit, params)


def loss(
    output: PolicyOutput,
    batch: Transition,
    advantage: jax.Array,
    target: jax.Array,
    rng: jax.Array,
    *,
    options: PPO,
) -> tuple[dict[str, jax.Array], Metrics]:
    """The parts of PPO's loss, unweighted, and what to log, over samples [N] that are valid."""
    h, valid = options, batch.valid
    log_ratio = output.distribution.log_prob(batch.action) - batch.log_prob
    log_ratio = jnp.where(valid > 0, log_ratio, 0.0)  # Not even an overflow there may count.
    policy = losses.clipped_policy_loss(log_ratio, advantage, h.clip, h.clip)
    value = losses.value_loss(output.value, target, batch.value, h.value_clip)
    entropy = losses.masked_mean(output.distribution.entropy(rng), valid)
    parts = {
        "loss/policy": losses.masked_mean(policy, valid),
        "loss/value": losses.masked_mean(value, valid),
        "loss/entropy": -entropy,
    } | auxiliary_losses(output, batch.privileged, valid)
    clipped = (jnp.abs(jnp.expm1(log_ratio)) > h.clip).astype(jnp.float32)
    metrics = {
        "policy/approx_kl": losses.masked_mean(losses.approximate_kl(log_ratio), valid),
        "policy/clip_fraction": losses.masked_mean(clipped, valid),
        "policy/entropy": entropy,
    }
    return parts, metrics


def weighted_sum(parts: dict[str, jax.Array], options: PPO) -> jax.Array:
    """The scalar that is minimized."""
    h = options
    return (
        parts["loss/policy"]
        + h.value_coef * parts["loss/value"]
        + h.entropy_coef * parts["loss/entropy"]
        + h.auxiliary_coef * parts["loss/auxiliary"]
        + h.pointing_coef * parts["loss/pointing"]
    )


def update(
    state: LearnerState,
    rollout: Rollout,
    rng: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    options: PPO,
    shard: Shard = lambda batch: batch,
) -> tuple[LearnerState, Metrics]:
    """Epochs of minibatch steps on one batch of transitions.

    Args:
      state: the learner; its parameters and statistics are those that acted.
      rollout: what the learner's policy did in B environments.
      rng: key of the shuffles.
      apply: (params, observation) -> PolicyOutput.
      optimizer: the one whose state the learner holds.
      options: see `PPO`.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the minibatch steps that were taken, NaN if none
      was, and how many were taken and skipped.
    """
    h, valid = options, rollout.transitions.valid
    batch, advantage, target = _with_advantages(state, rollout, apply, h)
    samples = flatten((batch, losses.whiten(advantage, valid), target))
    if h.recompute:

        def log_prob(part: Transition) -> jax.Array:
            return run_network(apply, state, part.observation).distribution.log_prob(part.action)

        old = map_in_chunks(lambda part: log_prob(shard(part)), samples[0], h.num_minibatches)
        samples = (samples[0].replace(log_prob=old), *samples[1:])
    # Acting normalized with these statistics: normalizing the same way here makes the first
    # ratio exactly 1. They take in the new batch at the end.
    normalizer = state.normalizer

    def take_step(state: LearnerState, indices: jax.Array, rng: jax.Array) -> tuple:
        minibatch, advantage, target = shard(gather(samples, indices))

        def total(params: Params) -> tuple[jax.Array, Metrics]:
            output = run_network(apply, state.replace(params=params), minibatch.observation)
            parts, metrics = loss(output, minibatch, advantage, target, rng, options=h)
            return weighted_sum(parts, h), metrics | parts

        (value, metrics), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
        state, step_metrics = apply_gradients(state, value, gradients, optimizer)
        return state, metrics | step_metrics

    def maybe_step(carry: tuple, x: tuple) -> tuple:
        state, stop = carry
        shapes = jax.eval_shape(take_step, state, *x)[1]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, metrics = jax.lax.cond(stop, lambda s, *_: (s, nothing), take_step, state, *x)
        if h.target_kl is not None:
            stop = stop | (metrics["policy/approx_kl"] > h.target_kl)
        return (state, stop), metrics

    keys = jax.random.split(rng, h.num_epochs + 1)
    steps = h.num_epochs * h.num_minibatches
    order = minibatch_order(keys[1:], valid.size, h.num_minibatches)
    (state, _), metrics = jax.lax.scan(
        maybe_step, (state, jnp.zeros((), bool)), (order, jax.random.split(keys[0], steps))
    )
    metrics = mean_over_steps(metrics)
    metrics["value/explained_variance"] = losses.explained_variance(batch.value, target, valid)
    proprio = batch.observation["proprio"]
    frames = proprio.shape[2:-1]
    mask = jnp.broadcast_to(valid.reshape(valid.shape + (1,) * len(frames)), proprio.shape[:-1])
    state = state.replace(normalizer=normalization.update(normalizer, proprio, mask))
    return state, metrics


def _with_advantages(
    state: LearnerState,
    rollout: Rollout,
    apply: Apply,
    options: PPO,
) -> tuple[Transition, jax.Array, jax.Array]:
    """The batch [T, B, ...] with zeros where it is not valid, advantages and value targets [T, B].

    A mask alone does not stop what is not finite: its gradient is 0 * nan.
    """
    batch, valid = rollout.transitions, rollout.transitions.valid

    def keep(x: jax.Array) -> jax.Array:
        mask = valid.reshape(valid.shape + (1,) * (x.ndim - 2)) > 0
        return jnp.where(mask, x, jnp.zeros_like(x))

    masked = ("observation", "action", "log_prob", "reward", "privileged")
    batch = batch.replace(**jax.tree.map(keep, {name: getattr(batch, name) for name in masked}))
    # The value stays until here: an invalid step's bootstraps a truncated step before it.
    discount = options.discount
    steps: dict[str, jax.Array] = {
        "reward": batch.reward,
        "value": batch.value,
        "last_value": run_network(apply, state, rollout.last_observation).value,
        "terminated": batch.terminated,
        "truncated": advantages.truncation_mask(batch.terminated, batch.truncated, valid),
    }
    advantage, target = advantages.generalized_advantages(
        **steps, discount=discount, lambda_=options.gae_lambda
    )
    if options.advantage == "return":
        advantage = advantages.return_advantages(**steps, target=target, discount=discount)
    return batch.replace(value=keep(batch.value)), keep(advantage), keep(target)
