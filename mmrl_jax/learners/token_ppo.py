"""PPO over tokens (Ouyang et al., 2022, arXiv 2203.02155): every token is a step, with a value.

    questions [T, B] -> answers [T, B, G, L] -> rewards [T, B, G] -> advantages [T, B, G, L]

A question with G answers is G episodes of one turn that share the pass over their prompt; an agent
that writes its actions has as many turns as its environment has steps, with one answer each.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from mmrl_jax.learners.learner import Shard, flatten, map_in_chunks, unflatten
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState, minibatch_epochs
from mmrl_jax.rl import advantages, losses
from mmrl_jax.rl.token_losses import TokenLoss, token_loss_sums
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks.question import Prompt
from mmrl_jax.types import Metrics, Params, Transition


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of PPO over tokens.

    Attributes:
      discount: of a turn, in [0, 1].
      gae_lambda: of generalized advantages, of a token, in [0, 1].
      loss: of the policy, reduced over tokens.
      value_clip: half width of the interval that a value may move in, see `losses.value_loss`.
      value_weight: weight of the value loss.
      entropy_weight: weight of the entropy bonus.
      temperature: at which the answers were drawn.
      epochs: passes over a batch.
      minibatches: optimizer steps a pass; must divide T * B.
      grad_accum_steps: parts of a minibatch whose gradients are added up; must divide what that
        leaves. A pass of the model is never over more than such a part.
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
    grad_accum_steps: int

    def __post_init__(self) -> None:
        if self.loss.reduction != "token":
            raise ValueError(f"loss.reduction={self.loss.reduction!r}, but must be 'token' here.")


class _Sample(NamedTuple):
    question: Prompt
    answers: Completions
    advantage: jax.Array  # [..., G, L], as those below.
    target: jax.Array
    mask: jax.Array  # 1 for the tokens of turns that were taken.
    old: jax.Array | None  # Log-probs before the update; None for a single step.
    value: jax.Array  # Before the update.
    reference: jax.Array | None  # Log-probs.


def one_completion(batch: Transition) -> Transition:
    """Turns with an answer each, [T, B], as turns with groups of one, [T, B, 1]."""
    names = ("action", "reward", "terminated", "truncated", "valid")
    return batch.replace(
        **jax.tree.map(lambda x: x[:, :, None], {name: getattr(batch, name) for name in names})
    )


def update(
    state: TokenState,
    frozen: Any,
    batch: Transition,
    last: Prompt | None,
    rng: jax.Array,
    *,
    policy: TokenPolicy,
    optimizer: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    shard: Shard = lambda batch: batch,
) -> tuple[TokenState, Metrics]:
    """Epochs of minibatch steps on one batch of turns.

    Args:
      state: the learner, whose parameters drew the answers and hold a value head.
      frozen: the other half of the model's variables.
      batch: of T turns of B questions with G answers; its observation is a Prompt [T, B, ...],
        its action a Completions [T, B, G, L], its reward, ends and `valid` are float32 [T, B, G];
        `log_prob`, `value` and `privileged` are not read.
      last: the question [B, ...] after the last turn, where G is 1; None where every episode
        terminates with its last turn, so that nothing of what follows is asked.
      rng: key of the shuffles.
      policy: the model.
      optimizer: the one whose state the learner holds.
      hyperparameters: see there.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the optimizer steps that were taken.

    Raises:
      ValueError: there is a `last` question, but G is not 1.
    """
    h, valid = hyperparameters, batch.valid
    read = functools.partial(_read, policy=policy, frozen=frozen, temperature=h.temperature)
    samples = _samples(state, batch, last, read, h)

    def part_loss(
        params: Params, part: _Sample, normalizer: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The part's share of the loss of a minibatch that has `normalizer` tokens."""
        log_prob, entropies, value = read(params, part.question, part.answers)
        sums = token_loss_sums(
            _flat(log_prob),
            _flat(part.old),
            _flat(part.advantage),
            _flat(part.mask),
            h.loss,
            reference_log_prob=_flat(part.reference),
            rollout_log_prob=_flat(part.answers.log_probs),
        )

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(part.mask > 0, x, 0.0)) / normalizer

        error = mean(losses.value_loss(value, part.target, part.value, h.value_clip))
        entropy = mean(entropies)
        loss = sums.loss / normalizer
        metrics = {name: x / normalizer for name, x in sums.metrics.items()}
        metrics |= {"loss/policy": loss, "loss/value": error, "policy/entropy": entropy}
        return loss + h.value_weight * error - h.entropy_weight * entropy, metrics

    state, metrics = minibatch_epochs(
        state,
        flatten(samples),
        rng,
        part_loss=part_loss,
        normalizer=lambda minibatch: jnp.maximum(jnp.sum(minibatch.mask), 1.0),
        optimizer=optimizer,
        epochs=h.epochs,
        minibatches=h.minibatches,
        grad_accum_steps=h.grad_accum_steps,
        shard=shard,
    )
    return state, metrics | {
        "value/explained_variance": losses.explained_variance(
            samples.value, samples.target, samples.mask
        ),
        "completion/length": losses.masked_mean(jnp.sum(samples.mask, axis=-1), valid),
    }


def _read(
    params: Params,
    question: Prompt,
    answers: Completions,
    *,
    policy: TokenPolicy,
    frozen: Any,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probs, entropies and values, float32 [N, G, L], of G answers to each of N questions."""
    log_probs, value = policy.log_probs_and_values(
        params, frozen, question, answers.tokens, answers.present, temperature=temperature
    )
    return log_probs.log_prob, log_probs.entropy, value


def _flat(tree: Any) -> Any:
    """[N, G, L] to [N * G, L]."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tree)


def _samples(
    state: TokenState,
    batch: Transition,
    last: Prompt | None,
    read: Callable[[Params, Prompt, Completions], tuple[jax.Array, jax.Array, jax.Array]],
    hyperparameters: Hyperparameters,
) -> _Sample:
    """What is learned from, [T, B, ...]."""
    h, valid = hyperparameters, batch.valid
    question, answers = batch.observation, cast(Completions, batch.action)
    turns, count, group = valid.shape
    parts = h.minibatches * h.grad_accum_steps

    def batch_outputs(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        outputs = map_in_chunks(
            lambda part: read(params, *part), flatten((question, answers)), parts
        )
        return unflatten(outputs, turns)

    def last_value() -> jax.Array:
        if last is None:
            return jnp.zeros(count * group)
        if group != 1:
            raise ValueError(f"Every turn has {group} answers, but after only one is there a next.")
        # The value before a first token is of the prompt alone, whatever the token.
        first = answers._replace(
            tokens=answers.tokens[-1, :, :, :1],
            present=answers.present[-1, :, :, :1],
            log_probs=answers.log_probs[-1, :, :, :1],
            finished=answers.finished[-1],
        )
        # The largest equal parts of B questions that are no more than are learned from at once.
        size = math.gcd(count, turns * count // parts)
        values = map_in_chunks(
            lambda part: read(state.params, *part)[2], (last, first), count // size
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
        present=episodes(answers.present),
        terminated=episodes(batch.terminated),
        truncated=episodes(advantages.truncation_mask(batch.terminated, batch.truncated, valid)),
        discount=h.discount,
        lambda_=h.gae_lambda,
    )
    advantage, target = (x.reshape(value.shape) for x in estimates)
    mask = (answers.present & (valid > 0)[..., None]).astype(jnp.float32)
    return _Sample(
        question=question,
        answers=answers,
        advantage=losses.whiten(advantage, mask),
        target=target,
        mask=mask,
        old=None if h.epochs * h.minibatches == 1 else old,
        value=value,
        reference=batch_outputs(state.reference)[0] if h.loss.kl_weight else None,
    )
