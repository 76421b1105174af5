"""Prompts about images, their tokens, and rewards of completions by exact match, inside `jit`.

A task has finitely many texts. Each is tokenized once, on the host, by the tokenizer of the model;
inside `jit`, a prompt is a row of a table of tokens.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1  # No token in a table of answers, and no answer among their indices.


class Prompt(NamedTuple):
    """A batch of B prompts, each with an image if the model takes images.

    Attributes:
      tokens: Token ids, image tokens included, padded on the left, int32 [B, S].
      mask: False for padding, bool [B, S].
      images: Images, uint8 [B, H, W, 3]; None for prompts without images.
      answer: Index of the correct answer in `Texts.answers`, int32 [B].
      kind: Index of the kind of prompt among the task's kinds, int32 [B].
      text: Index of the prompt's text in `Texts.prompts`, int32 [B].
      level: Index of the level of difficulty among the task's levels, int32 [B].
    """

    tokens: jax.Array
    mask: jax.Array
    images: jax.Array
    answer: jax.Array
    kind: jax.Array
    text: jax.Array
    level: jax.Array


class Score(NamedTuple):
    """Scores of G completions of each of B prompts.

    Attributes:
      reward: 1 for the correct answer, 0 for another answer, and `-penalty` for any other text,
        float32 [B, G].
      correct: 1 for the correct answer, float32 [B, G].
      invalid: 1 for a completion that is none of the task's answers, float32 [B, G].
    """

    reward: jax.Array
    correct: jax.Array
    invalid: jax.Array


class Task(Protocol):
    """A task that samples prompts on the device and has verifiable rewards."""

    @property
    def texts(self) -> "Texts":
        """The prompts and answers of the task."""

    def sample(self, rng: jax.Array, count: int, split: str) -> Prompt:
        """Samples `count` prompts of a split; the i-th prompt does not depend on `count`."""


class Tokenizer(Protocol):
    """Converts texts to token ids and back.

    Attributes:
      pad: Token id of padding.
      stop: Token id that ends a completion which is learned from.
      stops: Token ids any of which ends a generated completion; they include `stop`.
      image: Token id of an image feature.
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
        """Returns the token ids of a prompt about an image of `images` image tokens."""

    def encode_completion(self, text: str) -> list[int]:
        """Returns the token ids of a completion, which end with the stop token."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of the token ids of a completion."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a task as tokens.

    Attributes:
      prompts: The texts of all Q prompts.
      answers: The texts of all A answers.
      prompt_tokens: Token ids of the prompts, padded on the left, int32 [Q, S].
      prompt_mask: False for padding, bool [Q, S].
      answer_tokens: Token ids of the answers, each ending with the stop token and followed by
        ABSENT, int32 [A, T].
      tokenizer: Tokenizer of the texts.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    answer_tokens: np.ndarray
    tokenizer: Tokenizer

    @property
    def max_answer_length(self) -> int:
        """Number T of tokens of the longest answer, its stop token included."""
        return self.answer_tokens.shape[1]

    def make_prompts(
        self,
        images: jax.Array,
        text: jax.Array,
        answer: jax.Array,
        kind: jax.Array,
        level: jax.Array,
    ) -> Prompt:
        """Returns B prompts.

        Args:
          images: Images, uint8 [B, H, W, 3].
          text: Index of each prompt's text in `prompts`, int32 [B].
          answer: Index of the correct answer in `answers`, int32 [B].
          kind: Index of the kind of prompt among the task's kinds, int32 [B].
          level: Index of the level of difficulty among the task's levels, int32 [B].
        """
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
        """Returns the tokens int32 [B, T] and the mask bool [B, T] of answers int32 [B]."""
        rows = jnp.asarray(self.answer_tokens)[answer]
        mask = rows != ABSENT
        return jnp.where(mask, rows, self.tokenizer.pad), mask

    def parse(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the answer that each completion is, by exact match including a stop token.

        Args:
          tokens: Tokens of the completions, int32 [..., T'].
          mask: False for padding, bool [..., T'].

        Returns:
          The index of the answer in `answers`, or ABSENT for any other text, int32 [...].
        """
        # Any of the stop tokens ends a completion, but the table has only one of them.
        is_stop = jnp.isin(tokens, jnp.array(self.tokenizer.stops))
        parsed = jnp.where(mask, jnp.where(is_stop, self.tokenizer.stop, tokens), ABSENT)
        width = max(parsed.shape[-1], self.max_answer_length)
        parsed = _pad_to_width(parsed, width)
        same = jnp.all(parsed[..., None, :] == _pad_to_width(self.answer_tokens, width), axis=-1)
        return jnp.where(jnp.any(same, axis=-1), jnp.argmax(same, axis=-1), ABSENT)

    def score(
        self, prompts: Prompt, tokens: jax.Array, mask: jax.Array, *, penalty: float
    ) -> Score:
        """Scores G completions of each prompt.

        Args:
          prompts: B prompts.
          tokens: Tokens of the completions, int32 [B, G, T'].
          mask: False for padding, bool [B, G, T'].
          penalty: Reward that is subtracted if a completion is none of the answers.
        """
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
    """Tokenizes the texts of a task.

    Args:
      prompts: Texts of all prompts.
      answers: Texts of all answers.
      tokenizer: Tokenizer of the model; by default a `WordTokenizer` of these texts.
      image_tokens: Number of image tokens of the image of each prompt.

    Raises:
      ValueError: Two answers have the same token ids.
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
    tokens, mask = pad_left(prompt_ids, width, tokenizer.pad)
    longest = max(map(len, answer_ids))
    rows = np.array([ids + [ABSENT] * (longest - len(ids)) for ids in answer_ids], np.int32)
    return Texts(tuple(prompts), tuple(answers), tokens, mask, rows, tokenizer)


def pad_left(rows: Sequence[Sequence[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids on the left; returns ids int32 [B, width] and their mask bool."""
    tokens = np.array([[*[pad] * (width - len(ids)), *ids] for ids in rows], np.int32)
    return tokens, np.arange(width) >= width - np.array([len(ids) for ids in rows])[:, None]


def free_prompts(tokens: np.ndarray, mask: np.ndarray, images: np.ndarray) -> Prompt:
    """Returns B prompts of no task on the host, whose indices into its texts are unused and 0."""
    unused = np.zeros(len(tokens), np.int32)
    arrays: tuple[Any, ...] = tokens, mask, images, *(unused,) * 4
    return Prompt(*arrays)


class WordTokenizer:
    """A tokenizer of whole words, for models that are trained from scratch on one task.

    Args:
      texts: Texts whose words are the vocabulary.

    Attributes:
      words: The vocabulary; word i has the token id i + 3.
    """

    pad, stop, image = 0, 1, 2
    stops = (1,)

    def __init__(self, texts: Sequence[str]):
        self.words = tuple(sorted({word for text in texts for word in text.split()}))

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.words) + 3

    def encode_prompt(self, text: str, *, images: int) -> list[int]:
        """See `Tokenizer` and `encode`."""
        return [self.image] * images + self.encode(text)

    def encode_completion(self, text: str) -> list[int]:
        """See `Tokenizer` and `encode`."""
        return [*self.encode(text), self.stop]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of the words of a text.

        Raises:
          ValueError: The text has a word that is not in `words`.
        """
        unknown = [word for word in text.split() if word not in self.words]
        if unknown:
            raise ValueError(
                f"The words {unknown} of {text!r} are not in the vocabulary {self.words}."
            )
        return [self.words.index(word) + 3 for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer`; padding, stop and image tokens are left out."""
        return " ".join(self.words[int(t) - 3] for t in tokens if int(t) >= 3)
