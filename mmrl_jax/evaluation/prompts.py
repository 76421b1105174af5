"""Evaluation of a token policy on a fixed set of prompts, optionally with shuffled images."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.chunks import in_chunks
from mmrl_jax.tasks.prompts import Prompt, Score, Task

# (variables, prompts [B], PRNG key) -> tokens int32 [B, 1, T] and completion mask bool [B, 1, T].
GenerateFunction = Callable[[Any, Prompt, jax.Array], tuple[jax.Array, jax.Array]]


class EvaluatedCompletions(NamedTuple):
    """N prompts with one scored completion each, as numpy arrays.

    Attributes:
      prompts: Prompts [N], with their own images even if the policy was given shuffled ones.
      tokens: Tokens of the completions, int32 [N, T].
      mask: Mask of the completion tokens, bool [N, T]; False after the end of a completion.
      score: Scores of the completions, with leaves [N].
    """

    prompts: Prompt
    tokens: Any
    mask: Any
    score: Score


class Sample(NamedTuple):
    """One prompt and its completion as text, for the report.

    Attributes:
      image: Image of the prompt, uint8 [H, W, 3].
      prompt: Text of the prompt.
      answer: Text of the correct answer.
      completion: Text of the completion.
      reward: Reward of the completion; NaN if it has no reward.
      correct: Whether the task counts the completion as correct. None for problems that have
        rewards but no correct answers.
    """

    image: np.ndarray
    prompt: str
    answer: str
    completion: str
    reward: float
    correct: bool | None


class PromptEvaluator:
    """Evaluates policies with one network on splits of a task, always on the same prompts.

    One compiled program generates the completions of all splits in chunks, which are split over the
    devices.

    Args:
      task: Task that samples prompts and scores completions.
      generate: Generates one completion for each prompt of a batch, see `GenerateFunction`.
      rng: PRNG key of the prompts and of the generation.
      num_prompts: Number of prompts N in each split.
      mesh: Device mesh over which a chunk is split.
      max_batch: Maximum number of prompts in a chunk.
    """

    def __init__(
        self,
        task: Task,
        generate: GenerateFunction,
        rng: jax.Array,
        *,
        num_prompts: int,
        mesh: Mesh,
        max_batch: int,
    ):
        self._task, self._rng, self._num_prompts = task, rng, num_prompts
        self._mesh, self._max_batch = mesh, max_batch
        self._sample = jax.jit(task.sample, static_argnums=(1, 2))
        self._generate = jax.jit(generate)
        self._score = jax.jit(functools.partial(task.texts.score, penalty=0.0))

    def __call__(
        self, variables: Any, split: str, *, shuffle_images: bool = False
    ) -> EvaluatedCompletions:
        """Generates and scores one completion for each prompt of a split.

        Args:
          variables: Variables of the policy.
          split: Name of a split of the task.
          shuffle_images: Whether the policy is given the image of another prompt, which measures
            the accuracy that it reaches without using the image.
        """
        prompts = jax.device_get(self._sample(self._rng, self._num_prompts, split))
        inputs = prompts
        if shuffle_images:
            inputs = prompts._replace(images=np.roll(prompts.images, 1, axis=0))

        def generate(chunk: Prompt) -> tuple[jax.Array, jax.Array]:
            chunk = mesh_lib.put_batch(chunk, mesh=self._mesh)
            return self._generate(variables, chunk, self._rng)

        tokens, mask = in_chunks(
            generate,
            inputs,
            max_size=self._max_batch,
            devices=mesh_lib.batch_shards(self._mesh),
        )
        score = jax.device_get(self._score(prompts, tokens, mask))
        return EvaluatedCompletions(
            prompts, *jax.tree.map(lambda x: x[:, 0], (tokens, mask, score))
        )

    def samples(self, variables: Any, split: str, count: int) -> list[Sample]:
        """Returns the first `count` prompts of a split and the policy's completions as text."""
        texts, evaluated = self._task.texts, self(variables, split)
        return [
            Sample(
                image=np.asarray(evaluated.prompts.images[i]),
                prompt=texts.prompts[evaluated.prompts.text[i]],
                answer=texts.answers[evaluated.prompts.answer[i]],
                completion=texts.tokenizer.decode(evaluated.tokens[i][evaluated.mask[i]]),
                reward=float(evaluated.score.reward[i]),
                correct=bool(evaluated.score.correct[i]),
            )
            for i in range(min(count, self._num_prompts))
        ]


def describe(score: Score) -> dict[str, float]:
    """Returns metrics of N scored completions.

    Args:
      score: Scores of the completions, with leaves [N].

    Returns:
      'accuracy', the fraction of correct completions; 'accuracy_lo' and 'accuracy_hi', its 95 %
      Wilson score interval; and 'invalid_fraction', the fraction that is not a valid answer.
    """
    mean, low, high = statistics.rate_interval(np.asarray(score.correct), confidence=0.95)
    return {
        "accuracy": mean,
        "accuracy_lo": low,
        "accuracy_hi": high,
        "invalid_fraction": float(np.mean(score.invalid)),
    }


def describe_levels(evaluated: EvaluatedCompletions, levels: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of `describe` for each difficulty level, as '<level>/<metric>'.

    Args:
      evaluated: Completions with their scores.
      levels: Names of the levels; the index of a name is the value of `prompts.level`. Levels
        without prompts are left out.
    """
    metrics = {}
    for i, level in enumerate(levels):
        mask = evaluated.prompts.level == i
        if mask.any():
            score = jax.tree.map(lambda x, mask=mask: x[mask], evaluated.score)
            metrics |= {f"{level}/{name}": x for name, x in describe(score).items()}
    return metrics
