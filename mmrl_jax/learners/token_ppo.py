"""PPO over tokens (Ouyang et al., 2022, arXiv 2203.02155): every token is a step, with a value.

    questions [T, B] -> answers [T, B, L] -> rewards [T, B] -> advantages [T, B, L]

A question with one answer is an episode of one turn; an agent that writes its actions has as many
as its environment has steps.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.learners.learner import Shard, apply_gradients, minibatch_order, over_steps, summed
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState, in_parts
from mmrl_jax.rl import advantages, losses
from mmrl_jax.rl.token_losses import TokenLoss, token_loss_sums
from mmrl_jax.rollouts.generate import Generated
from mmrl_jax.tasks.question import Question
from mmrl_jax.types import Metrics, Params, Transition


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of PPO over tokens.

    Attributes:
      discount: of a turn, in [0, 1].
      gae_lambda: of generalised advantages, of a token, in [0, 1].
      loss: of the policy, reduced over tokens.
      value_clip: half width of the interval that a value may move in, see `losses.value_loss`.
      value_weight: weight of the value loss.
      entropy_weight: weight of the entropy bonus.
      temperature: at which the answers were drawn.
      epochs: passes over a batch.
      minibatches: optimiser steps a pass; must divide T * B.
      accumulate: parts of a minibatch whose gradients are added up; must divide what that leaves.
    """

    discount: float
    gae_lambda: float
    loss: TokenLoss
    value_clip: float | None
    value_weight: float
    entropy_weight: float
    temperature: float
    epochs: int
    minibatches: int
    accumulate: int

    def __post_init__(self) -> None:
        if self.loss.reduction != "token":
            raise ValueError(f"loss.reduction={self.loss.reduction!r}, but must be 'token' here.")


def update(
    state: TokenState,
    frozen: Any,
    batch: Transition,
    last: Question,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimiser: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Epochs of minibatch steps on one batch of turns.

    Args:
      state: the learner, whose parameters drew the answers and hold a value head.
      frozen: the other half of the model's variables.
      batch: of T turns of B episodes; its observation is a Question [T, B, ...], its action a
        Generated [T, B, L]; `log_prob`, `value` and `privileged` are not read.
      last: the question [B, ...] after the last turn.
      rng: key of the shuffles.
      policy: the model.
      optimiser: the one whose state the learner holds.
      hyperparameters: see there.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the optimiser steps that were taken.
    """
    h, valid = hyperparameters, batch.valid
    answers = cast(Generated, batch.action)
    turns, size = valid.shape
    parts = h.minibatches * h.accumulate

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def read(params: Params, part: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log-probs, entropies and values [N, L] of questions and answers [N, ...]."""
        question, given = part
        found, value = policy.log_probs_and_values(
            params,
            frozen,
            question,
            given.tokens[:, None],
            given.present[:, None],
            temperature=h.temperature,
        )
        return found.log_prob[:, 0], found.entropy[:, 0], value[:, 0]

    asked = flat((batch.observation, answers))
    old, _, value = in_parts(lambda part: read(state.params, part), asked, parts)
    first = jax.tree.map(lambda x: x[-1, :, :1], answers)  # Its value is of the prompt alone.
    last_value = read(state.params, (last, first))[2][:, 0]
    advantage, target = advantages.token_advantages(
        reward=jnp.where(valid > 0, batch.reward, 0.0),
        value=value.reshape(turns, size, -1),
        last_value=last_value,
        present=answers.present,
        terminated=batch.terminated,
        truncated=advantages.cut(batch.terminated, batch.truncated, valid),
        discount=h.discount,
        lambda_=h.gae_lambda,
    )
    mask = (answers.present & (valid > 0)[..., None]).astype(jnp.float32)
    reference = old
    if h.loss.kl_weight:
        reference = in_parts(lambda part: read(state.reference, part)[0], asked, parts)
    samples = (
        asked,
        *flat((losses.normalise(advantage, mask), target, mask)),
        old,
        value,
        reference,
    )

    def part_loss(params: Params, part: Any, whole: jax.Array) -> tuple[jax.Array, Metrics]:
        """The part's share of the loss of a minibatch that has `whole` tokens."""
        asked, advantage, target, mask, old, value, reference = part
        log_prob, entropies, new_value = read(params, asked)
        sums = token_loss_sums(
            log_prob,
            old,
            advantage,
            mask,
            h.loss,
            reference_log_prob=reference,
            rollout_log_prob=asked[1].log_probs,
        )

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask > 0, x, 0.0)) / whole

        error = mean(losses.value_loss(new_value, target, value, h.value_clip))
        entropy = mean(entropies)
        loss = sums.loss / whole
        metrics = {name: x / whole for name, x in sums.metrics.items()}
        metrics |= {"loss/policy": loss, "loss/value": error, "policy/entropy": entropy}
        return loss + h.value_weight * error - h.entropy_weight * entropy, metrics

    def take_step(state: TokenState, indices: jax.Array) -> tuple[TokenState, Metrics]:
        minibatch = shard(jax.tree.map(lambda x: x[indices], samples))
        whole = jnp.maximum(jnp.sum(mask.reshape(-1, mask.shape[-1])[indices]), 1.0)
        gradient = jax.value_and_grad(part_loss, has_aux=True)
        (loss, metrics), gradients = summed(
            lambda part: gradient(state.params, part, whole), minibatch, h.accumulate
        )
        state, step_metrics = apply_gradients(state, loss, gradients, optimiser)
        return state, metrics | step_metrics

    order = minibatch_order(jax.random.split(rng, h.epochs), turns * size, h.minibatches)
    state, metrics = jax.lax.scan(take_step, state, order)
    return state, over_steps(metrics) | {
        "value/explained_variance": losses.explained_variance(
            value.reshape(target.shape), target, mask
        ),
        "answer/length": losses.masked_mean(jnp.sum(mask, axis=-1), valid),
    }
