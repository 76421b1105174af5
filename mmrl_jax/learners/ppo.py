"""Proximal policy optimization (Schulman et al., 2017, arXiv 1707.06347)."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, between, option
from mmrl_jax.learners import entropy_bonus, loss_gradients, value_scaling
from mmrl_jax.learners.entropy_bonus import EntropyOptions
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
from mmrl_jax.learners.loss_gradients import SurgeryOptions
from mmrl_jax.learners.optimizers import OptimizerOptions
from mmrl_jax.learners.value_scaling import ValueScalingOptions
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.rl import advantages, losses, normalization
from mmrl_jax.stability.divergence import RollbackOptions
from mmrl_jax.stability.learning_rate import AdaptiveKLOptions
from mmrl_jax.types import Metrics, Params, Transition

Advantage = Literal["gae", "return"]
# Function of a state that returns weighted terms of a loss by name, [] each, and metrics.
FurtherLoss = Callable[[LearnerState], tuple[dict[str, jax.Array], Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(EntropyOptions, AdaptiveKLOptions, SurgeryOptions, ValueScalingOptions):
    """The options of PPO."""

    discount: float = option(0.99, "Discount factor per control step.", between(0, 1))
    gae_lambda: float = option(0.95, "Lambda of the generalized advantage estimate.", between(0, 1))
    advantage: Advantage = option(
        "gae",
        "Advantage estimator: 'gae', the generalized advantage estimate, or 'return', one step "
        "followed by the lambda-return, as in Brax. The value targets are the same.",
    )
    clip: float = option(
        0.2, "Half width of the interval that the probability ratio is clipped to.", POSITIVE
    )
    value_clip: float | None = option(
        None, "Half width of the interval that a value may move in; None for no clipping.", POSITIVE
    )
    value_coef: float = option(0.5, "Coefficient of the value loss.", NON_NEGATIVE)
    auxiliary_coef: float = option(
        0.0, "Coefficient of the squared errors of predicted privileged targets.", NON_NEGATIVE
    )
    pointing_coef: float = option(
        0.0, "Coefficient of the cross-entropy of pointing.", NON_NEGATIVE
    )
    num_epochs: int = option(1, "Passes over the batch of an update.", POSITIVE)
    num_minibatches: int = option(
        4, "Optimizer steps in a pass; they must divide num_envs * unroll_length.", POSITIVE
    )
    target_kl: float | None = option(
        None,
        "KL divergence of a minibatch above which the rest of an update is skipped; None for no "
        "limit.",
        POSITIVE,
    )
    initial_std: float = option(
        0.5,
        "Standard deviation of the Gaussian, before tanh, at the start of the stage.",
        POSITIVE,
    )
    # This field is no key of a config. If it is set, the log-probs of the actions are recomputed in
    # minibatches before the first step. Below float32 the log-probs of the rollout differ by
    # rounding, because it is another program, and the first ratios would not be 1. With
    # augmentation, those of the rollout are of other images.
    recompute: bool = False

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss whose coefficient is not always 0."""
        coefficients = {
            "policy": 1.0,
            "value": self.value_coef,
            "entropy": 1.0 if self.entropy_target is not None else self.entropy_coef,
            "auxiliary": self.auxiliary_coef,
            "pointing": self.pointing_coef,
        }
        return tuple(name for name, coefficient in coefficients.items() if coefficient > 0)


# Options that depend on another one, and the values of that one with which they have no effect.
_DEPENDENT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "min_learning_rate": ("desired_kl", (None,)),
    "max_learning_rate": ("desired_kl", (None,)),
    "popart_decay": ("popart", (False,)),
    "surgery_parts": ("gradient_surgery", ("none",)),
    "cagrad_c": ("gradient_surgery", ("none", "pcgrad")),
}


def _check_effects(options: PPO, name: str) -> None:
    """Raises ValueError if an option is set that has no effect beside the others."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for key, (switch, off) in _DEPENDENT.items():
        value, state = getattr(options, key), getattr(options, switch)
        if state in off and value != defaults[key]:
            raise ValueError(
                f"{name}.{key}={value!r} has no effect with {name}.{switch}={state!r}: set it to "
                f"{defaults[key]!r}, which is its default, or change {switch}."
            )
    if options.popart and options.value_coef == 0:
        raise ValueError(
            f"{name}.popart={options.popart} changes how the value is learned, which "
            f"{name}.value_coef=0 does not: raise the coefficient, or set popart to False."
        )


def check(options: PPO, optimizer: OptimizerOptions, rollback: RollbackOptions, name: str) -> None:
    """Checks that no options of a stage work against each other, and that each has an effect.

    Args:
      options: Options of PPO.
      optimizer: Options of its optimizer.
      rollback: Options of the rollbacks of the stage.
      name: Name of the stage, for error messages.

    Raises:
      ValueError: If the learning rate follows the KL divergence, and another option also limits the
        divergence or changes the learning rate; if there is no divergence to follow; or if an
        option is set that has no effect beside the others.
    """
    h = options
    _check_effects(h, name)
    if h.desired_kl is None:
        return
    rate = f"{name}.desired_kl={h.desired_kl} lets the learning rate follow the KL divergence"
    if h.target_kl is not None:
        raise ValueError(
            f"{rate}, but {name}.target_kl={h.target_kl} ends an update before the divergence is "
            "high: set one of them to None."
        )
    if optimizer.schedule != "constant" or optimizer.warmup > 0:
        raise ValueError(
            f"{rate}, and replaces a schedule, but {name}.optimizer.schedule="
            f"{optimizer.schedule!r} and {name}.optimizer.warmup={optimizer.warmup}: set them to "
            "'constant' and 0, or desired_kl to None."
        )
    if rollback.max_retries > 0:
        raise ValueError(
            f"{rate}, and would raise again what a rollback lowers, but "
            f"{name}.rollback.max_retries={rollback.max_retries}: set it to 0, or desired_kl to "
            "None."
        )
    if h.num_epochs * h.num_minibatches == 1:
        raise ValueError(
            f"{rate}, but with a single optimizer step in an update the policy has not moved when "
            f"it is measured: set {name}.num_minibatches or {name}.num_epochs above 1."
        )
    if not h.min_learning_rate <= optimizer.learning_rate <= h.max_learning_rate:
        raise ValueError(
            f"{name}.optimizer.learning_rate={optimizer.learning_rate} is where the learning rate "
            f"starts with a desired_kl, but {name}.min_learning_rate={h.min_learning_rate} and "
            f"{name}.max_learning_rate={h.max_learning_rate}: start between them."
        )


def with_std(params: Any, std: float) -> Any:
    """Returns the parameters with the log std of the policy head, if there is one, set."""

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
    """Returns the unweighted terms of PPO's loss, and metrics, [] each.

    Args:
      output: Output of the network for N observations.
      batch: Transitions [N]; those that are not valid are masked out.
      advantage: Advantages, float32 [N].
      target: Value targets, float32 [N].
      rng: PRNG key of the estimate of the entropy.
      options: Options of PPO.
    """
    h, valid = options, batch.valid
    log_ratio = output.distribution.log_prob(batch.action) - batch.log_prob
    log_ratio = jnp.where(valid > 0, log_ratio, 0.0)  # The gradient of a masked overflow is NaN.
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


def weighted_terms(
    parts: dict[str, jax.Array], options: PPO, entropy_coef: float | jax.Array
) -> dict[str, jax.Array]:
    """Returns the weighted terms of the loss, [] each, with a coefficient of the entropy bonus.

    With gradient surgery they are those in `options.loss_parts`, without terms that are always 0.
    """
    h = options
    terms = {
        "policy": parts["loss/policy"],
        "value": h.value_coef * parts["loss/value"],
        "entropy": entropy_coef * parts["loss/entropy"],
        "auxiliary": h.auxiliary_coef * parts["loss/auxiliary"],
        "pointing": h.pointing_coef * parts["loss/pointing"],
    }
    if h.gradient_surgery == "none":
        return terms
    return {name: x for name, x in terms.items() if name in h.loss_parts}


def rollout_parts(options: PPO) -> tuple[str, ...]:
    """Returns the names of the parts of the loss that depend on a rollout alone.

    An adaptive entropy bonus whose coefficient starts at 0 is none of them, because the coefficient
    that it has now is in the state of the learner.
    """
    absent = {"bc"} if options.entropy_coef > 0 else {"bc", "entropy"}
    return tuple(name for name in options.loss_parts if name not in absent)


def extras(options: PPO) -> dict[str, Any]:
    """Returns what PPO has beside the policy, the initial extras of its learner."""
    return entropy_bonus.extras(options) | value_scaling.extras(options)


def update(
    state: LearnerState,
    rollout: Rollout,
    rng: jax.Array,
    *,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    options: PPO,
    shard: Shard = lambda batch: batch,
    further_advantage: jax.Array | None = None,
    further_loss: FurtherLoss | None = None,
) -> tuple[LearnerState, Metrics]:
    """Takes epochs of minibatch steps on one batch of transitions.

    Args:
      state: State of the learner, with the parameters and the normalizer of the rollout.
      rollout: Transitions of B environments under the learner's policy.
      rng: PRNG key of the shuffles.
      apply: Function of parameters and observations that returns a PolicyOutput.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of PPO.
      shard: Function that places a minibatch on the mesh.
      further_advantage: Advantages of other rewards that are added to those of the batch, float32
        [T, B]; None for none.
      further_loss: Function of a state that returns weighted terms to add to the loss of every
        step by name, [] each, and metrics; None for none. The names are in `options.loss_parts`.

    Returns:
      The new state, and metrics: means over the optimizer steps that were taken, NaN if there was
      none, and the numbers of steps that were taken and skipped.
    """
    h, valid = options, rollout.transitions.valid
    state, (batch, advantage, target), scales = _scaled(
        state, *_with_advantages(state, rollout, apply, h), h, further_advantage
    )
    samples = flatten((batch, advantage, target))
    if h.recompute:
        samples = (_with_log_probs(state, samples[0], apply, h, shard), *samples[1:])
    # The rollout was normalized with these statistics. Learning normalizes with them too, so that
    # the first ratios are exactly 1, and updates them at the end.
    normalizer = state.normalizer
    entropy_coef = entropy_bonus.coefficient(h, state.extras)
    steps_before = state.steps

    def take_step(state: LearnerState, indices: jax.Array, rng: jax.Array) -> tuple:
        minibatch = shard(gather(samples, indices))
        terms = _terms(state, minibatch, rng, apply, h, entropy_coef, further_loss)
        value, metrics, gradients = loss_gradients.value_and_gradient(
            terms, state.params, jax.random.fold_in(rng, 1), present=h.loss_parts, options=h
        )
        # Before the first step the divergence is a rounding error.
        kl = jnp.where(state.steps > steps_before, metrics["policy/approx_kl"], 0.0)
        state, step_metrics = apply_gradients(state, value, gradients, optimizer, kl=kl)
        return state, metrics | step_metrics

    def maybe_step(carry: tuple, x: tuple) -> tuple:
        state, stop = carry
        shapes = jax.eval_shape(take_step, state, *x)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, metrics = jax.lax.cond(stop, lambda s, *_: (s, zeros), take_step, state, *x)
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
    extras, adapted = entropy_bonus.adapted(h, state.extras, metrics["policy/entropy"])
    state = state.replace(
        params=value_scaling.unnormalize(h, state.extras, state.params),
        normalizer=_with_observed(normalizer, batch),
        extras=extras,
    )
    return state, metrics | adapted | scales


def part_gradients(
    state: LearnerState, rollout: Rollout, rng: jax.Array, *, apply: Apply, options: PPO
) -> Any:
    """Returns the gradients of the K weighted parts of PPO's loss, a pytree with leaves [K, ...].

    They are those of the first step of an update on one minibatch, which is the whole rollout. An
    adaptive coefficient of the entropy bonus counts as `options.entropy_coef`, and the statistics
    of PopArt and of the range of the returns are those of this rollout alone.

    Args:
      state: State of the learner, with the parameters and the normalizer of the rollout.
      rollout: Transitions of B environments under the learner's policy.
      rng: PRNG key of the estimate of the entropy.
      apply: Function of parameters and observations that returns a PolicyOutput.
      options: Options of PPO; the K parts are its `rollout_parts`.
    """
    state = state.replace(extras=extras(options))
    state, samples, _ = _scaled(state, *_with_advantages(state, rollout, apply, options), options)
    terms = _terms(state, flatten(samples), rng, apply, options, options.entropy_coef)
    names = [(name,) for name in rollout_parts(options)]
    return loss_gradients.stacked_gradients(terms, state.params, names)[0]


def _scaled(
    state: LearnerState,
    batch: Transition,
    advantage: jax.Array,
    target: jax.Array,
    options: PPO,
    further_advantage: jax.Array | None = None,
) -> tuple[LearnerState, tuple[Transition, jax.Array, jax.Array], Metrics]:
    """Returns state, batch, advantages and value targets [T, B] in the scales of learning.

    Args:
      state: State of the learner.
      batch: Transitions [T, B] with zeros in invalid steps.
      advantage: Advantages, float32 [T, B].
      target: Value targets, float32 [T, B].
      options: Options of PPO.
      further_advantage: Advantages that are added, float32 [T, B]; None for none.

    Returns:
      The state, whose network outputs normalized values with PopArt, and whose extras have seen the
      targets; the batch, the advantages and the targets; and metrics.
    """
    h, valid = options, batch.valid
    if further_advantage is not None:
        advantage = advantage + jnp.where(valid > 0, further_advantage, 0.0)
    advantage, extras, metrics = value_scaling.scale_advantages(
        h, state.extras, advantage, target, valid
    )
    extras, moments = value_scaling.observe_targets(h, extras, target, valid)
    params, (value, target) = value_scaling.normalize(
        h, extras, state.params, (batch.value, target)
    )
    state = state.replace(params=params, extras=extras)
    return state, (batch.replace(value=value), advantage, target), metrics | moments


def _terms(
    state: LearnerState,
    samples: tuple[Transition, jax.Array, jax.Array],
    rng: jax.Array,
    apply: Apply,
    options: PPO,
    entropy_coef: float | jax.Array,
    further_loss: FurtherLoss | None = None,
) -> loss_gradients.Terms:
    """Returns the weighted terms of the loss of N samples as a function of parameters."""

    def terms(params: Params) -> tuple[dict[str, jax.Array], Metrics]:
        output = run_network(apply, state.replace(params=params), samples[0].observation)
        parts, metrics = loss(output, *samples, rng, options=options)
        weighted = weighted_terms(parts, options, entropy_coef)
        if further_loss is not None:
            further, further_parts = further_loss(state.replace(params=params))
            weighted, parts = weighted | further, parts | further_parts
        return weighted, metrics | parts

    return terms


def _with_log_probs(
    state: LearnerState, samples: Transition, apply: Apply, options: PPO, shard: Shard
) -> Transition:
    """Returns samples [N] whose log-probs, and values if they are clipped, are computed anew.

    They are computed in parts of a minibatch.
    """

    def outputs(part: Transition) -> tuple[jax.Array, jax.Array]:
        output = run_network(apply, state, part.observation)
        return output.distribution.log_prob(part.action), output.value

    log_prob, value = map_in_chunks(
        lambda part: outputs(shard(part)), samples, options.num_minibatches
    )
    if options.value_clip is None:
        return samples.replace(log_prob=log_prob)
    return samples.replace(log_prob=log_prob, value=value)


def _with_observed(
    normalizer: normalization.RunningStatistics, batch: Transition
) -> normalization.RunningStatistics:
    """Returns statistics that include the proprioception of the valid steps of a batch [T, B]."""
    proprio, valid = batch.observation["proprio"], batch.valid
    frames = proprio.shape[2:-1]
    mask = jnp.broadcast_to(valid.reshape(valid.shape + (1,) * len(frames)), proprio.shape[:-1])
    return normalization.update(normalizer, proprio, mask)


@jax.named_scope("advantages")
def _with_advantages(
    state: LearnerState,
    rollout: Rollout,
    apply: Apply,
    options: PPO,
) -> tuple[Transition, jax.Array, jax.Array]:
    """Returns the batch with zeros in invalid steps, and advantages and value targets [T, B].

    Masking the loss would not be enough: the gradient of a masked NaN is NaN.
    """
    batch, valid = rollout.transitions, rollout.transitions.valid

    def keep(x: jax.Array) -> jax.Array:
        mask = valid.reshape(valid.shape + (1,) * (x.ndim - 2)) > 0
        return jnp.where(mask, x, jnp.zeros_like(x))

    masked = ("observation", "action", "log_prob", "reward", "privileged")
    batch = batch.replace(**jax.tree.map(keep, {name: getattr(batch, name) for name in masked}))
    # Values are masked last: that of an invalid step bootstraps the truncated step before it.
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
