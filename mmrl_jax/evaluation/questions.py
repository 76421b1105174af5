"""Evaluation of a token policy: answers to a fixed set of questions, with pictures swapped."""

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

# (what a policy is made of, questions [B], key) -> tokens and which are present, [B, 1, T].
Answer = Callable[[Any, Prompt, jax.Array], tuple[jax.Array, jax.Array]]


class Answered(NamedTuple):
    """Questions [N] and the answers to them, [N, 1, T], or on the host [N, T].

    Attributes:
      question: as it was asked.
      tokens: int32, of the answers.
      present: bool, which tokens are there.
      score: of the answers.
    """

    question: Prompt
    tokens: Any
    present: Any
    score: Score


class Sample(NamedTuple):
    """One question and the answer to it, for people to read.

    Attributes:
      image: uint8 [H, W, 3].
      question: its text.
      right: the right answer.
      answer: what was answered.
      reward: for it; NaN where there is none.
      correct: whether the task takes it for right; None of a task where rewards alone say how good
        an answer is.
    """

    image: np.ndarray
    question: str
    right: str
    answer: str
    reward: float
    correct: bool | None


class QuestionEvaluator:
    """Evaluates policies of one kind on the splits of a task, each on the same questions.

    One compiled program answers the questions of all splits, a chunk at a time, which is split over
    the devices.

    Args:
      task: asks and scores.
      answer: the policy, one answer to each question.
      rng: key of the questions.
      questions: N.
      mesh: whose devices share the work.
      together: the most questions that are answered at once.
    """

    def __init__(
        self,
        task: Task,
        answer: Answer,
        rng: jax.Array,
        *,
        questions: int,
        mesh: Mesh,
        together: int,
    ):
        self._task, self._rng, self._questions = task, rng, questions
        self._mesh, self._together = mesh, together
        self._sample = jax.jit(task.sample, static_argnums=(1, 2))
        self._answer = jax.jit(answer)
        self._score = jax.jit(functools.partial(task.texts.score, penalty=0.0))

    def __call__(self, variables: Any, split: str, *, shuffle_images: bool = False) -> Answered:
        """The questions of a split and the answers of a policy, in numpy.

        Args:
          variables: what the policy is made of.
          split: of the task.
          shuffle_images: every prompt is given another prompt's image: how well one answers
            without looking.
        """
        asked = jax.device_get(self._sample(self._rng, self._questions, split))
        shown = asked
        if shuffle_images:
            shown = asked._replace(images=np.roll(asked.images, 1, axis=0))

        def answer(chunk: Prompt) -> tuple[jax.Array, jax.Array]:
            chunk = mesh_lib.put_batch(chunk, mesh=self._mesh)
            return self._answer(variables, chunk, self._rng)

        tokens, present = in_chunks(
            answer, shown, most=self._together, devices=mesh_lib.batch_shards(self._mesh)
        )
        score = jax.device_get(self._score(asked, tokens, present))
        return Answered(asked, *jax.tree.map(lambda x: x[:, 0], (tokens, present, score)))

    def samples(self, variables: Any, split: str, count: int) -> list[Sample]:
        """The first questions of a split as texts, with the answers of a policy."""
        texts, found = self._task.texts, self(variables, split)
        return [
            Sample(
                image=np.asarray(found.question.images[i]),
                question=texts.prompts[found.question.text[i]],
                right=texts.answers[found.question.answer[i]],
                answer=texts.tokenizer.decode(found.tokens[i][found.present[i]]),
                reward=float(found.score.reward[i]),
                correct=bool(found.score.correct[i]),
            )
            for i in range(min(count, self._questions))
        ]


def describe(score: Score) -> dict[str, float]:
    """Mean 'accuracy' of answers [N], its 95 % interval '_lo' and '_hi', and 'invalid_fraction'."""
    mean, low, high = statistics.bootstrap_interval(
        np.asarray(score.correct), confidence=0.95, resamples=2000, seed=0
    )
    return {
        "accuracy": mean,
        "accuracy_lo": low,
        "accuracy_hi": high,
        "invalid_fraction": float(np.mean(score.malformed)),
    }


def describe_levels(found: Answered, levels: Sequence[str]) -> dict[str, float]:
    """The same of the questions of each level, as '<level>/accuracy' and so on.

    A level that was not asked is left out.
    """
    described = {}
    for i, level in enumerate(levels):
        asked = found.question.level == i
        if asked.any():
            score = jax.tree.map(lambda x, asked=asked: x[asked], found.score)
            described |= {f"{level}/{name}": x for name, x in describe(score).items()}
    return described
