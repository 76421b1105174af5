"""Instructions as word tokens: a vocabulary, and templates that are filled inside `jit`."""

from collections.abc import Sequence
import itertools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

PAD = 0


@struct.dataclass
class Vocabulary:
    """A closed vocabulary; token 0 is padding, and word i has token i + 1.

    Attributes:
      words: Words in lower case, without repetition.
      length: Length L to which instructions are padded.
      sentences: All possible instructions, including held-out ones.
    """

    words: tuple[str, ...] = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)
    sentences: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        """Number of token ids, including padding."""
        return len(self.words) + 1

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens int32 [L] of `text`.

        Raises:
          ValueError: A word is not in the vocabulary, or there are more than L words.
        """
        words = text.lower().split()
        unknown = [w for w in words if w not in self.words]
        if unknown:
            raise ValueError(f"Words {unknown} of {text!r} are not in the vocabulary {self.words}.")
        if len(words) > self.length:
            raise ValueError(f"{text!r} has {len(words)} words; at most {self.length} fit.")
        tokens = np.full(self.length, PAD, np.int32)
        tokens[: len(words)] = [self.words.index(w) + 1 for w in words]
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the words of tokens int [L] as text, without padding."""
        return " ".join(self.words[int(t) - 1] for t in tokens if int(t) != PAD)


def instruction(tokens: jax.Array) -> dict[str, jax.Array]:
    """Returns the observation entry {'tokens', 'mask'} of tokens int32 [..., L]."""
    return {"tokens": tokens, "mask": tokens != PAD}


class Templates:
    """Sentences with named slots, e.g. 'touch the {color} {shape}', that are filled inside `jit`.

    Args:
      sentences: Templates; each word is a plain word or a slot '{name}'.
      slots: Words that may fill a slot, by the name of the slot.
      length: Length L of the tokens; None for that of the longest sentence.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        slots: dict[str, Sequence[str]],
        length: int | None = None,
    ):
        split = [s.split() for s in sentences]
        plain = {w for s in split for w in s if not w.startswith("{")}
        filled = {w for words in slots.values() for w in words}
        self.sentences = tuple(sentences)
        self.slots = {name: tuple(words) for name, words in slots.items()}
        self.vocabulary = Vocabulary(
            words=tuple(sorted(plain | filled)),
            length=length or max(map(len, split)),
            sentences=tuple(s for sentence in split for s in self._fillings(sentence)),
        )
        names = list(self.slots)
        table = np.full((len(split), self.vocabulary.length), PAD, np.int32)
        for i, sentence in enumerate(split):
            for j, word in enumerate(sentence):
                if word.startswith("{"):
                    table[i, j] = -1 - names.index(word[1:-1])
                else:
                    table[i, j] = self.vocabulary.words.index(word) + 1
        self._table = table
        self._tokens = {
            name: np.array([self.vocabulary.words.index(w) + 1 for w in words], np.int32)
            for name, words in self.slots.items()
        }

    def _fillings(self, sentence: Sequence[str]) -> list[str]:
        choices = [self.slots[w[1:-1]] if w.startswith("{") else (w,) for w in sentence]
        return [" ".join(words) for words in itertools.product(*choices)]

    def fill(self, sentence: jax.Array, **words: jax.Array) -> jax.Array:
        """Fills a template.

        Args:
          sentence: Index of the template, int [].
          **words: Index of the word that fills each slot, int [], by the name of the slot.

        Returns:
          Tokens of the instruction, int32 [L].
        """
        tokens = jnp.asarray(self._table)[sentence]
        for i, name in enumerate(self.slots):
            tokens = jnp.where(
                tokens == -1 - i, jnp.asarray(self._tokens[name])[words[name]], tokens
            )
        return tokens
