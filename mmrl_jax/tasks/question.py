"""What a visual question is, how answers are scored, and the tokens of both: all inside `jit`.

The texts of a task are finitely many, so each is tokenised once, on the host, by whichever
tokenizer its model has; in `jit` a question is a row of a table.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1  # In a table of answers: no token.


class Question(NamedTuple):
    """B questions, each about a picture where the model sees.

    Attributes:
      tokens: int32 [B, S], the prompt, image tokens among them, padded on the left.
      present: bool [B, S], False for padding.
      images: uint8 [B, H, W, 3]; None, in questions of text alone.
      answer: int32 [B], index of the right one among the task's answers.
      kind: int32 [B], index among the task's kinds of questions.
      text: int32 [B], index among the task's texts.
    """

    tokens: jax.Array
    present: jax.Array
    images: jax.Array
    answer: jax.Array
    kind: jax.Array
    text: jax.Array


class Score(NamedTuple):
    """Of G answers to each of B questions, float32 [B, G].

    Attributes:
      reward: 1 for the right answer, 0 for another one, `-penalty` for what is no answer.
      correct: 1 for the right answer.
      malformed: 1 for what is not exactly one of the task's answers.
    """

    reward: jax.Array
    correct: jax.Array
    malformed: jax.Array


class Task(Protocol):
    """Questions without end, with rewards that can be verified."""

    @property
    def texts(self) -> "Texts":
        """Its questions and answers."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of its questions."""

    def sample(self, rng: jax.Array, count: int, split: str) -> Question:
        """Draws questions; the i-th does not depend on how many are drawn."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a task as tokens.

    Attributes:
      prompts: every question, as text.
      answers: every answer, as text.
      prompt_tokens: int32 [Q, S], padded on the left with `pad`.
      prompt_present: bool [Q, S].
      answer_tokens: int32 [A, T], with the stop token as last, then ABSENT.
      pad: what stands for no token.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_tokens: np.ndarray
    prompt_present: np.ndarray
    answer_tokens: np.ndarray
    pad: int

    @property
    def length(self) -> int:
        """T, tokens of the longest answer, its stop token among them."""
        return self.answer_tokens.shape[1]

    def ask(
        self, images: jax.Array, text: jax.Array, answer: jax.Array, kind: jax.Array
    ) -> Question:
        """The questions with texts int32 [B] about images [B, H, W, 3]."""
        return Question(
            jnp.asarray(self.prompt_tokens)[text],
            jnp.asarray(self.prompt_present)[text],
            images,
            answer,
            kind,
            text,
        )

    def labels(self, question: Question) -> tuple[jax.Array, jax.Array]:
        """The right answers, int32 [B, T], and their tokens that are there, bool [B, T]."""
        rows = jnp.asarray(self.answer_tokens)[question.answer]
        there = rows != ABSENT
        return jnp.where(there, rows, self.pad), there

    def parse(self, tokens: jax.Array, present: jax.Array) -> jax.Array:
        """Which answer tokens int32 [..., T'] are, exactly and with the stop token: int32 [...].

        Returns:
          The index of the answer; ABSENT for what is none.
        """
        given = jnp.where(present, tokens, ABSENT)
        width = max(given.shape[-1], self.length)
        given = _widen(given, width)
        same = jnp.all(given[..., None, :] == _widen(self.answer_tokens, width), axis=-1)
        return jnp.where(jnp.any(same, axis=-1), jnp.argmax(same, axis=-1), ABSENT)

    def score(
        self, question: Question, tokens: jax.Array, present: jax.Array, *, penalty: float
    ) -> Score:
        """Scores answers int32 [B, G, T'], of which bool [B, G, T'] tells what is there."""
        given = self.parse(tokens, present)
        correct = (given == question.answer[:, None]).astype(jnp.float32)
        malformed = (given == ABSENT).astype(jnp.float32)
        return Score(correct - penalty * malformed, correct, malformed)


def _widen(rows: jax.Array | np.ndarray, width: int) -> jax.Array:
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])]
    return jnp.pad(jnp.asarray(rows), padding, constant_values=ABSENT)


def tokenise(
    prompts: Sequence[str],
    answers: Sequence[str],
    encode_prompt: Callable[[str], Sequence[int]],
    encode_answer: Callable[[str], Sequence[int]],
    *,
    pad: int,
) -> Texts:
    """Tokenises the texts of a task.

    Args:
      prompts: every question.
      answers: every answer.
      encode_prompt: text -> ids of a prompt, image tokens among them.
      encode_answer: text -> ids of an answer, the stop token as last.
      pad: id that stands for no token.

    Raises:
      ValueError: two answers have the same ids, so that none could be told from the other.
    """
    asked = [list(encode_prompt(text)) for text in prompts]
    said = [list(encode_answer(text)) for text in answers]
    for i, ids in enumerate(said):
        if ids in said[:i]:
            raise ValueError(
                f"The answers {answers[said.index(ids)]!r} and {answers[i]!r} have the same tokens "
                f"{ids}; the tokenizer does not know one of them."
            )
    width = max(map(len, asked))
    tokens = np.array([[pad] * (width - len(ids)) + ids for ids in asked], np.int32)
    present = np.array([[False] * (width - len(ids)) + [True] * len(ids) for ids in asked])
    longest = max(map(len, said))
    rows = np.array([ids + [ABSENT] * (longest - len(ids)) for ids in said], np.int32)
    return Texts(tuple(prompts), tuple(answers), tokens, present, rows, pad)


class Words:
    """A tokenizer of whole words, for models that are trained from scratch on one task.

    Attributes:
      PAD, STOP, IMAGE: ids of padding, of an answer's end, and of a place for an image feature.
      words: the word with id i + 3.
    """

    PAD, STOP, IMAGE = 0, 1, 2

    def __init__(self, texts: Sequence[str]):
        self.words = tuple(sorted({word for text in texts for word in text.split()}))

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.words) + 3

    def encode(self, text: str) -> list[int]:
        """The ids of the words of `text`.

        Raises:
          ValueError: a word that is none of `words`.
        """
        unknown = [word for word in text.split() if word not in self.words]
        if unknown:
            raise ValueError(f"Words {unknown} of {text!r} are none of {self.words}.")
        return [self.words.index(word) + 3 for word in text.split()]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The words of ids; the stop token as '<stop>', padding and image tokens not at all."""
        names = {self.STOP: "<stop>"}
        kept = [int(t) for t in tokens if int(t) not in (self.PAD, self.IMAGE)]
        return " ".join(names.get(t) or self.words[t - 3] for t in kept)
