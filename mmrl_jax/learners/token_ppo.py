"""PPO over tokens (Ouyang et al., 2022, arXiv 2203.02155): every token is a step, with a value.

    prompts [T, B] -> completions [T, B, G, L] -> rewards [T, B, G] -> advantages [T, B, G, L]

A prompt with G completions is G episodes of one turn, which share the pass over the prompt. The
episode of an agent that writes its actions has a turn for every step, with one completion each.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, between, option
from mmrl_jax.learners import entropy_bonus
from mmrl_jax.learners.learner import Shard, flatten, map_in_chunks, unflatten
from mmrl_jax.learners.policy_gradient import (
    PolicyGradientOptions,
    reference_needs,
    select_tokens,
)
from mmrl_jax.learners.token_learner import (
    ScoredCompletions,
    TokenPolicy,
    TokenState,
    minibatch_epochs,
)
from mmrl_jax.rl import advantages, losses
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rl.token_losses import TokenLoss, token_loss_sums
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(PolicyGradientOptions):
    """The options of PPO over tokens."""

    discount: float = option(1.0, "Discount factor per turn.", between(0, 1))
    gae_lambda: float = option(
        1.0, "Lambda of the generalized advantage estimate, per token.", between(0, 1)
    )
    clip: float = option(
        0.2, "Half width of the interval that the probability ratio is clipped to.", POSITIVE
    )
    value_clip: float | None = option(
        None, "Half width of the interval that a value may move in; None to not clip it.", POSITIVE
    )
    value_coef: float = option(0.5, "Coefficient of the value loss.", NON_NEGATIVE)

    @property
    def loss(self) -> TokenLoss:
        """The policy loss, with the KL and the importance weights of the options."""
        return TokenLoss(
            low=self.clip,
            high=self.clip,
            kl=self.kl_estimator,
            kl_coef=self.kl_coef,
            importance_weight_cap=self.importance_weight_cap,
        )


def needs(options: PPO) -> frozenset[str]:
    """Returns the names of what PPO needs in addition to the policy, see `registry.Algorithm`."""
    return reference_needs(options) | {"value_head"}


class _Sample(NamedTuple):
    prompt: Prompt
    completions: Completions
    # The arrays below are [..., G, L].
    advantage: jax.Array
    anchor_coef: jax.Array | None  # See `token_losses.token_loss_sums`.
    target: jax.Array  # Value targets.
    mask: jax.Array  # 1 for tokens that are learned from.
    old: jax.Array | None  # Log-probs before the update; None for a single step.
    value: jax.Array  # Values before the update.
    reference: jax.Array | None  # Log-probs under the reference.


def update(
    state: TokenState,
    frozen: Any,
    batch: ScoredCompletions,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    options: PPO,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Takes epochs of minibatch steps on one batch of turns.

    Args:
      state: State of the learner, whose parameters have a value head. Other parameters may have
        sampled the completions if there is an importance_weight_cap.
      frozen: Frozen variables of the model.
      batch: T turns of B prompts with G completions each.
      rng: PRNG key of the shuffles.
      policy: Token policy.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Options of the algorithm.
      shard: Function that places a minibatch on the mesh.

    Returns:
      The new state, and the means of the metrics over the optimizer steps that were taken.

    Raises:
      ValueError: The batch has a `next_prompt`, but G is not 1.
    """
    h, loss_options = options, options.loss
    entropy_coef = entropy_bonus.coefficient(h, state.extras)
    valid = batch.valid
    read = functools.partial(_outputs, policy=policy, frozen=frozen, temperature=h.temperature)
    samples = _samples(state, batch, read, h)

    def part_loss(
        params: Params, part: _Sample, normalizer: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss of a part of a minibatch that has `normalizer` tokens."""
        log_prob, entropies, value = read(params, part.prompt, part.completions)
        sums = token_loss_sums(
            _flat(log_prob),
            _flat(part.old),
            _flat(part.advantage),
            _flat(part.mask),
            loss_options,
            reference_log_prob=_flat(part.reference),
            rollout_log_prob=_flat(part.completions.log_probs),
            anchor_coef=_flat(part.anchor_coef),
        )

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(part.mask > 0, x, 0.0)) / normalizer

        error = mean(losses.value_loss(value, part.target, part.value, h.value_clip))
        entropy = mean(entropies)
        loss = sums.loss / normalizer
        metrics = {name: x / normalizer for name, x in sums.metrics.items()}
        metrics |= {"loss/policy": loss, "loss/value": error, "policy/entropy": entropy}
        return loss + h.value_coef * error - entropy_coef * entropy, metrics

    state, metrics = minibatch_epochs(
        state,
        flatten(samples),
        rng,
        part_loss=part_loss,
        normalizer=lambda minibatch: jnp.maximum(jnp.sum(minibatch.mask), 1.0),
        optimizer=optimizer,
        options=h,
        shard=shard,
    )
    entropy = jnp.where(jnp.any(samples.mask > 0), metrics["policy/entropy"], jnp.nan)
    extras, adapted = entropy_bonus.adapted(h, state.extras, entropy)
    return state.replace(extras=extras), metrics | adapted | {
        "value/explained_variance": losses.explained_variance(
            samples.value, samples.target, samples.mask
        ),
        "completion/length": losses.masked_mean(jnp.sum(samples.mask, axis=-1), valid),
    }


def _outputs(
    params: Params,
    prompts: Prompt,
    completions: Completions,
    *,
    policy: TokenPolicy,
    frozen: Any,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log-probs, entropies and values of G completions of N prompts, float32 [N, G, L]."""
    log_probs, value = policy.log_probs_and_values(
        params, frozen, prompts, completions.tokens, completions.mask, temperature=temperature
    )
    return log_probs.log_prob, log_probs.entropy, value


def _flat(tree: Any) -> Any:
    """Reshapes [N, G, L] to [N * G, L]."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tree)


def _samples(
    state: TokenState,
    batch: ScoredCompletions,
    read: Callable[[Params, Prompt, Completions], tuple[jax.Array, jax.Array, jax.Array]],
    options: PPO,
) -> _Sample:
    """Returns the samples of the update, [T, B, ...]."""
    h, valid = options, batch.valid
    prompt, completions, next_prompt = batch.prompt, batch.completions, batch.next_prompt
    turns, count, group = valid.shape
    parts = h.num_minibatches * h.grad_accum_steps

    def batch_outputs(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        outputs = map_in_chunks(
            lambda part: read(params, *part), flatten((prompt, completions)), parts
        )
        return unflatten(outputs, turns)

    def last_value() -> jax.Array:
        if next_prompt is None:
            return jnp.zeros(count * group)
        if group != 1:
            raise ValueError(
                f"The batch has a next_prompt, but {group} completions of each prompt; give one."
            )
        # The value before the first token of a completion depends only on the prompt.
        first = completions._replace(
            tokens=completions.tokens[-1, :, :, :1],
            mask=completions.mask[-1, :, :, :1],
            log_probs=completions.log_probs[-1, :, :, :1],
            finished=completions.finished[-1],
        )
        # The largest equal parts of B prompts that are not larger than a part of a minibatch.
        size = math.gcd(count, turns * count // parts)
        values = map_in_chunks(
            lambda part: read(state.params, *part)[2], (next_prompt, first), count // size
        )
        return values.reshape(count)

    def episodes(x: jax.Array) -> jax.Array:
        """Reshapes [T, B, G, ...] to [T, B * G, ...]."""
        return x.reshape(turns, -1, *x.shape[3:])

    old, entropy, value = batch_outputs(state.params)
    estimates = advantages.token_advantages(
        reward=episodes(jnp.where(valid > 0, batch.reward, 0.0)),
        value=episodes(value),
        last_value=last_value(),
        mask=episodes(completions.mask),
        terminated=episodes(batch.terminated),
        truncated=episodes(advantages.truncation_mask(batch.terminated, batch.truncated, valid)),
        discount=h.discount,
        lambda_=h.gae_lambda,
    )
    advantage, target = (x.reshape(value.shape) for x in estimates)
    # The reward of a truncated completion still counts for the turns before it.
    learned = (valid > 0) & (completions.finished | (not h.mask_truncated_completions))
    mask = (completions.mask & learned[..., None]).astype(jnp.float32)
    advantage, anchor_coef = losses.whiten(advantage, mask), None
    if h.selects_tokens:
        advantage, anchor_coef = select_tokens(h, TokenLogProbs(old, entropy), advantage, mask)
    return _Sample(
        prompt=prompt,
        completions=completions,
        advantage=advantage,
        anchor_coef=anchor_coef,
        target=target,
        mask=mask,
        old=None if h.num_epochs * h.num_minibatches == 1 else old,
        value=value,
        reference=batch_outputs(state.reference)[0] if h.kl_coef else None,
    )
