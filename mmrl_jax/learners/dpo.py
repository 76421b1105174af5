"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290).

The chosen and the rejected completion of a prompt are the policy's own completions with the highest
and the lowest reward, sampled anew in each update (Guo et al., 2024, arXiv 2402.04792).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import POSITIVE, between, option
from mmrl_jax.learners.learner import Shard, map_in_chunks
from mmrl_jax.learners.token_learner import (
    ScoredCompletions,
    StepOptions,
    TokenPolicy,
    TokenState,
    minibatch_epochs,
)
from mmrl_jax.rl.token_losses import dpo_loss
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(StepOptions):
    """The options of DPO."""

    beta: float = option(
        0.1, "Coefficient of the implicit KL divergence from the reference.", POSITIVE
    )
    label_smoothing: float = option(
        0.0, "Probability that a preference is taken to be wrong.", between(0, 0.5)
    )


class Preferences(NamedTuple):
    """A chosen and a rejected completion of each of B prompts.

    Attributes:
      prompt: Prompts [B].
      tokens: Tokens of the chosen and of the rejected completion, int32 [B, 2, T].
      mask: False for padding, bool [B, 2, T].
      weight: Weight in the loss, float32 [B]; 0 for a prompt without a preference.
    """

    prompt: Prompt
    tokens: jax.Array
    mask: jax.Array
    weight: jax.Array


def best_and_worst(
    prompt: Prompt,
    tokens: jax.Array,
    mask: jax.Array,
    reward: jax.Array,
    valid: jax.Array,
) -> Preferences:
    """Returns the completions of highest and lowest reward of each prompt.

    Args:
      prompt: Prompts [B].
      tokens: Tokens of G completions of each prompt, int32 [B, G, T].
      mask: False for padding, bool [B, G, T].
      reward: Rewards, float32 [B, G].
      valid: 0 for completions without a reward, float32 [B, G].

    Returns:
      The preferences; their weight is 0 for prompts whose rewards are all equal.
    """
    best = jnp.argmax(jnp.where(valid > 0, reward, -jnp.inf), axis=1)
    worst = jnp.argmin(jnp.where(valid > 0, reward, jnp.inf), axis=1)
    indices = jnp.stack([best, worst], axis=1)
    high, low = jnp.moveaxis(jnp.take_along_axis(reward, indices, axis=1), 1, 0)
    differ = (jnp.sum(valid, axis=1) > 1) & (high > low)

    def select(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, indices[..., None], axis=1)

    return Preferences(prompt, select(tokens), select(mask), differ.astype(jnp.float32))


def update(
    state: TokenState,
    frozen: Any,
    batch: ScoredCompletions,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    options: DPO,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Takes epochs of minibatch steps on preferences among the completions of B prompts.

    Args:
      state: State of the learner, with a reference.
      frozen: Frozen variables of the model.
      batch: G completions of each of B prompts, in one turn.
      rng: PRNG key of the shuffles.
      policy: Token policy.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of the algorithm.
      shard: Function that places a minibatch on the mesh.

    Returns:
      The new state, and the means of the metrics over the optimizer steps that were taken.
      'dpo/reward_accuracy' is the fraction of pairs in which the log-ratio to the reference is
      larger for the chosen completion.
    """
    h, batch = options, jax.tree.map(lambda x: x[0], batch)
    valid = batch.valid
    if h.mask_truncated_completions:
        valid = valid * batch.completions.finished
    preferences = best_and_worst(
        batch.prompt, batch.completions.tokens, batch.completions.mask, batch.reward, valid
    )

    def sequence_log_probs(params: Params, part: Preferences) -> jax.Array:
        """Returns the log-probs of whole completions, float32 [N, 2]."""
        log_probs = policy.log_probs(
            params, frozen, part.prompt, part.tokens, part.mask, temperature=1.0
        )
        return jnp.sum(jnp.where(part.mask, log_probs.log_prob, 0.0), axis=-1)

    reference = map_in_chunks(
        lambda part: sequence_log_probs(state.reference, part),
        preferences,
        h.num_minibatches * h.grad_accum_steps,
    )

    def part_loss(params: Params, part: Any, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the loss of a part of a minibatch whose weights have the sum `normalizer`."""
        part, reference = part
        log_ratio = sequence_log_probs(params, part) - reference
        losses = dpo_loss(
            log_ratio[:, 0], log_ratio[:, 1], beta=h.beta, label_smoothing=h.label_smoothing
        )

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(part.weight > 0, part.weight * x, 0.0)) / normalizer

        margin = log_ratio[:, 0] - log_ratio[:, 1]
        loss = mean(losses)
        return loss, {
            "loss/policy": loss,
            "dpo/reward_margin": mean(h.beta * margin),
            "dpo/reward_accuracy": mean((margin > 0).astype(jnp.float32)),
        }

    state, metrics = minibatch_epochs(
        state,
        (preferences, reference),
        rng,
        part_loss=part_loss,
        normalizer=lambda minibatch: jnp.maximum(jnp.sum(minibatch[0].weight), 1.0),
        optimizer=optimizer,
        options=h,
        shard=shard,
    )
    return state, metrics | {"completion/preferences": jnp.mean(preferences.weight)}
