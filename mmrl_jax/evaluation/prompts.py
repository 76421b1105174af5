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
from mmrl_jax.tasks.prompts import Prompt, Score, Task

# (what a policy is made of, questions [B], key) -> tokens and which are present, [B, 1, T].
GenerateFunction = Callable[[Any, Prompt, jax.Array], tuple[jax.Array, jax.Array]]


class PromptEvaluation(NamedTuple):
    """Questions [N] and the answers to them, [N, 1, T], or on the host [N, T].

    Attributes:
      prompts: as they were asked.
      tokens: int32, of the answers.
      mask: bool, False for padding.
      score: of the answers.
    """

    prompts: Prompt
    tokens: Any
    mask: Any
    score: Score


class Sample(NamedTuple):
    """One question and the answer to it, for people to read.

    Attributes:
      image: uint8 [H, W, 3].
      prompt: its text.
      answer: the right answer.
      completion: what was answered.
      reward: for it; NaN where there is none.
      correct: whether the task takes it for right; None of a task where rewards alone say how good
        an answer is.
    """

    image: np.ndarray
    prompt: str
    answer: str
    completion: str
    reward: float
    correct: bool | None


class PromptEvaluator:
    """Evaluates policies of one kind on the splits of a task, each on the same questions.

    One compiled program answers the questions of all splits, a chunk at a time, which is split over
    the devices.

    Args:
      task: asks and scores.
      generate: the policy, one answer to each question.
      rng: key of the questions.
      num_prompts: N.
      mesh: whose devices share the work.
      together: the most questions that are answered at once.
    """

    def __init__(
        self,
        task: Task,
        generate: GenerateFunction,
        rng: jax.Array,
        *,
        num_prompts: int,
        mesh: Mesh,
        together: int,
    ):
        self._task, self._rng, self._num_prompts = task, rng, num_prompts
        self._mesh, self._together = mesh, together
        self._sample = jax.jit(task.sample, static_argnums=(1, 2))
        self._generate = jax.jit(generate)
        self._score = jax.jit(functools.partial(task.texts.score, penalty=0.0))

    def __call__(
        self, variables: Any, split: str, *, shuffle_images: bool = False
    ) -> PromptEvaluation:
        """The questions of a split and the answers of a policy, in numpy.

        Args:
          variables: what the policy is made of.
          split: of the task.
          shuffle_images: every prompt is given another prompt's image: how well one answers
            without looking.
        """
        prompts = jax.device_get(self._sample(self._rng, self._num_prompts, split))
        inputs = prompts
        if shuffle_images:
            inputs = prompts._replace(images=np.roll(prompts.images, 1, axis=0))

        def generate(chunk: Prompt) -> tuple[jax.Array, jax.Array]:
            chunk = mesh_lib.put_batch(chunk, mesh=self._mesh)
            return self._generate(variables, chunk, self._rng)

        tokens, mask = in_chunks(
            generate, inputs, most=self._together, devices=mesh_lib.batch_shards(self._mesh)
        )
        score = jax.device_get(self._score(prompts, tokens, mask))
        return PromptEvaluation(prompts, *jax.tree.map(lambda x: x[:, 0], (tokens, mask, score)))

    def samples(self, variables: Any, split: str, count: int) -> list[Sample]:
        """The first questions of a split as texts, with the answers of a policy."""
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
    """Mean 'accuracy' of answers [N], its 95 % interval '_lo' and '_hi', and 'invalid_fraction'."""
    mean, low, high = statistics.bootstrap_interval(
        np.asarray(score.correct), confidence=0.95, resamples=2000, seed=0
    )
    return {
        "accuracy": mean,
        "accuracy_lo": low,
        "accuracy_hi": high,
        "invalid_fraction": float(np.mean(score.invalid)),
    }


def describe_levels(evaluated: PromptEvaluation, levels: Sequence[str]) -> dict[str, float]:
    """The same of the questions of each level, as '<level>/accuracy' and so on.

    A level that was not asked is left out.
    """
    described = {}
    for i, level in enumerate(levels):
        mask = evaluated.prompts.level == i
        if mask.any():
            score = jax.tree.map(lambda x, mask=mask: x[mask], evaluated.score)
            described |= {f"{level}/{name}": x for name, x in describe(score).items()}
    return described
