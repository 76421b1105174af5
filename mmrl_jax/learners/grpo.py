"""GRPO and its relatives: Dr. GRPO, DAPO, GSPO, CISPO, SAPO, RLOO and REINFORCE++.

They compare the completions of a prompt, and differ only in the advantage and in the loss, see
`rl.group_advantages` and `rl.token_losses`:

    prompts [B] -> completions [B, G, T] -> rewards [B, G] -> advantages [B, G]
                                                           -> epochs of minibatch steps
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import POSITIVE, one_of, option
from mmrl_jax.learners import entropy_bonus
from mmrl_jax.learners.learner import Shard, map_in_chunks
from mmrl_jax.learners.policy_gradient import PolicyGradientOptions, select_tokens
from mmrl_jax.learners.token_learner import (
    ScoredCompletions,
    TokenPolicy,
    TokenState,
    minibatch_epochs,
)
from mmrl_jax.rl import group_advantages, losses
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rl.token_losses import (
    PRESETS,
    Reduction,
    TokenLoss,
    loss_denominator,
    token_loss_sums,
)
from mmrl_jax.rollouts import packing
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(PolicyGradientOptions):
    """The options of GRPO and its family."""

    preset: str = option(
        "dapo",
        "Advantage and loss of a published method, see mmrl_jax/rl/token_losses.py.",
        one_of(tuple(PRESETS)),
    )
    pass_at_k: int | None = option(
        None,
        "k of the objective pass@k, one correct completion among k; None for the advantage of the "
        "preset.",
        POSITIVE,
    )

    @property
    def advantage(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The estimator of advantages [B, G] from rewards and `valid`, float32 [B, G] each."""
        if self.pass_at_k is not None:
            return functools.partial(group_advantages.pass_at_k, k=self.pass_at_k)
        return group_advantages.ESTIMATORS[PRESETS[self.preset][0]]

    @property
    def loss(self) -> TokenLoss:
        """The policy loss of the preset, with the KL and the importance weights of the options."""
        return dataclasses.replace(
            PRESETS[self.preset][1],
            kl=self.kl_estimator,
            kl_coef=self.kl_coef,
            importance_weight_cap=self.importance_weight_cap,
        )


class _Sample(NamedTuple):
    prompt: Prompt
    completions: Completions
    advantage: jax.Array  # [B, G], or [B, G, T] if tokens are selected.
    anchor_coef: jax.Array | None  # [B, G, T], see `token_losses.token_loss_sums`.
    mask: jax.Array  # [B, G, T], 1 for tokens that are learned from.
    old: jax.Array | None  # [B, G, T], log-probs before the update; None for a single step.
    reference: jax.Array | None  # [B, G, T], log-probs under the reference.


class _Normalizer(NamedTuple):
    loss_denominator: jax.Array  # [], denominator of the loss of a minibatch.
    tokens: jax.Array  # [], number of tokens of a minibatch.


def update(
    state: TokenState,
    frozen: Any,
    batch: ScoredCompletions,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    options: GRPO,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Takes epochs of minibatch steps on one batch of completions.

    Args:
      state: State of the learner. Other parameters than these may have sampled the completions if
        there is an importance_weight_cap.
      frozen: Frozen variables of the model.
      batch: G completions of each of B prompts, in one turn; those without a reward are masked out.
      rng: PRNG key of the shuffles.
      policy: Token policy.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of the algorithm.
      shard: Function that places a minibatch on the mesh.

    Returns:
      The new state, and the means of the metrics over the optimizer steps that were taken.
    """
    h, entropy_coef = options, entropy_bonus.coefficient(options, state.extras)
    batch = jax.tree.map(lambda x: x[0], batch)
    completions, valid = batch.completions, batch.valid
    with jax.named_scope("advantages"):
        advantage = h.advantage(batch.reward, valid)

    def log_probs(params: Params, sample: Any) -> Any:
        return policy.log_probs(
            params,
            frozen,
            sample.prompt,
            sample.completions.tokens,
            sample.completions.mask,
            temperature=h.temperature,
        )

    def batch_log_probs(params: Params) -> TokenLogProbs:
        # The parts have the shape of the steps' parts: other matrix products round differently.
        parts = h.num_minibatches * h.grad_accum_steps
        return map_in_chunks(functools.partial(log_probs, params), batch, parts)

    several_steps = h.num_epochs * h.num_minibatches > 1
    before = batch_log_probs(state.params) if several_steps or h.selects_tokens else None
    reference = batch_log_probs(state.reference).log_prob if h.kl_coef else None
    learned_from = valid > 0
    if h.mask_truncated_completions:  # Their rewards count in the advantages.
        learned_from &= completions.finished
    mask = completions.mask * learned_from[..., None].astype(jnp.float32)
    anchor_coef = None
    if before is not None and h.selects_tokens:
        advantage, anchor_coef = select_tokens(h, before, advantage[..., None], mask)
    old = before.log_prob if before is not None and several_steps else None
    samples = _Sample(batch.prompt, completions, advantage, anchor_coef, mask, old, reference)

    def part_loss(
        params: Params, part: _Sample, normalizer: _Normalizer
    ) -> tuple[jax.Array, Metrics]:
        return _part_loss(log_probs(params, part), part, normalizer, h, entropy_coef)

    state, metrics = minibatch_epochs(
        state,
        samples,
        rng,
        part_loss=part_loss,
        normalizer=lambda minibatch: _normalizer(minibatch, h.loss.reduction),
        optimizer=optimizer,
        options=h,
        shard=shard,
    )
    entropy = jnp.where(jnp.any(mask > 0), metrics["policy/entropy"], jnp.nan)
    extras, adapted = entropy_bonus.adapted(h, state.extras, entropy)
    return state.replace(extras=extras), metrics | adapted


def _part_loss(
    current: TokenLogProbs,
    part: _Sample,
    normalizer: _Normalizer,
    options: GRPO,
    entropy_coef: float | jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Returns the loss and the metrics of a part, which add up to those of the minibatch."""
    mask = _flat(part.mask)
    sums = token_loss_sums(
        _flat(current.log_prob),
        _flat(part.old),
        _flat(part.advantage),
        mask,
        options.loss,
        reference_log_prob=_flat(part.reference),
        rollout_log_prob=_flat(part.completions.log_probs),
        anchor_coef=_flat(part.anchor_coef),
    )
    entropy = jnp.sum(jnp.where(mask > 0, _flat(current.entropy), 0.0), axis=1)
    bonus = entropy
    if options.loss.reduction == "sequence":  # As the loss: the mean over the tokens of each.
        bonus = entropy / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
    loss = (sums.loss - entropy_coef * jnp.sum(bonus)) / normalizer.loss_denominator
    metrics = sums.metrics | {"policy/entropy": jnp.sum(entropy)}
    return loss, {name: x / normalizer.tokens for name, x in metrics.items()} | {
        "loss/policy": loss
    }


def _normalizer(minibatch: _Sample, reduction: Reduction) -> _Normalizer:
    mask = _flat(minibatch.mask)
    return _Normalizer(
        jnp.maximum(loss_denominator(mask, reduction), 1.0), jnp.maximum(jnp.sum(mask), 1.0)
    )


def _flat(tree: Any) -> Any:
    """Reshapes [B, G, ...] to [B * G, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def dynamic_sampling(batch: ScoredCompletions, count: int) -> ScoredCompletions:
    """Selects `count` prompts of one turn, those whose completions differ in reward first.

    This is DAPO's dynamic sampling (Yu et al., 2025, arXiv 2503.14476, eq. 11) from a fixed number
    of prompts. If the batch has `count` prompts, it is returned as it is.
    """
    reward, valid = batch.reward[0], batch.valid[0]
    if count == len(reward):
        return batch
    order = jnp.argsort(group_advantages.degenerate(reward, valid))[:count]
    return jax.tree.map(lambda x: x[:, order], batch)


def describe(batch: ScoredCompletions) -> Metrics:
    """Returns metrics [] of the completions of an update, in one turn."""
    reward, valid = batch.reward[0], batch.valid[0]
    completions = jax.tree.map(lambda x: x[0], batch.completions)
    mask = completions.mask.astype(jnp.float32)
    degenerate = group_advantages.degenerate(reward, valid)
    return {
        "completion/reward": losses.masked_mean(reward, valid),
        "completion/length": jnp.mean(jnp.sum(mask, axis=-1)),
        "completion/truncated_fraction": 1 - jnp.mean(completions.finished),
        "completion/rows": packing.rows_used(completions.mask).astype(jnp.float32),
        "reward/zero_std_groups": jnp.mean(degenerate.astype(jnp.float32)),
    }
