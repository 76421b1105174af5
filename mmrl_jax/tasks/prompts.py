"""What a visual question is, how answers are scored, and the tokens of both: all inside `jit`.

The texts of a task are finitely many, so each is tokenized once, on the host, by whichever
tokenizer its model has; in `jit` a question is a row of a table.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1  # In a table of answers: no token.


class Prompt(NamedTuple):
    """B questions, each about a picture where the model sees.

    Attributes:
      tokens: int32 [B, S], the prompt, image tokens among them, padded on the left.
      present: bool [B, S], False for padding.
      images: uint8 [B, H, W, 3]; None, in questions of text alone.
      answer: int32 [B], index of the right one among the task's answers.
      kind: int32 [B], index among the task's kinds of questions.
      text: int32 [B], index among the task's texts.
      level: int32 [B], index among the task's levels of difficulty.
    """

    tokens: jax.Array
    mask: jax.Array
    images: jax.Array
    answer: jax.Array
    kind: jax.Array
    text: jax.Array
    level: jax.Array


class Score(NamedTuple):
    """Of G answers to each of B questions, float32 [B, G].

    Attributes:
      reward: 1 for the right answer, 0 for another one, `-penalty` for what is no answer.
      correct: 1 for the right answer.
      invalid: 1 for what is not exactly one of the task's answers.
    """

    reward: jax.Array
    correct: jax.Array
    invalid: jax.Array


class Task(Protocol):
    """Questions without end, with rewards that can be verified."""

    @property
    def texts(self) -> "Texts":
        """Its questions and answers."""

    def sample(self, rng: jax.Array, count: int, split: str) -> Prompt:
        """Draws questions; the i-th does not depend on how many are drawn."""


class Tokenizer(Protocol):
    """Texts to token ids, and back.

    Attributes:
      pad: id that stands for no token.
      stop: id that ends an answer which is learned from.
      stops: ids any of which ends an answer that is read, `stop` among them.
      image: id whose places image features take.
    """

    @property
    def pad(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def stops(self) -> tuple[int, ...]: ...

    @property
    def image(self) -> int: ...

    def encode_prompt(self, text: str, *, images: int) -> list[int]:
        """The ids of a question about a picture of `images` image tokens."""

    def encode_completion(self, text: str) -> list[int]:
        """The ids of an answer, the stop token as last."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the ids of an answer."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a task as tokens.

    Attributes:
      prompts: every question, as text.
      answers: every answer, as text.
      prompt_tokens: int32 [Q, S], padded on the left with `pad`.
      prompt_mask: bool [Q, S].
      answer_tokens: int32 [A, T], with the stop token as last, then ABSENT.
      tokenizer: that made them.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    answer_tokens: np.ndarray
    tokenizer: Tokenizer

    @property
    def max_answer_length(self) -> int:
        """T, tokens of the longest answer, its stop token among them."""
        return self.answer_tokens.shape[1]

    def make_prompts(
        self,
        images: jax.Array,
        text: jax.Array,
        answer: jax.Array,
        kind: jax.Array,
        level: jax.Array,
    ) -> Prompt:
        """The questions with texts int32 [B] about images [B, H, W, 3]."""
        return Prompt(
            jnp.asarray(self.prompt_tokens)[text],
            jnp.asarray(self.prompt_mask)[text],
            images,
            answer,
            kind,
            text,
            level,
        )

    def labels(self, answer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tokens of answers int32 [B], int32 [B, T], and which are there, bool [B, T]."""
        rows = jnp.asarray(self.answer_tokens)[answer]
        mask = rows != ABSENT
        return jnp.where(mask, rows, self.tokenizer.pad), mask

    def parse(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Which answer tokens int32 [..., T'] are, exactly and with a stop token: int32 [...].

        Returns:
          The index of the answer; ABSENT for what is none.
        """
        # Generation ends at any of the stop tokens, the table's answers with one of them.
        is_stop = jnp.isin(tokens, jnp.array(self.tokenizer.stops))
        parsed = jnp.where(mask, jnp.where(is_stop, self.tokenizer.stop, tokens), ABSENT)
        width = max(parsed.shape[-1], self.max_answer_length)
        parsed = _pad_to_width(parsed, width)
        same = jnp.all(parsed[..., None, :] == _pad_to_width(self.answer_tokens, width), axis=-1)
        return jnp.where(jnp.any(same, axis=-1), jnp.argmax(same, axis=-1), ABSENT)

    def score(
        self, prompts: Prompt, tokens: jax.Array, mask: jax.Array, *, penalty: float
    ) -> Score:
        """Scores answers int32 [B, G, T'], of which bool [B, G, T'] tells what is there."""
        parsed = self.parse(tokens, mask)
        correct = (parsed == prompts.answer[:, None]).astype(jnp.float32)
        invalid = (parsed == ABSENT).astype(jnp.float32)
        return Score(correct - penalty * invalid, correct, invalid)


def _pad_to_width(rows: jax.Array | np.ndarray, width: int) -> jax.Array:
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])]
    return jnp.pad(jnp.asarray(rows), padding, constant_values=ABSENT)


def tokenize(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: Tokenizer | None = None,
    *,
    image_tokens: int,
) -> Texts:
    """Tokenises the texts of a task.

    Args:
      prompts: every question.
      answers: every answer.
      tokenizer: by default `WordTokenizer` of these texts.
      image_tokens: of the picture of each question.

    Raises:
      ValueError: two answers have the same ids, so that none could be told from the other.
    """
    if tokenizer is None:
        tokenizer = WordTokenizer([*prompts, *answers])
    prompt_ids = [tokenizer.encode_prompt(text, images=image_tokens) for text in prompts]
    answer_ids = [tokenizer.encode_completion(text) for text in answers]
    for i, ids in enumerate(answer_ids):
        if ids in answer_ids[:i]:
            same = answers[answer_ids.index(ids)], answers[i]
            raise ValueError(
                f"The answers {same[0]!r} and {same[1]!r} have the same tokens {ids}; the "
                "tokenizer does not know one of them."
            )
    width = max(map(len, prompt_ids))
    tokens = np.array([[tokenizer.pad] * (width - len(ids)) + ids for ids in prompt_ids], np.int32)
    mask = np.array([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompt_ids])
    longest = max(map(len, answer_ids))
    rows = np.array([ids + [ABSENT] * (longest - len(ids)) for ids in answer_ids], np.int32)
    return Texts(tuple(prompts), tuple(answers), tokens, mask, rows, tokenizer)


class WordTokenizer:
    """A tokenizer of whole words, for models that are trained from scratch on one task.

    Attributes:
      words: the word with id i + 3.
    """

    pad, stop, image = 0, 1, 2
    stops = (1,)

    def __init__(self, texts: Sequence[str]):
        self.words = tuple(sorted({word for text in texts for word in text.split()}))

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.words) + 3

    def encode_prompt(self, text: str, *, images: int) -> list[int]:
        """See `Tokenizer`; for errors `encode`."""
        return [self.image] * images + self.encode(text)

    def encode_completion(self, text: str) -> list[int]:
        """See `Tokenizer`; for errors `encode`."""
        return [*self.encode(text), self.stop]

    def encode(self, text: str) -> list[int]:
        """The ids of the words of `text`.

        Raises:
          ValueError: a word that is none of `words`.
        """
        unknown = [word for word in text.split() if word not in self.words]
        if unknown:
            raise ValueError(f"Words {unknown} of {text!r} are none of {self.words}.")
        return [self.words.index(word) + 3 for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer`; the stop token is no word either."""
        return " ".join(self.words[int(t) - 3] for t in tokens if int(t) >= 3)
