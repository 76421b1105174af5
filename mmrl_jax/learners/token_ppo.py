"""PPO over tokens (Ouyang et al., 2022, arXiv 2203.02155): every token is a step, with a value.

    questions [T, B] -> answers [T, B, G, L] -> rewards [T, B, G] -> advantages [T, B, G, L]

A question with G answers is G episodes of one turn that share the pass over their prompt; an agent
that writes its actions has as many turns as its environment has steps, with one answer each.
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
from mmrl_jax.learners.learner import Shard, flatten, map_in_chunks, unflatten
from mmrl_jax.learners.token_learner import (
    PolicyGradientOptions,
    ScoredCompletions,
    TokenPolicy,
    TokenState,
    minibatch_epochs,
    reference_needs,
)
from mmrl_jax.rl import advantages, losses
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
    """Returns what PPO needs beside the policy."""
    return reference_needs(options) | {"value_head"}


class _Sample(NamedTuple):
    prompt: Prompt
    completions: Completions
    advantage: jax.Array  # [..., G, L], as those below.
    target: jax.Array
    mask: jax.Array  # 1 for the tokens of turns that were taken.
    old: jax.Array | None  # Log-probs before the update; None for a single step.
    value: jax.Array  # Before the update.
    reference: jax.Array | None  # Log-probs.


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
    """Epochs of minibatch steps on one batch of turns.

    Args:
      state: the learner, whose parameters drew the answers and hold a value head.
      frozen: the other half of the model's variables.
      batch: of T turns of B prompts with G completions.
      rng: key of the shuffles.
      policy: the model.
      optimizer: the one whose state the learner holds.
      options: see `PPO`.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the optimizer steps that were taken.

    Raises:
      ValueError: the batch has a `next_prompt`, but G is not 1.
    """
    h, loss_options = options, options.loss
    if h.mask_truncated_completions:
        batch = batch._replace(valid=batch.valid * batch.completions.finished)
    valid = batch.valid
    read = functools.partial(_outputs, policy=policy, frozen=frozen, temperature=h.temperature)
    samples = _samples(state, batch, read, h)

    def part_loss(
        params: Params, part: _Sample, normalizer: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The part's share of the loss of a minibatch that has `normalizer` tokens."""
        log_prob, entropies, value = read(params, part.prompt, part.completions)
        sums = token_loss_sums(
            _flat(log_prob),
            _flat(part.old),
            _flat(part.advantage),
            _flat(part.mask),
            loss_options,
            reference_log_prob=_flat(part.reference),
            rollout_log_prob=_flat(part.completions.log_probs),
        )

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(part.mask > 0, x, 0.0)) / normalizer

        error = mean(losses.value_loss(value, part.target, part.value, h.value_clip))
        entropy = mean(entropies)
        loss = sums.loss / normalizer
        metrics = {name: x / normalizer for name, x in sums.metrics.items()}
        metrics |= {"loss/policy": loss, "loss/value": error, "policy/entropy": entropy}
        return loss + h.value_coef * error - h.entropy_coef * entropy, metrics

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
    return state, metrics | {
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
    """Log-probs, entropies and values, float32 [N, G, L], of G answers to each of N questions."""
    log_probs, value = policy.log_probs_and_values(
        params, frozen, prompts, completions.tokens, completions.mask, temperature=temperature
    )
    return log_probs.log_prob, log_probs.entropy, value


def _flat(tree: Any) -> Any:
    """[N, G, L] to [N * G, L]."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tree)


def _samples(
    state: TokenState,
    batch: ScoredCompletions,
    read: Callable[[Params, Prompt, Completions], tuple[jax.Array, jax.Array, jax.Array]],
    options: PPO,
) -> _Sample:
    """What is learned from, [T, B, ...]."""
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
            raise ValueError(f"Every turn has {group} answers, but after only one is there a next.")
        # The value before a first token is of the prompt alone, whatever the token.
        first = completions._replace(
            tokens=completions.tokens[-1, :, :, :1],
            mask=completions.mask[-1, :, :, :1],
            log_probs=completions.log_probs[-1, :, :, :1],
            finished=completions.finished[-1],
        )
        # The largest equal parts of B questions that are no more than are learned from at once.
        size = math.gcd(count, turns * count // parts)
        values = map_in_chunks(
            lambda part: read(state.params, *part)[2], (next_prompt, first), count // size
        )
        return values.reshape(count)

    def episodes(x: jax.Array) -> jax.Array:
        """[T, B, G, ...] to [T, B * G, ...]."""
        return x.reshape(turns, -1, *x.shape[3:])

    old, _, value = batch_outputs(state.params)
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
    mask = (completions.mask & (valid > 0)[..., None]).astype(jnp.float32)
    return _Sample(
        prompt=prompt,
        completions=completions,
        advantage=losses.whiten(advantage, mask),
        target=target,
        mask=mask,
        old=None if h.num_epochs * h.num_minibatches == 1 else old,
        value=value,
        reference=batch_outputs(state.reference)[0] if h.kl_coef else None,
    )
