"""Questions about pictures of colored shapes, with answers that the picture alone decides.

    count     how many red circles ?                           0 .. the most
    exists    is there a red circle ?                          yes, no
    colour    what colour is the circle ?                      one of COLORS
    shape     what shape is red ?                              one of SHAPES
    compare   are there more red circles than blue squares ?   yes, no
    relation  is the red circle left of the blue square ?      yes, no

Whatever the question's text, all of its answers are equally likely: who does not look is at chance.
For this the split 'heldout_pair' asks only kinds that name a pair. One shape of each color at most
is held out, so that the answer to 'colour' or 'shape' would be the one that training never gives.

A level makes pictures easier or harder to read by what is not asked for, see `LEVELS`. From the
same key all levels ask the same questions, with the same answers.
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
from mmrl_jax.tasks.scenes import COLORS, LEAST_RADIUS, SHAPES, Objects, draw

KINDS = ("count", "exists", "colour", "shape", "compare", "relation")
NAMING = ("count", "exists", "compare", "relation")  # Whose texts name color and shape.
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
# Of each kind the last one is kept for the split 'heldout_template'.
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
# Color and shape that no question of the training split is about, and no picture of it shows.
HELDOUT_PAIR = np.array(
    [(pair // len(SHAPES) + pair % len(SHAPES)) % 6 == 0 for pair in range(PAIRS)]
)


class Level(NamedTuple):
    """What makes the pictures of a level hard.

    Attributes:
      fewest: distractors, objects that a question is not about; a share of the task's most.
      most: the same.
      apart: whether distractors share neither color nor shape with what a text names. What
        'colour' and 'shape' name no distractor ever shares: there would be two answers.
      alike_one: chance that a distractor is drawn of those that do share one with what is named,
        where that is one thing.
      alike_two: the same where it is two things, of which pairs drawn evenly share more.
      radius: the least of an object, of a cell's side.
      spread: by how much more it may be.
    """

    fewest: float
    most: float
    apart: bool
    alike_one: float
    alike_two: float
    radius: float
    spread: float


LEVELS = {
    # Few distractors, which color or shape alone tells from what is named; large objects.
    "easy": Level(0.0, 0.5, True, 0.0, 0.0, 0.36, 0.06),
    # Any number of distractors, of which two in three share color or shape with what is named.
    "medium": Level(0.0, 1.0, False, 0.5, 0.0, 0.30, 0.12),
    # Many distractors, all of which do; small objects.
    "hard": Level(0.5, 1.0, False, 1.0, 1.0, 0.23, 0.07),
}


class Drawn(NamedTuple):
    """A question before it has a picture.

    Attributes:
      pairs: int32 [C], color and shape of a list of objects, as many as there are places.
      number: int32 [], how many of the list there are.
      text: int32 [], index among the texts of its kind.
      answer: int32 [], index among all answers; of 'relation' the places decide.
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
    """Every text of a kind: template by template, then by the first and the second thing."""
    names = [_name(pair) for pair in range(PAIRS)]
    things = {
        "colour": [{"s": shape} for shape in SHAPES],
        "shape": [{"c": color} for color in COLORS],
    }.get(kind, [{"a": name, "as_": _plural(name)} for name in names])
    if kind in ("compare", "relation"):
        things = [
            {"a": a, "as_": _plural(a), "b": b, "bs": _plural(b)} for a in names for b in names
        ]
    return [template.format(**thing) for template in TEMPLATES[kind] for thing in things]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The task, see `make`.

    Attributes:
      texts: every question and answer.
      kinds: of questions, drawn with equal chances.
      rows: of the grid of places; at most rows * rows objects.
      height, width: of the pictures, pixels.
      counts: the least and the most that 'count' asks for, both included.
      seen: the counts of the training split; those out of it are the split 'heldout_count'.
      distractors: the most objects that a question is not about.
      levels: of LEVELS, drawn with equal chances.
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
        """Draws `count` questions of a split; the i-th does not depend on how many.

        Raises:
          ValueError: there is no such split, no count is held out, or no kind names a pair.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {SPLITS}.")
        if split == "heldout_count" and "count" not in self.kinds:
            raise ValueError(
                f"split='heldout_count', but kinds={self.kinds} has no 'count': add it, or leave "
                "the split out."
            )
        if split == "heldout_count" and not self._asked(split).size:
            raise ValueError(
                f"split='heldout_count', but seen={self.seen} leaves none of counts={self.counts}."
            )
        if not self._asking(split):
            raise ValueError(
                f"split={split!r}, but kinds={self.kinds} has none of {NAMING}: add one, or leave "
                "the split out."
            )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
        return self.texts.make_prompts(*jax.vmap(functools.partial(self._one, split=split))(keys))

    def restricted(self, seen: tuple[int, int]) -> "Shapes":
        """The same task with other counts in its training split.

        Raises:
          ValueError: impossible counts, see `make`.
        """
        _check_counts(self.kinds, self.counts, seen)
        return dataclasses.replace(self, seen=seen)

    def _asking(self, split: str) -> tuple[str, ...]:
        """The kinds of questions of a split."""
        among = {"heldout_count": ("count",), "heldout_pair": NAMING}.get(split, KINDS)
        return tuple(kind for kind in self.kinds if kind in among)

    def _asked(self, split: str) -> np.ndarray:
        """The counts that a split asks for."""
        counts = np.arange(self.counts[0], self.counts[1] + 1)
        known = (counts >= self.seen[0]) & (counts <= self.seen[1])
        return counts[~known] if split == "heldout_count" else counts[known]

    def _one(self, rng: jax.Array, *, split: str) -> tuple[jax.Array, ...]:
        """Picture, text, answer, kind and level of one question."""
        kind_key, prompt_key, place_key, draw_key = jax.random.split(rng, 4)
        chosen = self._asking(split)
        which = jax.random.randint(kind_key, (), 0, len(chosen))
        number = jax.random.randint(jax.random.fold_in(kind_key, 1), (), 0, len(self.levels))
        level = self._level(number)
        branches = [functools.partial(self._draw, kind=kind, split=split) for kind in chosen]
        drawn = jax.lax.switch(which, branches, prompt_key, level)
        places = self._places(place_key, drawn.number, split)
        order = jnp.argsort(places)  # Of each cell, which of the list lies there.
        pair = drawn.pairs[order]
        objects = Objects(pair % len(SHAPES), pair // len(SHAPES), order < drawn.number)
        image = draw(
            draw_key,
            objects,
            rows=self.rows,
            height=self.height,
            width=self.width,
            radius=level.radius,
            spread=level.spread,
        )
        column = places % self.rows
        left = jnp.where(column[0] < column[1], self._answer("yes"), self._answer("no"))
        numbers = np.array([self.kinds.index(kind) for kind in chosen])
        first = np.cumsum([0] + [len(_texts(kind)) for kind in self.kinds])[numbers]
        is_relation = jnp.array([kind == "relation" for kind in chosen])[which]
        return (
            image,
            jnp.asarray(first)[which] + drawn.text,
            jnp.where(is_relation, left, drawn.answer),
            jnp.asarray(numbers)[which],
            number,
        )

    def _level(self, number: jax.Array) -> Level:
        """One of the levels, its distractors whole numbers."""
        rows = [
            LEVELS[name]._replace(
                fewest=math.ceil(LEVELS[name].fewest * self.distractors),
                most=math.floor(LEVELS[name].most * self.distractors),
            )
            for name in self.levels
        ]
        return jax.tree.map(lambda *column: jnp.asarray(column)[number], *rows)

    def _answer(self, text: str) -> int:
        return self.texts.answers.index(text)

    def _places(self, rng: jax.Array, number: jax.Array, split: str) -> jax.Array:
        """The cell of each of a list, int32 [C], of which `number` are there.

        The first two are in different columns, and as often in this order as in the other. The
        middle cell is left to the split 'heldout_layout', where one of those two is in it.
        """
        order_key, swap_key = jax.random.split(rng)
        cells = np.arange(self.rows**2)
        middle = cells == (self.rows + 1) * (self.rows // 2)
        last = -1.0 if split == "heldout_layout" else 1.0
        score = jax.random.uniform(order_key, cells.shape)
        places = jnp.argsort(jnp.where(middle, last, score))
        column = jnp.asarray(cells % self.rows)[places]
        second = jnp.argmax(column != column[0])
        places = places.at[1].set(places[second]).at[second].set(places[1])
        # The middle has more columns to one side than to the other.
        swapped = jax.random.bernoulli(swap_key) & (number > 1)
        return jnp.where(swapped, places.at[:2].set(places[1::-1]), places)

    def _draw(self, rng: jax.Array, level: Level, *, kind: str, split: str) -> Drawn:
        pair_key, number_key, others_key, distractor_key, template_key, side_key = jax.random.split(
            rng, 6
        )
        cells, pairs = self.rows**2, np.arange(PAIRS)
        known = jnp.asarray(~HELDOUT_PAIR)
        wanted = jnp.asarray(HELDOUT_PAIR) if split == "heldout_pair" else known

        def pick(key: jax.Array, mask: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
            return jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf), shape=shape)

        a_key, b_key = jax.random.split(pair_key)
        a = pick(a_key, wanted)
        b = pick(b_key, wanted & (pairs != a))
        color, shape = pairs // len(SHAPES), pairs % len(SHAPES)
        yes = jax.random.bernoulli(side_key).astype(jnp.int32)
        extra = jax.random.randint(distractor_key, (), level.fewest, level.most + 1)
        yes_no = jnp.where(yes > 0, self._answer("yes"), self._answer("no"))
        other, number_b = pairs != a, jnp.zeros((), jnp.int32)
        if kind == "count":
            number_a = jax.random.choice(number_key, jnp.asarray(self._asked(split)))
            thing, answer = a, number_a - self.counts[0]
        elif kind == "exists":
            # As many objects, whichever the answer is.
            number_a, extra, thing, answer = yes, extra + 1 - yes, a, yes_no
        elif kind == "colour":
            number_a, thing, other = jnp.ones((), jnp.int32), shape_of(a), shape != shape_of(a)
            answer = self._answer(COLORS[0]) + color_of(a)
        elif kind == "shape":
            number_a, thing, other = jnp.ones((), jnp.int32), color_of(a), color != color_of(a)
            answer = self._answer(SHAPES[0]) + shape_of(a)
        else:
            thing, other, answer = a * PAIRS + b, (pairs != a) & (pairs != b), yes_no
            number_a = number_b = jnp.ones((), jnp.int32)
            if kind == "compare":
                # Counts that are held out are not seen here either.
                most = jax.random.randint(number_key, (), self.seen[0] + 1, self.seen[1] + 1)
                least = jax.random.randint(others_key, (), self.seen[0], most)
                number_a = jnp.where(yes > 0, most, least)
                number_b = most + least - number_a
        listed = jnp.arange(cells)
        any_key, near_key, shared_key = (jax.random.fold_in(others_key, i) for i in (1, 2, 3))
        if kind in NAMING:
            # Where they share color or shape with what is named, neither alone decides.
            alike = (color == color_of(a)) | (shape == shape_of(a))
            chance = level.alike_one
            if kind in ("compare", "relation"):
                alike |= (color == color_of(b)) | (shape == shape_of(b))
                chance = level.alike_two
            others = pick(any_key, known & other & ~(level.apart & alike), (cells,))
            near = pick(near_key, known & other & alike, (cells,))
            shared = jax.random.bernoulli(shared_key, chance, (cells,))
            objects = jnp.where(shared, near, others)
        else:
            objects = pick(any_key, known & other, (cells,))
        objects = jnp.where(listed < number_a + number_b, b, objects)
        objects = jnp.where(listed < number_a, a, objects)
        things = len(_texts(kind)) // len(TEMPLATES[kind])
        last = len(TEMPLATES[kind]) - 1
        template = jax.random.randint(template_key, (), 0, last)
        if split == "heldout_template":
            template = jnp.full((), last)
        return Drawn(objects, number_a + number_b + extra, template * things + thing, answer)


def color_of(pair: jax.Array) -> jax.Array:
    """Index into COLORS of an index of a color and a shape."""
    return pair // len(SHAPES)


def shape_of(pair: jax.Array) -> jax.Array:
    """Index into SHAPES of an index of a color and a shape."""
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
      kinds: of KINDS.
      rows: of the grid of places.
      height: of the pictures, pixels.
      width: of the pictures, pixels.
      counts: the least and the most that 'count' asks for.
      seen: the counts of the training split.
      distractors: the most objects that a question is not about.
      levels: of LEVELS.
      image_tokens: of every picture.
      tokenizer: by default `WordTokenizer` of the texts.

    Raises:
      ValueError: an unknown kind or level, impossible counts, more objects than places, or
        objects too small to tell their shapes apart.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds has {kind!r}, which is none of {KINDS}.")
    if not kinds:
        raise ValueError(f"kinds is empty; choose of {KINDS}.")
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"levels has {level!r}, which is none of {tuple(LEVELS)}.")
        pixels = math.ceil(LEAST_RADIUS / LEVELS[level].radius)
        if min(height, width) < pixels * rows:
            raise ValueError(
                f"levels has {level!r}, whose smallest shapes cannot be told apart in cells of "
                f"less than {pixels} pixels: height={height} and width={width} must be at least "
                f"{pixels * rows} with rows={rows}."
            )
    if not levels or len(set(levels)) < len(levels):
        raise ValueError(f"levels={tuple(levels)} must be some of {tuple(LEVELS)}, each once.")
    _check_counts(kinds, counts, seen)
    most = max(2 * counts[1] - 1 if "compare" in kinds else counts[1], 2) + distractors
    if most >= rows**2:
        raise ValueError(
            f"counts={counts} and distractors={distractors} may want {most} objects, but "
            f"rows={rows} has {rows**2} places, of which training leaves one empty."
        )
    prompts = [text for kind in kinds for text in _texts(kind)]
    answers = list(NUMBERS[counts[0] : counts[1] + 1]) if "count" in kinds else []
    answers += [*COLORS, *SHAPES, "yes", "no"]
    texts = tokenize(prompts, answers, tokenizer, image_tokens=image_tokens)
    return Shapes(
        texts, tuple(kinds), rows, height, width, counts, seen, distractors, tuple(levels)
    )


def _check_counts(kinds: Sequence[str], counts: tuple[int, int], seen: tuple[int, int]) -> None:
    """Raises ValueError where these cannot be counted, or not compared."""
    if not 0 <= counts[0] <= seen[0] <= seen[1] <= counts[1] < len(NUMBERS):
        raise ValueError(
            f"counts={counts} and seen={seen} must be 0 <= counts[0] <= seen[0] <= seen[1] <= "
            f"counts[1] <= {len(NUMBERS) - 1}."
        )
    if "compare" in kinds and seen[0] == seen[1]:
        raise ValueError(
            f"seen={seen} is a single count, but kinds has 'compare', which asks for the greater "
            "of two: widen it."
        )
