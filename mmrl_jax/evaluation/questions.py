"""Evaluation of a token policy: answers to a fixed set of questions, with pictures swapped."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.evaluation import statistics
from mmrl_jax.tasks.question import Question, Score, Task

# (what a policy is made of, questions [B], key) -> tokens and which are present, [B, 1, T].
Answer = Callable[[Any, Question, jax.Array], tuple[jax.Array, jax.Array]]


class QuestionEvaluator:
    """Evaluates policies of one kind on the splits of a task, each on the same questions.

    Args:
      task: asks and scores.
      answer: the policy, one answer to each question.
      rng: key of the questions.
      questions: N.
    """

    def __init__(self, task: Task, answer: Answer, rng: jax.Array, *, questions: int):
        self._task, self._answer, self._rng, self._questions = task, answer, rng, questions
        self._run = jax.jit(self._evaluate, static_argnames="split")

    def __call__(self, made_of: Any, split: str, *, swapped: bool = False) -> Score:
        """Scores the answers of a policy, numpy float32 [N] each.

        Args:
          made_of: what the policy is made of.
          split: of the task.
          swapped: every question is asked about another question's picture: how well one answers
            without looking.
        """
        score = self._run(made_of, self._rng, jnp.asarray(swapped), split=split)
        return jax.tree.map(lambda x: np.asarray(x)[:, 0], score)

    def _evaluate(self, made_of: Any, rng: jax.Array, swapped: jax.Array, *, split: str) -> Score:
        asked = self._task.sample(rng, self._questions, split)
        images = jnp.where(swapped, jnp.roll(asked.images, 1, axis=0), asked.images)
        tokens, present = self._answer(made_of, asked._replace(images=images), rng)
        return self._task.texts.score(asked, tokens, present, penalty=0.0)


def describe(score: Score) -> dict[str, float]:
    """Mean 'accuracy' of answers, '_lo' and '_hi' of its 95 % interval, and 'malformed'."""
    interval = functools.partial(
        statistics.bootstrap_interval, confidence=0.95, resamples=2000, seed=0
    )
    mean, low, high = interval(np.asarray(score.correct))
    return {
        "accuracy": mean,
        "accuracy_lo": low,
        "accuracy_hi": high,
        "malformed": float(np.mean(score.malformed)),
    }
