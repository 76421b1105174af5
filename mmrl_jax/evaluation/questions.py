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
from mmrl_jax.tasks.question import Prompt, Score, Task

# (variables, prompts [B], PRNG key) -> tokens int32 [B, 1, T] and completion mask bool [B, 1, T].
Answer = Callable[[Any, Prompt, jax.Array], tuple[jax.Array, jax.Array]]


class EvaluatedCompletions(NamedTuple):
    """N prompts with one scored completion each, as numpy arrays.

    Attributes:
      question: Prompts [N], with their own images even if the policy was given shuffled ones.
      tokens: Tokens of the completions, int32 [N, T].
      present: Mask of the completion tokens, bool [N, T]; False after the end of a completion.
      score: Scores of the completions, with leaves [N].
    """

    question: Prompt
    tokens: Any
    present: Any
    score: Score


class Sample(NamedTuple):
    """One prompt and its completion as text, for the report.

    Attributes:
      image: Image of the prompt, uint8 [H, W, 3].
      question: Text of the prompt.
      right: Text of the correct answer.
      answer: Text of the completion.
      reward: Reward of the completion; NaN if it has no reward.
      correct: Whether the task counts the completion as correct. None for problems that have
        rewards but no correct answers.
    """

    image: np.ndarray
    question: str
    right: str
    answer: str
    reward: float
    correct: bool | None


class QuestionEvaluator:
    """Evaluates policies with one network on splits of a task, always on the same prompts.

    One compiled program generates the completions of all splits in chunks, which are split over the
    devices.

    Args:
      task: Task that samples prompts and scores completions.
      answer: Generates one completion for each prompt of a batch, see `Answer`.
      rng: PRNG key of the prompts and of the generation.
      questions: Number of prompts N in each split.
      mesh: Device mesh over which a chunk is split.
      max_batch: Maximum number of prompts in a chunk.
    """

    def __init__(
        self,
        task: Task,
        answer: Answer,
        rng: jax.Array,
        *,
        questions: int,
        mesh: Mesh,
        max_batch: int,
    ):
        self._task, self._rng, self._questions = task, rng, questions
        self._mesh, self._max_batch = mesh, max_batch
        self._sample = jax.jit(task.sample, static_argnums=(1, 2))
        self._answer = jax.jit(answer)
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
        prompts = jax.device_get(self._sample(self._rng, self._questions, split))
        inputs = prompts
        if shuffle_images:
            inputs = prompts._replace(images=np.roll(prompts.images, 1, axis=0))

        def answer(chunk: Prompt) -> tuple[jax.Array, jax.Array]:
            chunk = mesh_lib.put_batch(chunk, mesh=self._mesh)
            return self._answer(variables, chunk, self._rng)

        tokens, present = in_chunks(
            answer, inputs, max_size=self._max_batch, devices=self._mesh.size
        )
        score = jax.device_get(self._score(prompts, tokens, present))
        return EvaluatedCompletions(
            prompts, *jax.tree.map(lambda x: x[:, 0], (tokens, present, score))
        )

    def samples(self, variables: Any, split: str, count: int) -> list[Sample]:
        """Returns the first `count` prompts of a split and the policy's completions as text."""
        texts, evaluated = self._task.texts, self(variables, split)
        return [
            Sample(
                image=np.asarray(evaluated.question.images[i]),
                question=texts.prompts[evaluated.question.text[i]],
                right=texts.answers[evaluated.question.answer[i]],
                answer=texts.tokenizer.decode(evaluated.tokens[i][evaluated.present[i]]),
                reward=float(evaluated.score.reward[i]),
                correct=bool(evaluated.score.correct[i]),
            )
            for i in range(min(count, self._questions))
        ]


def describe(score: Score) -> dict[str, float]:
    """Returns metrics of N scored completions.

    Args:
      score: Scores of the completions, with leaves [N].

    Returns:
      'accuracy', the fraction of correct completions; 'accuracy_lo' and 'accuracy_hi', its 95 %
      bootstrap interval; and 'invalid_fraction', the fraction that is not a valid answer.
    """
    mean, low, high = statistics.bootstrap_interval(
        np.asarray(score.correct), confidence=0.95, resamples=2000, seed=0
    )
    return {
        "accuracy": mean,
        "accuracy_lo": low,
        "accuracy_hi": high,
        "invalid_fraction": float(np.mean(score.malformed)),
    }


def describe_levels(evaluated: EvaluatedCompletions, levels: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of `describe` for each difficulty level, as '<level>/<metric>'.

    Args:
      evaluated: Completions with their scores.
      levels: Names of the levels; the index of a name is the value of `question.level`. Levels
        without prompts are left out.
    """
    metrics = {}
    for i, level in enumerate(levels):
        mask = evaluated.question.level == i
        if mask.any():
            score = jax.tree.map(lambda x, mask=mask: x[mask], evaluated.score)
            metrics |= {f"{level}/{name}": x for name, x in describe(score).items()}
    return metrics
