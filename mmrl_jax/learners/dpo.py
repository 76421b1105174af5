"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290) of given answers.

The preferences may be given, or made of the policy's own answers by their rewards, update by update
(Guo et al., 2024, arXiv 2402.04792): `best_and_worst`.
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

    beta: float = option(0.1, "Weight of the implicit KL to the reference.", POSITIVE)
    label_smoothing: float = option(
        0.0, "Fraction of the preferences that are taken to be wrong.", between(0, 0.5)
    )


class Preferences(NamedTuple):
    """Two answers to each of B questions.

    Attributes:
      prompt: of B samples.
      tokens: int32 [B, 2, T], the preferred answer and the other one.
      mask: bool [B, 2, T].
      weight: float32 [B], 0 where there is no preference.
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
    """The answers of highest and lowest reward, of G answers [B, G, T] to each of B questions.

    Args:
      prompt: of B samples.
      tokens: int32 [B, G, T].
      mask: bool [B, G, T].
      reward: float32 [B, G].
      valid: float32 [B, G], 0 for answers that could not be scored.

    Returns:
      Preferences, of no weight where all rewards are equal.
    """
    best = jnp.argmax(jnp.where(valid > 0, reward, -jnp.inf), axis=1)
    worst = jnp.argmin(jnp.where(valid > 0, reward, jnp.inf), axis=1)
    which = jnp.stack([best, worst], axis=1)
    high, low = jnp.moveaxis(jnp.take_along_axis(reward, which, axis=1), 1, 0)
    differ = (jnp.sum(valid, axis=1) > 1) & (high > low)

    def pick(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, which[..., None], axis=1)

    return Preferences(prompt, pick(tokens), pick(mask), differ.astype(jnp.float32))


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
    """Epochs of minibatch steps on preferences among the completions of B prompts.

    Args:
      state: the learner, with a reference.
      frozen: the other half of the model's variables.
      batch: of one turn, with G completions of each of B prompts: the one of highest reward is
        preferred to that of lowest reward.
      rng: key of the shuffles.
      policy: the model.
      optimizer: the one whose state the learner holds.
      options: see `DPO`.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the optimizer steps that were taken.
      'dpo/reward_accuracy' is how often the preferred answer has gained on the other one.
    """
    h, batch = options, jax.tree.map(lambda x: x[0], batch)
    valid = batch.valid
    if h.mask_truncated_completions:
        valid = valid * batch.completions.finished
    preferences = best_and_worst(
        batch.prompt, batch.completions.tokens, batch.completions.mask, batch.reward, valid
    )

    def sequence_log_probs(params: Params, part: Preferences) -> jax.Array:
        """Log-probs of whole answers, float32 [N, 2]."""
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
        """The part's share of the loss of a minibatch whose weights have the sum `normalizer`."""
        part, reference = part
        gain = sequence_log_probs(params, part) - reference
        losses = dpo_loss(gain[:, 0], gain[:, 1], beta=h.beta, label_smoothing=h.label_smoothing)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(part.weight > 0, part.weight * x, 0.0)) / normalizer

        margin = gain[:, 0] - gain[:, 1]
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
