"""A task of questions about images of colored shapes, whose answers depend on the image.

    count     how many red circles ?                           0 .. maximum count
    exists    is there a red circle ?                          yes, no
    colour    what colour is the circle ?                      one of COLORS
    shape     what shape is red ?                              one of SHAPES
    compare   are there more red circles than blue squares ?   yes, no
    relation  is the red circle left of the blue square ?      yes, no

For each question text, all answers are equally likely, so that a policy that ignores the image is
at chance. The split 'heldout_pair' therefore has only kinds of questions that name a pair of color
and shape: at most one shape of each color is held out, so that the answer to 'colour' or 'shape'
would always be the one that never occurs in training.

The difficulty levels differ in the objects that a question is not about, see `LEVELS`. The same
PRNG key gives the same questions and answers at all levels.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.tasks.prompts import Prompt, Texts, Tokenizer, tokenize
from mmrl_jax.tasks.scenes import COLORS, MIN_RADIUS, SHAPES, Objects, render

KINDS = ("count", "exists", "colour", "shape", "compare", "relation")
# Kinds whose texts name both color and shape.
PAIR_KINDS = ("count", "exists", "compare", "relation")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
# The last template of each kind is reserved for the split 'heldout_template'.
TEMPLATES = {
    "count": ("how many {as_} ?", "count the {as_} .", "what is the number of {as_} ?"),
    "exists": ("is there a {a} ?", "can you see a {a} ?", "does the picture show a {a} ?"),
    "colour": ("what colour is the {s} ?", "name the colour of the {s} .", "the {s} is what ?"),
    "shape": ("what shape is {c} ?", "name the shape that is {c} .", "the {c} one is what ?"),
    "compare": (
        "are there more {as_} than {bs} ?",
        "do the {as_} outnumber the {bs} ?",
        "is the number of {as_} greater than that of {bs} ?",
    ),
    "relation": (
        "is the {a} left of the {b} ?",
        "is the {b} right of the {a} ?",
        "does the {a} stand to the left of the {b} ?",
    ),
}
SPLITS = ("train", "heldout_pair", "heldout_count", "heldout_layout", "heldout_template")
PAIRS = len(COLORS) * len(SHAPES)
# Pairs of color and shape that occur in no question and no image of the training split.
HELDOUT_PAIR = np.array(
    [(pair // len(SHAPES) + pair % len(SHAPES)) % 6 == 0 for pair in range(PAIRS)]
)


class Level(NamedTuple):
    """Parameters of a difficulty level.

    A distractor is an object that a question is not about. The named objects are those in the text
    of the question.

    Attributes:
      min_distractors: Minimum number of distractors, as a fraction of the task's maximum.
      max_distractors: Maximum number of distractors, as a fraction of the task's maximum.
      distinct: Whether distractors share neither color nor shape with the named objects. For the
        kinds 'colour' and 'shape', distractors never share the named property, because the answer
        would be ambiguous.
      similar_one: Probability that a distractor is sampled from the pairs that share color or shape
        with the named object, for questions that name one object.
      similar_two: The same probability for questions that name two objects, for which uniformly
        sampled pairs share a property more often.
      radius: Minimum radius of an object relative to the side of a cell.
      spread: Maximum radius minus minimum radius, relative to the side of a cell.
    """

    min_distractors: float
    max_distractors: float
    distinct: bool
    similar_one: float
    similar_two: float
    radius: float
    spread: float


LEVELS = {
    # Few distractors, which differ from the named objects in color and shape; large objects.
    "easy": Level(0.0, 0.5, True, 0.0, 0.0, 0.36, 0.06),
    # Any number of distractors, two thirds of which share color or shape with a named object.
    "medium": Level(0.0, 1.0, False, 0.5, 0.0, 0.30, 0.12),
    # Many distractors, all of which share color or shape with a named object; small objects.
    "hard": Level(0.5, 1.0, False, 1.0, 1.0, 0.23, 0.07),
}


class QuestionSpec(NamedTuple):
    """A sampled question before its image is rendered.

    Attributes:
      pairs: Color and shape of a list of objects, int32 [C], as long as there are cells.
      number: Number of objects from the front of the list that are in the image, int32 [].
      text: Index into the texts of the kind, int32 [].
      answer: Index into all answers, int32 []. The answer of the kind 'relation' is determined
        later, by the cells of the objects.
    """

    pairs: jax.Array
    number: jax.Array
    text: jax.Array
    answer: jax.Array


def _name(pair: int) -> str:
    return f"{COLORS[pair // len(SHAPES)]} {SHAPES[pair % len(SHAPES)]}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def _texts(kind: str) -> list[str]:
    """Returns all texts of a kind, ordered by template, then by the first and the second object."""
    names = [_name(pair) for pair in range(PAIRS)]
    subjects = {
        "colour": [{"s": shape} for shape in SHAPES],
        "shape": [{"c": color} for color in COLORS],
    }.get(kind, [{"a": name, "as_": _plural(name)} for name in names])
    if kind in ("compare", "relation"):
        subjects = [
            {"a": a, "as_": _plural(a), "b": b, "bs": _plural(b)} for a in names for b in names
        ]
    return [template.format(**subject) for template in TEMPLATES[kind] for subject in subjects]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The task, which `make` creates.

    Attributes:
      texts: Texts and tokens of all prompts and answers.
      kinds: Kinds of questions, which are sampled with equal probabilities.
      rows: Number of rows and columns of the grid; an image has at most rows * rows objects.
      height: Height of the images in pixels.
      width: Width of the images in pixels.
      counts: Minimum and maximum count of the kind 'count', both inclusive.
      seen: Minimum and maximum count in the training split, both inclusive. The other counts form
        the split 'heldout_count'.
      distractors: Maximum number of objects that a question is not about.
      levels: Names of difficulty levels, which are sampled with equal probabilities.
    """

    texts: Texts
    kinds: tuple[str, ...]
    rows: int
    height: int
    width: int
    counts: tuple[int, int]
    seen: tuple[int, int]
    distractors: int
    levels: tuple[str, ...]

    def sample(self, rng: jax.Array, count: int, split: str) -> Prompt:
        """Samples `count` prompts of a split. Prompt i does not depend on `count`.

        Args:
          rng: PRNG key.
          count: Number of prompts.
          split: Name of the split, one of SPLITS.

        Raises:
          ValueError: If the split is unknown, or has no questions with the kinds and counts of the
            task.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {SPLITS}.")
        if split == "heldout_count" and "count" not in self.kinds:
            raise ValueError(
                f"split='heldout_count', but kinds={self.kinds} has no 'count': add it, or remove "
                "the split."
            )
        if split == "heldout_count" and not self._split_counts(split).size:
            raise ValueError(
                f"split='heldout_count', but seen={self.seen} leaves none of counts={self.counts}."
            )
        if not self._split_kinds(split):
            raise ValueError(
                f"split={split!r}, but kinds={self.kinds} has none of {PAIR_KINDS}: add one, or "
                "remove the split."
            )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
        return self.texts.make_prompts(*jax.vmap(functools.partial(self._one, split=split))(keys))

    def with_train_counts(self, seen: tuple[int, int]) -> "Shapes":
        """Returns the same task with other counts in its training split.

        Raises:
          ValueError: If the counts are invalid, see `make`.
        """
        _check_counts(self.kinds, self.counts, seen)
        return dataclasses.replace(self, seen=seen)

    def _split_kinds(self, split: str) -> tuple[str, ...]:
        """Returns the kinds of questions in a split."""
        valid = {"heldout_count": ("count",), "heldout_pair": PAIR_KINDS}.get(split, KINDS)
        return tuple(kind for kind in self.kinds if kind in valid)

    def _split_counts(self, split: str) -> np.ndarray:
        """Returns the counts that occur as answers in a split."""
        counts = np.arange(self.counts[0], self.counts[1] + 1)
        seen = (counts >= self.seen[0]) & (counts <= self.seen[1])
        return counts[~seen] if split == "heldout_count" else counts[seen]

    def _one(self, rng: jax.Array, *, split: str) -> tuple[jax.Array, ...]:
        """Samples image, text, answer, kind and level of one prompt."""
        kind_key, prompt_key, cell_key, render_key = jax.random.split(rng, 4)
        kinds = self._split_kinds(split)
        kind_index = jax.random.randint(kind_key, (), 0, len(kinds))
        level_index = jax.random.randint(jax.random.fold_in(kind_key, 1), (), 0, len(self.levels))
        level = self._level(level_index)
        branches = [functools.partial(self._sample_spec, kind=kind, split=split) for kind in kinds]
        spec = jax.lax.switch(kind_index, branches, prompt_key, level)
        cells = self._cells(cell_key, spec.number, split)
        order = jnp.argsort(cells)  # Index in the list of the object in each cell.
        pair = spec.pairs[order]
        objects = Objects(pair % len(SHAPES), pair // len(SHAPES), order < spec.number)
        image = render(
            render_key,
            objects,
            rows=self.rows,
            height=self.height,
            width=self.width,
            radius=level.radius,
            spread=level.spread,
        )
        column = cells % self.rows
        left = jnp.where(column[0] < column[1], self._answer("yes"), self._answer("no"))
        numbers = np.array([self.kinds.index(kind) for kind in kinds])
        first = np.cumsum([0] + [len(_texts(kind)) for kind in self.kinds])[numbers]
        is_relation = jnp.array([kind == "relation" for kind in kinds])[kind_index]
        return (
            image,
            jnp.asarray(first)[kind_index] + spec.text,
            jnp.where(is_relation, left, spec.answer),
            jnp.asarray(numbers)[kind_index],
            level_index,
        )

    def _level(self, index: jax.Array) -> Level:
        """Returns a level by its traced index, with integer numbers of distractors."""
        rows = [
            LEVELS[name]._replace(
                min_distractors=math.ceil(LEVELS[name].min_distractors * self.distractors),
                max_distractors=math.floor(LEVELS[name].max_distractors * self.distractors),
            )
            for name in self.levels
        ]
        return jax.tree.map(lambda *column: jnp.asarray(column)[index], *rows)

    def _answer(self, text: str) -> int:
        return self.texts.answers.index(text)

    def _cells(self, rng: jax.Array, number: jax.Array, split: str) -> jax.Array:
        """Samples the cell of each of C objects, of which the first `number` are in the image.

        The first two objects are in different columns, in either order with equal probability. The
        middle cell is empty except in the split 'heldout_layout', where it contains one of these
        two objects.

        Args:
          rng: PRNG key.
          number: Number of objects in the image, int32 [].
          split: Name of the split.

        Returns:
          Index of the cell of each object, int32 [C].
        """
        order_key, swap_key = jax.random.split(rng)
        indices = np.arange(self.rows**2)
        middle = indices == (self.rows + 1) * (self.rows // 2)
        middle_score = -1.0 if split == "heldout_layout" else 1.0
        score = jax.random.uniform(order_key, indices.shape)
        cells = jnp.argsort(jnp.where(middle, middle_score, score))
        column = jnp.asarray(indices % self.rows)[cells]
        second = jnp.argmax(column != column[0])
        cells = cells.at[1].set(cells[second]).at[second].set(cells[1])
        # With an even number of rows, the middle cell has more columns on one side than on the
        # other.
        swapped = jax.random.bernoulli(swap_key) & (number > 1)
        return jnp.where(swapped, cells.at[:2].set(cells[1::-1]), cells)

    def _sample_spec(self, rng: jax.Array, level: Level, *, kind: str, split: str) -> QuestionSpec:
        """Samples a question of one kind, with its objects but without their cells."""
        pair_key, number_key, others_key, distractor_key, template_key, side_key = jax.random.split(
            rng, 6
        )
        cells, pairs = self.rows**2, np.arange(PAIRS)
        train_pairs = jnp.asarray(~HELDOUT_PAIR)
        named_pairs = jnp.asarray(HELDOUT_PAIR) if split == "heldout_pair" else train_pairs

        def sample(key: jax.Array, mask: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
            return jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf), shape=shape)

        a_key, b_key = jax.random.split(pair_key)
        a = sample(a_key, named_pairs)
        b = sample(b_key, named_pairs & (pairs != a))
        color, shape = pairs // len(SHAPES), pairs % len(SHAPES)
        yes = jax.random.bernoulli(side_key).astype(jnp.int32)
        bounds = level.min_distractors, level.max_distractors + 1
        distractors = jax.random.randint(distractor_key, (), *bounds)
        yes_no = jnp.where(yes > 0, self._answer("yes"), self._answer("no"))
        other, number_b = pairs != a, jnp.zeros((), jnp.int32)
        if kind == "count":
            number_a = jax.random.choice(number_key, jnp.asarray(self._split_counts(split)))
            subject, answer = a, number_a - self.counts[0]
        elif kind == "exists":
            # The number of objects in the image must not depend on the answer.
            number_a, distractors, subject, answer = yes, distractors + 1 - yes, a, yes_no
        elif kind == "colour":
            number_a, subject, other = jnp.ones((), jnp.int32), shape_of(a), shape != shape_of(a)
            answer = self._answer(COLORS[0]) + color_of(a)
        elif kind == "shape":
            number_a, subject, other = jnp.ones((), jnp.int32), color_of(a), color != color_of(a)
            answer = self._answer(SHAPES[0]) + shape_of(a)
        else:
            subject, other, answer = a * PAIRS + b, (pairs != a) & (pairs != b), yes_no
            number_a = number_b = jnp.ones((), jnp.int32)
            if kind == "compare":
                # Held-out counts do not occur in comparisons either.
                larger = jax.random.randint(number_key, (), self.seen[0] + 1, self.seen[1] + 1)
                smaller = jax.random.randint(others_key, (), self.seen[0], larger)
                number_a = jnp.where(yes > 0, larger, smaller)
                number_b = larger + smaller - number_a
        index = jnp.arange(cells)
        any_key, similar_key, mix_key = (jax.random.fold_in(others_key, i) for i in (1, 2, 3))
        if kind in PAIR_KINDS:
            # Distractors that share color or shape with a named object make both necessary.
            similar = (color == color_of(a)) | (shape == shape_of(a))
            probability = level.similar_one
            if kind in ("compare", "relation"):
                similar |= (color == color_of(b)) | (shape == shape_of(b))
                probability = level.similar_two
            any_pairs = sample(any_key, train_pairs & other & ~(level.distinct & similar), (cells,))
            similar_pairs = sample(similar_key, train_pairs & other & similar, (cells,))
            use_similar = jax.random.bernoulli(mix_key, probability, (cells,))
            objects = jnp.where(use_similar, similar_pairs, any_pairs)
        else:
            objects = sample(any_key, train_pairs & other, (cells,))
        objects = jnp.where(index < number_a + number_b, b, objects)
        objects = jnp.where(index < number_a, a, objects)
        subjects = len(_texts(kind)) // len(TEMPLATES[kind])
        last = len(TEMPLATES[kind]) - 1
        template = jax.random.randint(template_key, (), 0, last)
        if split == "heldout_template":
            template = jnp.full((), last)
        text = template * subjects + subject
        return QuestionSpec(objects, number_a + number_b + distractors, text, answer)


def color_of(pair: jax.Array) -> jax.Array:
    """Returns the index into COLORS of a pair of color and shape."""
    return pair // len(SHAPES)


def shape_of(pair: jax.Array) -> jax.Array:
    """Returns the index into SHAPES of a pair of color and shape."""
    return pair % len(SHAPES)


def make(
    *,
    kinds: Sequence[str],
    rows: int,
    height: int,
    width: int,
    counts: tuple[int, int],
    seen: tuple[int, int],
    distractors: int,
    levels: Sequence[str],
    image_tokens: int,
    tokenizer: Tokenizer | None = None,
) -> Shapes:
    """Makes the task.

    Args:
      kinds: Kinds of questions, a subset of KINDS.
      rows: Number of rows and columns of the grid.
      height: Height of the images in pixels.
      width: Width of the images in pixels.
      counts: Minimum and maximum count of the kind 'count', both inclusive.
      seen: Minimum and maximum count in the training split, both inclusive.
      distractors: Maximum number of objects that a question is not about.
      levels: Names of difficulty levels, a subset of LEVELS.
      image_tokens: Number of tokens of an image in the prompt.
      tokenizer: Tokenizer of the prompts and answers; None for a `WordTokenizer` of the texts.

    Raises:
      ValueError: If a kind or level is unknown, the counts are invalid, there may be more objects
        than cells, or objects are so small that their shapes cannot be distinguished.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds has {kind!r}, which is not one of {KINDS}.")
    if not kinds:
        raise ValueError(f"kinds is empty; choose from {KINDS}.")
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"levels has {level!r}, which is not one of {tuple(LEVELS)}.")
        pixels = math.ceil(MIN_RADIUS / LEVELS[level].radius)
        if min(height, width) < pixels * rows:
            raise ValueError(
                f"levels has {level!r}, whose smallest shapes cannot be distinguished in cells of "
                f"less than {pixels} pixels: height={height} and width={width} must be at least "
                f"{pixels * rows} with rows={rows}."
            )
    if not levels or len(set(levels)) < len(levels):
        raise ValueError(
            f"levels={tuple(levels)} must be a non-empty subset of {tuple(LEVELS)} without "
            "duplicates."
        )
    _check_counts(kinds, counts, seen)
    max_objects = max(2 * counts[1] - 1 if "compare" in kinds else counts[1], 2) + distractors
    if max_objects >= rows**2:
        raise ValueError(
            f"counts={counts} and distractors={distractors} may need {max_objects} objects, but "
            f"rows={rows} gives {rows**2} cells, of which one is empty in training."
        )
    prompts = [text for kind in kinds for text in _texts(kind)]
    answers = list(NUMBERS[counts[0] : counts[1] + 1]) if "count" in kinds else []
    answers += [*COLORS, *SHAPES, "yes", "no"]
    texts = tokenize(prompts, answers, tokenizer, image_tokens=image_tokens)
    return Shapes(
        texts, tuple(kinds), rows, height, width, counts, seen, distractors, tuple(levels)
    )


def _check_counts(kinds: Sequence[str], counts: tuple[int, int], seen: tuple[int, int]) -> None:
    """Raises ValueError if the counts are invalid for the kinds of questions."""
    if not 0 <= counts[0] <= seen[0] <= seen[1] <= counts[1] < len(NUMBERS):
        raise ValueError(
            f"counts={counts} and seen={seen} must be 0 <= counts[0] <= seen[0] <= seen[1] <= "
            f"counts[1] <= {len(NUMBERS) - 1}."
        )
    if "compare" in kinds and seen[0] == seen[1]:
        raise ValueError(
            f"seen={seen} is a single count, but kinds has 'compare', which needs two different "
            "counts: widen the range."
        )
