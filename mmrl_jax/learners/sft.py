"""Supervised fine-tuning: it minimizes the cross-entropy of given completions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.learners.learner import Shard, apply_gradients
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenPolicy, TokenState
from mmrl_jax.rl import losses
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT:
    """The options of supervised fine-tuning; it has only those of its stage."""


def update(
    state: TokenState,
    frozen: Any,
    batch: ScoredCompletions,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    options: SFT,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Takes one optimizer step on a batch of labels.

    Args:
      state: State of the learner.
      frozen: Frozen variables of the model.
      batch: One completion of each of B prompts, with a stop token, in one turn.
      rng: Not used.
      policy: Token policy.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of the algorithm.
      shard: Function that places a batch on the mesh.

    Returns:
      The new state, and metrics; 'loss/sft' is the mean over the tokens of the completions.
    """
    prompt, tokens, mask = shard(
        jax.tree.map(
            lambda x: x[0], (batch.prompt, batch.completions.tokens, batch.completions.mask)
        )
    )

    def total(params: Params) -> tuple[jax.Array, Metrics]:
        log_probs = policy.log_probs(params, frozen, prompt, tokens, mask, temperature=1.0)
        weight = mask.astype(jnp.float32)
        loss = -losses.masked_mean(log_probs.log_prob, weight)
        entropy = losses.masked_mean(log_probs.entropy, weight)
        return loss, {"loss/sft": loss, "policy/entropy": entropy}

    (loss, metrics), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
    state, step_metrics = apply_gradients(state, loss, gradients, optimizer)
    return state, metrics | step_metrics
