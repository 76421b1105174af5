"""Policy optimization from groups of answers: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++.

They differ in the advantage and in the loss alone, see `rl.group_advantages` and `rl.token_losses`:

    questions [B] -> answers [B, G, T] -> rewards [B, G] -> advantages [B, G]
                                                         -> epochs of minibatch steps
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.learners.learner import Shard, map_in_chunks
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState, minibatch_epochs
from mmrl_jax.rl import group_advantages, losses
from mmrl_jax.rl.token_losses import TokenLoss, loss_denominator, token_loss_sums
from mmrl_jax.rollouts import packing
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks.question import Prompt
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """GRPO's hyperparameters.

    Attributes:
      advantage: rewards and which are scored, [B, G] each, to advantages [B, G], see
        `group_advantages`.
      loss: see there.
      entropy_weight: weight of the entropy bonus, whose sum over tokens has the loss's divisor.
      temperature: at which the answers were drawn.
      epochs: passes over a batch.
      minibatches: optimizer steps a pass; must divide B.
      grad_accum_steps: parts of a minibatch whose gradients are added up; must divide B /
        minibatches.
      mask_truncated_completions: answers that were truncated are left out of the loss, as by TRL;
        their rewards still count in the advantages of their groups.
    """

    advantage: Callable[[jax.Array, jax.Array], jax.Array]
    loss: TokenLoss
    entropy_weight: float
    temperature: float
    epochs: int
    minibatches: int
    grad_accum_steps: int
    mask_truncated_completions: bool = False


class ScoredCompletions(NamedTuple):
    """Answers to B questions, and what came of them.

    Attributes:
      question: of B samples.
      answers: [B, G, T].
      reward: float32 [B, G].
      scored: float32 [B, G], 0 for answers that could not be scored.
    """

    question: Prompt
    answers: Completions
    reward: jax.Array
    scored: jax.Array


class _Sample(NamedTuple):
    question: Prompt
    answers: Completions
    advantage: jax.Array  # [B, G]
    mask: jax.Array  # [B, G, T], 1 for tokens of answers that are learned from.
    old: jax.Array | None  # [B, G, T], log-probs before the update; None for a single step.
    reference: jax.Array | None  # [B, G, T]


class _Normalizer(NamedTuple):
    loss_denominator: jax.Array  # [], of the loss of a minibatch.
    tokens: jax.Array  # [], how many it has.


def update(
    state: TokenState,
    frozen: Any,
    experience: ScoredCompletions,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Epochs of minibatch steps on one batch of answers.

    Args:
      state: the learner, whose parameters drew the answers.
      frozen: the other half of the model's variables.
      experience: of B questions.
      rng: key of the shuffles.
      policy: the model.
      optimizer: the one whose state the learner holds.
      hyperparameters: see there.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the optimizer steps that were taken.
    """
    h, answers = hyperparameters, experience.answers
    advantage = h.advantage(experience.reward, experience.scored)

    def log_probs(params: Params, sample: Any) -> Any:
        return policy.log_probs(
            params,
            frozen,
            sample.question,
            sample.answers.tokens,
            sample.answers.present,
            temperature=h.temperature,
        )

    def batch_log_probs(params: Params) -> jax.Array:
        # In parts of the steps' own shapes: of others the matrix products round differently.
        parts = h.minibatches * h.grad_accum_steps
        return map_in_chunks(lambda part: log_probs(params, part).log_prob, experience, parts)

    old = None if h.epochs * h.minibatches == 1 else batch_log_probs(state.params)
    reference = batch_log_probs(state.reference) if h.loss.kl_weight else None
    learned_from = experience.scored > 0
    if h.mask_truncated_completions:
        learned_from &= answers.finished
    mask = answers.present * learned_from[..., None].astype(jnp.float32)
    samples = _Sample(experience.question, answers, advantage, mask, old, reference)

    def flat(tree: Any) -> Any:
        """[B, G, ...] to [B * G, ...]."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def part_loss(
        params: Params, part: _Sample, normalizer: _Normalizer
    ) -> tuple[jax.Array, Metrics]:
        """The part's share of the loss of a minibatch."""
        current = log_probs(params, part)
        mask = flat(part.mask)
        sums = token_loss_sums(
            flat(current.log_prob),
            flat(part.old),
            flat(part.advantage),
            mask,
            h.loss,
            reference_log_prob=flat(part.reference),
            rollout_log_prob=flat(part.answers.log_probs),
        )
        entropy = jnp.sum(jnp.where(mask > 0, flat(current.entropy), 0.0))
        loss = (sums.loss - h.entropy_weight * entropy) / normalizer.loss_denominator
        metrics = sums.metrics | {"policy/entropy": entropy}
        return loss, {name: x / normalizer.tokens for name, x in metrics.items()} | {
            "loss/policy": loss
        }

    def normalizer(minibatch: _Sample) -> _Normalizer:
        mask = flat(minibatch.mask)
        return _Normalizer(
            jnp.maximum(loss_denominator(mask, h.loss.reduction), 1.0),
            jnp.maximum(jnp.sum(mask), 1.0),
        )

    return minibatch_epochs(
        state,
        samples,
        rng,
        part_loss=part_loss,
        normalizer=normalizer,
        optimizer=optimizer,
        epochs=h.epochs,
        minibatches=h.minibatches,
        grad_accum_steps=h.grad_accum_steps,
        shard=shard,
    )


def dynamic_sampling(experience: ScoredCompletions, count: int) -> ScoredCompletions:
    """The first `count` questions, those whose answers have equal rewards last.

    Of more questions than are learned from, it is DAPO's dynamic sampling (Yu et al., 2025, arXiv
    2503.14476, eq. 11) at a fixed cost; of as many, none has to move to another device.
    """
    if count == len(experience.reward):
        return experience
    order = jnp.argsort(group_advantages.degenerate(experience.reward, experience.scored))[:count]
    return jax.tree.map(lambda x: x[order], experience)


def describe(experience: ScoredCompletions) -> Metrics:
    """What the answers of an update were like."""
    reward, scored = experience.reward, experience.scored
    present = experience.answers.present.astype(jnp.float32)
    degenerate = group_advantages.degenerate(reward, scored)
    return {
        "completion/reward": losses.masked_mean(reward, scored),
        "completion/length": jnp.mean(jnp.sum(present, axis=-1)),
        "completion/truncated_fraction": 1 - jnp.mean(experience.answers.finished),
        "completion/rows": packing.rows_used(experience.answers.present).astype(jnp.float32),
        "reward/zero_std_groups": jnp.mean(degenerate.astype(jnp.float32)),
    }
