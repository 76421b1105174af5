"""Supervised fine-tuning: the cross-entropy of given answers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.learners.learner import Shard, apply_gradients
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState
from mmrl_jax.rl import losses
from mmrl_jax.tasks.question import Prompt
from mmrl_jax.types import Metrics, Params


def update(
    state: TokenState,
    frozen: Any,
    question: Prompt,
    tokens: jax.Array,
    present: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """One optimizer step on a batch of answered questions.

    Args:
      state: the learner.
      frozen: the other half of the model's variables.
      question: of B samples.
      tokens: int32 [B, T], the answers, with their stop tokens.
      present: bool [B, T].
      policy: the model.
      optimizer: the one whose state the learner holds.
      shard: places the batch on the mesh.

    Returns:
      The new learner, and metrics; 'loss/sft' is the mean over the tokens that are present.
    """
    question, tokens, present = shard((question, tokens, present))

    def total(params: Params) -> tuple[jax.Array, Metrics]:
        log_probs = policy.log_probs(
            params, frozen, question, tokens[:, None], present[:, None], temperature=1.0
        )
        mask = present[:, None].astype(jnp.float32)
        loss = -losses.masked_mean(log_probs.log_prob, mask)
        entropy = losses.masked_mean(log_probs.entropy, mask)
        return loss, {"loss/sft": loss, "policy/entropy": entropy}

    (loss, metrics), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
    state, step_metrics = apply_gradients(state, loss, gradients, optimizer)
    return state, metrics | step_metrics
