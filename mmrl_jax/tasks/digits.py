"""A task on real images: the sum of two handwritten digits, which stand side by side.

    sum      what is the sum of the two digits ?    0 .. 18
    caption  which two digits are these ?           two digits

The digits are the 1,797 images of 8x8 pixels in scikit-learn (`load_digits`), the test set of
Alpaydin and Kaynak (1998). They were written by 13 people, but which image is whose is not known.
Each image that is made has two of them, enlarged and shifted at random.

    train           sums of the training pairs, with the training images
    caption         captions of the same pairs and images, for example to align a projector
    heldout_pair    sums of pairs of digits that occur in no other split
    heldout_sample  sums of the training pairs, with images that occur in no other split

For each text and split, all answers are equally likely, so that a policy that ignores the image is
at chance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmrl_jax.tasks.prompts import Prompt, Tokenizer, tokenize

TEXTS = ("what is the sum of the two digits ?", "which two digits are these ?")
SPLITS = ("train", "caption", "heldout_pair", "heldout_sample")
# Two digits that differ by one of these numbers are a held-out pair, in either order. Every digit,
# and every sum, also occurs in a training pair.
HELDOUT_DIFFERENCES = (3, 4)
# Fraction of the images, from the front of the data set, that are for training. The split is by
# position because neighbors are more often of the same writer.
TRAIN_FRACTION = 0.75
MIN_SIDE = 8  # Of an enlarged digit in pixels: that of the original.


class Digits:
    """The task; `docs/extending.md` describes the interface of a task.

    Args:
      height: Height of the images in pixels.
      width: Width of the images in pixels.
      image_tokens: Number of tokens of an image in the prompt.
      tokenizer: Tokenizer of the prompts and answers; None for a `WordTokenizer` of the texts.

    Attributes:
      splits: Names of the splits, of which the first is the training split.
      training_splits: Names of the splits from which a stage may learn.
      texts: Texts and tokens of all prompts and answers: the sums 0 to 18, then the captions.

    Raises:
      ValueError: If the images are too small for two digits, or scikit-learn is not installed.
    """

    splits = SPLITS
    training_splits = ("train", "caption")

    def __init__(
        self, *, height: int, width: int, image_tokens: int, tokenizer: Tokenizer | None = None
    ):
        # A digit fills three quarters of its half of the image.
        side = 3 * min(height, width // 2) // 4
        if side < MIN_SIDE:
            raise ValueError(
                f"task.height={height} and task.width={width} leave {side} pixels for the side of "
                f"a digit; at least {MIN_SIDE} are needed, as with height=11 and width=22."
            )
        self._size, self._side = (height, width), side
        digits, labels = load()
        self._images = np.stack([_resize(digit, side) for digit in digits])
        self._train, self._heldout = (_Pool(labels, part) for part in parts(len(labels)))
        answers = [str(total) for total in range(19)]
        answers += [f"{a} {b}" for a in range(10) for b in range(10)]
        self.texts = tokenize(TEXTS, answers, tokenizer, image_tokens=image_tokens)

    def sample(self, rng: jax.Array, count: int, split: str) -> Prompt:
        """Samples `count` prompts of a split. Prompt i does not depend on `count`.

        Args:
          rng: PRNG key.
          count: Number of prompts.
          split: Name of the split, one of SPLITS.

        Raises:
          ValueError: If the split is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {SPLITS}.")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
        return self.texts.make_prompts(*jax.vmap(functools.partial(self._one, split=split))(keys))

    def _one(self, rng: jax.Array, *, split: str) -> tuple[jax.Array, ...]:
        """Samples image, text, answer, kind and level of one prompt."""
        shift_key, pair_key, *digit_keys = jax.random.split(rng, 4)
        chosen = pairs(heldout=split == "heldout_pair")
        sums = chosen.sum(axis=1)
        weights = np.ones(len(chosen))
        if split != "caption":  # All sums are equally likely, and so are the pairs of a sum.
            weights = 1 / np.bincount(sums)[sums]
        index = jax.random.choice(pair_key, len(chosen), p=jnp.asarray(weights / weights.sum()))
        pair, is_caption = jnp.asarray(chosen)[index], int(split == "caption")
        pool = self._heldout if split == "heldout_sample" else self._train
        image = self._render(
            shift_key, [pool.sample(k, d) for k, d in zip(digit_keys, pair, strict=True)]
        )
        answer = 19 + 10 * pair[0] + pair[1] if is_caption else pair[0] + pair[1]
        text = jnp.full((), is_caption, jnp.int32)
        return image, text, answer, text, jnp.zeros((), jnp.int32)

    def _render(self, rng: jax.Array, digits: list[jax.Array]) -> jax.Array:
        """Returns an image uint8 [H, W, 3] of two digits, given as indices into all images."""
        (height, width), side = self._size, self._side
        shift = min(height, width // 2) - side  # Maximum shift in pixels, down and to the right.
        shifts = jax.random.randint(rng, (2, 2), 0, shift + 1)
        top = (height - side - shift) // 2
        canvas = jnp.zeros((height, width), jnp.uint8)
        for i, index in enumerate(digits):
            start = top + shifts[i, 0], i * (width // 2) + shifts[i, 1]
            digit = jnp.asarray(self._images)[index]
            canvas = jax.lax.dynamic_update_slice(canvas, digit, start)
        return jnp.broadcast_to(canvas[..., None], (height, width, 3))


class _Pool:
    """The images of a part of the data set, by their digit.

    Args:
      labels: Digit of each image of the data set, int [N].
      part: Indices of the images of the part, int [M].
    """

    def __init__(self, labels: np.ndarray, part: np.ndarray):
        self._order = part[np.argsort(labels[part], kind="stable")]
        self._count = np.bincount(labels[part], minlength=10)
        self._first = np.cumsum(self._count) - self._count

    def sample(self, rng: jax.Array, digit: jax.Array) -> jax.Array:
        """Returns the index int32 [] of a random image of a digit int32 []."""
        offset = jax.random.randint(rng, (), 0, jnp.asarray(self._count)[digit])
        return jnp.asarray(self._order)[jnp.asarray(self._first)[digit] + offset]


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [1797, 8, 8], and their digits, int64 [1797].

    Raises:
      ValueError: If scikit-learn, which has the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"task.name='digits' reads the images in scikit-learn, which cannot be imported "
            f"({error}): pip install scikit-learn"
        ) from error
    data = load_digits()
    return np.round(data.images * 255 / 16).astype(np.uint8), data.target


def parts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the images for training, and of those that are held out, of all."""
    first = round(TRAIN_FRACTION * count)
    return np.arange(first), np.arange(first, count)


def pairs(*, heldout: bool) -> np.ndarray:
    """Returns the held-out pairs of digits, or the training pairs, int64 [P, 2]."""
    every = np.array([(a, b) for a in range(10) for b in range(10)])
    is_heldout = np.isin(np.abs(every[:, 0] - every[:, 1]), HELDOUT_DIFFERENCES)
    return every[is_heldout == heldout]


def _resize(digit: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BILINEAR))
