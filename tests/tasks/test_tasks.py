"""Visual questions: the picture holds what the answer says, blind answers are at chance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.evaluation.prompts import EvaluatedCompletions, describe_levels
from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.prompts import ABSENT, Prompt, Score, WordTokenizer, tokenize
from mmrl_jax.tasks.scenes import COLORS, SHAPES, Objects, render

# Compiling is what these tests wait for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZE = dict(rows=4, height=40, width=40, counts=(0, 6), seen=(1, 3), distractors=4,
            levels=("medium",))  # fmt: skip


@functools.cache
def task(kinds=shapes.KINDS, **changes):
    return shapes.make(kinds=kinds, image_tokens=2, **(SIZE | changes))


@functools.cache
def drawn(split="train", kinds=shapes.KINDS, count=600, **changes):
    made = task(kinds, **changes)
    return jax.device_get(jit(lambda rng: made.sample(rng, count, split))(jax.random.key(0)))


def words(made, prompts, i):
    return made.texts.prompts[prompts.text[i]], made.texts.answers[prompts.answer[i]]


@functools.cache
def patterns():
    """Returns an image of an object of each kind in a cell, without noise, [pairs, 10, 10, 3]."""

    def one(pair):
        color, shape = pair // len(SHAPES), pair % len(SHAPES)
        occupied = jnp.arange(16) == 5
        objects = Objects(jnp.full(16, shape), jnp.full(16, color), occupied)
        return render(jax.random.key(1), objects, rows=4, height=40, width=40, radius=0.3,
                  spread=0.12)  # fmt: skip

    return np.asarray(jax.vmap(one)(jnp.arange(shapes.PAIRS)))


def seen(picture):
    """The objects of a picture of 4x4 cells as (column, cell, color, shape), from pixels alone.

    The color is the nearest one of what stands out from the background. Of its bounding box a
    square fills all, a circle pi/4, a triangle and a cross about a half, and a triangle most of
    that below the middle.
    """
    picture = picture.astype(float)
    edge = picture.shape[0] // 4
    ground = np.median(picture.reshape(-1, 3), axis=0)
    rgb = np.array(
        [[220, 40, 40], [40, 170, 60], [50, 80, 230], [230, 210, 50], [170, 60, 190], [235] * 3]
    )
    scaled = rgb / np.linalg.norm(rgb, axis=1, keepdims=True)
    found = []
    for cell in range(16):
        y, x = cell // 4 * edge, cell % 4 * edge
        patch = picture[y : y + edge, x : x + edge]
        out = np.abs(patch - ground).max(axis=-1) > 45
        if out.sum() < 0.08 * edge**2:
            continue
        mean = patch[out].mean(axis=0)
        color = COLORS[np.linalg.norm(mean / np.linalg.norm(mean) - scaled, axis=1).argmin()]
        box = out[np.ix_(out.any(axis=1), out.any(axis=0))]
        half = len(box) // 2
        if box.mean() > 0.68:
            shape = "square" if box.mean() > 0.9 else "circle"
        else:
            shape = "triangle" if box[-half:].sum() > 1.5 * box[:half].sum() else "cross"
        found.append((cell % 4, cell, color, shape))
    return found


def answer_of(text, found):
    """Returns the answer to a question about objects, computed from its words."""
    things = [(c, s) for c in COLORS for s in SHAPES]
    asked = sorted((text.index(f"{c} {s}"), (c, s)) for c, s in things if f"{c} {s}" in text)
    asked = [thing for _, thing in asked]
    numbers = [sum(thing == (c, s) for _, _, c, s in found) for thing in asked]
    if text.startswith(("how many", "count", "what is the number")):
        return shapes.NUMBERS[numbers[0]]
    if len(asked) == 1:
        return "yes" if numbers[0] else "no"
    if not asked:
        (shape,) = [s for s in SHAPES if s in text.split()] or [None]
        (color,) = [c for c in COLORS if c in text.split()] or [None]
        (one,) = [(c, s) for _, _, c, s in found if shape == s or color == c]
        return one[0] if shape else one[1]
    if "left of" in text or "right of" in text:
        assert numbers == [1, 1]
        first, second = ([at for at, _, c, s in found if (c, s) == thing] for thing in asked)
        return "yes" if (first < second) == ("left of" in text) else "no"
    return "yes" if numbers[0] > numbers[1] else "no"


def large(split, level):
    """150 questions whose pictures `seen` can read."""
    return drawn(split, count=150, height=96, width=96, levels=(level,))


@pytest.mark.parametrize(
    ("split", "level"),
    [
        *(("train", level) for level in shapes.LEVELS),
        *((f"heldout_{what}", "medium") for what in ("pair", "layout", "template")),
    ],
)
def test_the_picture_decides_the_answer(split, level):
    made, prompts = task(height=96, width=96), large(split, level)
    kinds = shapes.PAIR_KINDS if split == "heldout_pair" else shapes.KINDS
    assert {shapes.KINDS[kind] for kind in prompts.kind} == set(kinds)
    for i in range(150):
        text, answer = words(made, prompts, i)
        assert answer_of(text, seen(prompts.images[i])) == answer, (i, text)


@pytest.mark.parametrize("shape", range(4))
def test_shapes_look_different(shape):
    alone = patterns()
    other = [s for s in range(4) if s != shape]
    for s in other:
        assert np.abs(alone[shape].astype(int) - alone[s]).max() > 60


@pytest.mark.parametrize("split", ["train", "heldout_pair"])
def test_who_does_not_look_is_at_chance(split):
    made, prompts = task(), drawn(split, count=6000)
    kinds = np.unique(prompts.kind)
    for k in kinds:
        kind, rows = shapes.KINDS[k], prompts.kind == k
        assert 0.8 < rows.mean() * len(kinds) < 1.2
        answers = prompts.answer[rows]
        counts = np.bincount(answers, minlength=len(made.texts.answers)) / rows.sum()
        chance = {"count": 1 / 3, "colour": 1 / 4, "shape": 1 / 3}.get(kind, 1 / 2)
        assert counts.max() < chance + 0.06, (kind, counts)
        # Nor does a text give its answer away: the most frequent one of each, where there are many.
        texts = prompts.text[rows]
        for text in np.unique(texts):
            same = answers[texts == text]
            if len(same) >= 25:
                most = np.bincount(same).max() / len(same)
                assert most < chance + 4 * np.sqrt(chance * (1 - chance) / len(same)), (kind, text)


def test_each_level_is_harder_than_the_one_before():
    things = [(c, s) for c in COLORS for s in SHAPES]
    number, alike, area = [], [], []
    for level in shapes.LEVELS:
        prompts, others, sharing, covered = large("train", level), [], [], []
        for i, picture in enumerate(prompts.images):
            text, _ = words(task(), prompts, i)
            objects = [(c, s) for *_, c, s in seen(picture)]
            ground = np.median(picture.reshape(-1, 3), axis=0)
            covered.append((np.abs(picture - ground).max(axis=-1) > 45).sum() / len(objects))
            named = [(c, s) for c, s in things if f"{c} {s}" in text]
            distractors = [x for x in objects if x not in named]
            others.append(len(distractors) if named else len(objects) - 1)
            if named:
                sharing += [any(a == x or b == y for x, y in named) for a, b in distractors]
        number.append(np.mean(others))
        alike.append(np.mean(sharing))
        area.append(np.mean(covered) / 24**2)
    # At most 4: from 0 to 2, from 0 to 4, from 2 to 4, and one more where nothing is what 'exists'
    # names, of 1 / 12 of the questions. Of 150 four standard deviations are at most 0.46.
    assert list(shapes.LEVELS) == ["easy", "medium", "hard"]
    np.testing.assert_allclose(number, [1.08, 2.08, 3.08], atol=0.46)
    # Medium: half are drawn to share; by chance 8 of 23 do, and 14 or so of 22 with one of two.
    np.testing.assert_allclose(alike, [0.0, 0.67, 1.0], atol=0.12)
    assert alike[0] == 0 and alike[2] == 1
    # The shapes take 1.8 to 3.1 times the square of the radius, of which the means are here.
    square = np.array([0.39, 0.36, 0.265]) ** 2
    assert (area > 1.8 * square).all() and (area < 3.1 * square).all()
    assert area[0] > 1.1 * area[1] > 1.5 * area[2]


def test_levels_differ_in_the_picture_alone():
    each = [large("train", level) for level in shapes.LEVELS]
    mixed = drawn(count=150, height=96, width=96, levels=tuple(shapes.LEVELS))
    for prompts in each:
        np.testing.assert_array_equal(prompts.text, mixed.text)
        np.testing.assert_array_equal(prompts.answer, mixed.answer)
    images = np.stack([prompts.images for prompts in each])
    np.testing.assert_array_equal(images[mixed.level, np.arange(150)], mixed.images)
    assert (np.bincount(mixed.level, minlength=3) > 25).all()


def lists(kind, count):
    """Returns sampled questions of one kind, and the mask of the objects in the image."""
    made = task((kind,))
    draw_one = functools.partial(made._sample_spec, level=made._level(0), kind=kind, split="train")
    draws = jit(jax.vmap(draw_one))(jax.random.split(jax.random.key(2), count))
    return draws, np.arange(16) < draws.number[:, None]


def test_no_comparison_shows_a_count_that_is_held_out():
    draws, there = lists("compare", 500)
    both = np.asarray(draws.text) % shapes.PAIRS**2
    shown = [
        ((draws.pairs == named[:, None]) & there).sum(axis=1)
        for named in (both // shapes.PAIRS, both % shapes.PAIRS)
    ]
    assert set(np.unique(shown)) == {1, 2, 3}
    yes = draws.answer == task(("compare",)).texts.answers.index("yes")
    np.testing.assert_array_equal(shown[0] > shown[1], yes)


def test_splits_hold_out_what_they_say():
    def things(split):
        prompts = drawn(split, ("count",), 400)
        kind = task(("count",))
        return [words(kind, prompts, i) for i in range(400)]

    held = {f"{c} {s}" for i, (c, s) in enumerate((c, s) for c in COLORS for s in SHAPES)
            if shapes.HELDOUT_PAIR[i]}  # fmt: skip

    def about_held(text):
        return any(name in text for name in held)

    assert not any(about_held(text) for text, _ in things("train"))
    assert all(about_held(text) for text, _ in things("heldout_pair"))
    assert {answer for _, answer in things("train")} == {"one", "two", "three"}
    assert {answer for _, answer in things("heldout_count")} == {"zero", "four", "five", "six"}
    last = shapes.TEMPLATES["count"][-1].split("{")[0]
    assert not any(text.startswith(last) for text, _ in things("train"))
    assert all(text.startswith(last) for text, _ in things("heldout_template"))
    middle = 10  # Of 4x4 cells.
    for split in ("train", "heldout_template"):
        for picture in drawn(split, ("count",), 400).images:
            assert middle not in {cell for _, cell, *_ in seen(picture)}
    prompts = drawn("heldout_layout", ("count",), 400)
    there = [{cell for _, cell, *_ in seen(picture)} for picture in prompts.images]
    assert all(middle in cells for cells in there) and set().union(*there) == set(range(16))


def test_who_does_not_look_is_at_chance_where_the_layout_is_held_out():
    prompts = drawn("heldout_layout", ("relation",), 1000)
    # Both are left of the other half the time: 4 standard deviations are 0.063.
    assert abs(np.mean(prompts.answer == prompts.answer[0]) - 0.5) < 0.063


@pytest.mark.parametrize("kind", ["count", "exists"])
def test_neither_color_nor_shape_decides_alone(kind):
    draws, there = lists(kind, 2000)
    others = there & (draws.pairs != draws.text[:, None] % shapes.PAIRS)
    asked = np.asarray(draws.text)[:, None] % shapes.PAIRS
    same = (shapes.color_of(draws.pairs) == shapes.color_of(asked)) | (
        shapes.shape_of(draws.pairs) == shapes.shape_of(asked)
    )
    # Half of the distractors, and of the rest the 5 to 7 of 19 pairs that share one.
    assert 0.6 < same[others].mean() < 0.75


def test_a_question_depends_on_its_number_alone():
    made = task(("count", "relation"))
    few = jit(lambda rng: made.sample(rng, 5, "train"))(jax.random.key(0))
    many = drawn("train", ("count", "relation"), 30)
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b[:5])


class Fixed(WordTokenizer):
    """A tokenizer with given answers, and prompts of one token."""

    def __init__(self, answers):
        self.answers = answers

    def encode_prompt(self, text, *, images):
        return [9]

    def encode_completion(self, text):
        return [*self.answers[text], self.stop]


def test_answers_are_read_exactly():
    said = {"one": [4], "twenty one": [7, 4], "two": [5]}
    texts = tokenize(["how many ?"], list(said), Fixed(said), image_tokens=0)
    np.testing.assert_array_equal(texts.answer_tokens, [[4, 1, -1], [7, 4, 1], [5, 1, -1]])
    given = jnp.array(
        [
            [4, 1, 0, 0],  # one
            [7, 4, 1, 0],  # twenty one
            [5, 1, 0, 0],  # two
            [4, 4, 1, 0],  # A token too many.
            [4, 0, 0, 0],  # No stop token.
            [0, 0, 0, 0],  # Nothing.
            [4, 1, 9, 0],  # Something behind the stop token.
            [8, 1, 0, 0],  # Another word.
        ]
    )
    lengths = jnp.array([2, 3, 2, 3, 1, 0, 3, 2])
    mask = jnp.arange(4) < lengths[:, None]
    expected = [0, 1, 2, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT]
    np.testing.assert_array_equal(texts.parse(given, mask), expected)
    prompts = texts.make_prompts(jnp.zeros((2, 8, 8, 3), jnp.uint8), *(jnp.array([0, 0]),) * 4)
    prompts = prompts._replace(answer=jnp.array([1, 2]))
    # Of several stop tokens each ends an answer, and none stands for another token.
    other = jnp.array([[4, 6], [4, 5], [6, 1]])
    several = dataclasses.replace(texts, tokenizer=Fixed(said))
    several.tokenizer.stops = (1, 6)
    np.testing.assert_array_equal(several.parse(other, jnp.ones((3, 2), bool)), [0, ABSENT, ABSENT])
    np.testing.assert_array_equal(texts.parse(other, jnp.ones((3, 2), bool)), [ABSENT] * 3)
    score = texts.score(prompts, given.reshape(2, 4, 4), mask.reshape(2, 4, 4), penalty=0.5)
    np.testing.assert_array_equal(score.correct, [[0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(score.invalid, [[0, 0, 0, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(score.reward, [[0, 1, 0, -0.5], [-0.5] * 4])


def test_accuracy_is_told_by_level():
    level = np.array([0, 2, 0, 2, 2])  # Of the second there is none.
    right = np.array([1, 0, 0, 1, 1], np.float32)
    score = Score(right, right, np.array([0, 1, 0, 0, 0], np.float32))
    found = EvaluatedCompletions(Prompt(*(None,) * 6, level=level), None, None, score)
    described = describe_levels(found, ("easy", "medium", "hard"))
    assert described["easy/accuracy"] == 1 / 2 and described["easy/invalid_fraction"] == 0
    assert described["hard/accuracy"] == pytest.approx(2 / 3)
    assert described["hard/invalid_fraction"] == pytest.approx(1 / 3)
    assert not any(name.startswith("medium") for name in described)


def test_labels_are_the_right_answers():
    made, prompts = task(), drawn()
    labels, there = made.texts.labels(prompts.answer)
    parsed = made.texts.parse(labels, there)
    np.testing.assert_array_equal(parsed, prompts.answer)
    assert (np.asarray(labels)[~np.asarray(there)] == WordTokenizer.pad).all()


def test_prompts_have_their_image_tokens():
    prompts = drawn()
    assert ((prompts.tokens == WordTokenizer.image).sum(axis=1) == 2).all()
    assert not prompts.tokens[~prompts.mask].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("colours",)}, "kinds has 'colours'"),
        ({"kinds": ()}, "kinds is empty"),
        ({"counts": (2, 1)}, r"counts=\(2, 1\)"),
        ({"counts": (0, 11)}, r"counts=\(0, 11\)"),
        ({"distractors": 5}, "may need 16 objects, but rows=4 gives 16 cells"),
        ({"seen": (2, 2)}, r"seen=\(2, 2\) is a single count, but kinds has 'compare'"),
        ({"levels": ("harder",)}, "levels has 'harder', which is not one of"),
        ({"levels": ()}, r"levels=\(\) must be a non-empty subset of"),
        ({"levels": ("easy", "easy")}, "without duplicates"),
        ({"levels": ("medium", "hard"), "height": 28}, "levels has 'hard', .* at least 32"),
        ({"height": 20}, "levels has 'medium', .* at least 24"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shapes.make(image_tokens=2, **({"kinds": shapes.KINDS} | SIZE | changes))


def test_splits_and_pictures_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="split='test' is not one of"):
        task(("count",)).sample(jax.random.key(0), 1, "test")
    with pytest.raises(ValueError, match=r"seen=\(0, 6\) leaves none"):
        task(("count",), seen=(0, 6)).sample(jax.random.key(0), 1, "heldout_count")
    with pytest.raises(ValueError, match=r"kinds=\('colour',\) has none of"):
        task(("colour",)).sample(jax.random.key(0), 1, "heldout_pair")
    with pytest.raises(ValueError, match=r"counts=\(0, 6\) and seen=\(1, 7\)"):
        task(("count",)).with_train_counts((1, 7))
    with pytest.raises(ValueError, match=r"kinds=\('exists',\) has no 'count'"):
        task(("exists",)).sample(jax.random.key(0), 1, "heldout_count")
    with pytest.raises(ValueError, match="height=40 and width=41 do not divide"):
        jax.eval_shape(lambda: task(("count",), width=41).sample(jax.random.key(0), 1, "train"))
    with pytest.raises(ValueError, match="have the same tokens"):
        tokenize(["a"], ["b", "c"], Fixed({"b": [2], "c": [2]}), image_tokens=0)


def test_words_are_read_back():
    words = WordTokenizer(["how many red balls ?", "two"])
    ids = words.encode_prompt("how many balls ?", images=2)
    assert ids[:2] == [words.image] * 2 and words.decode(ids) == "how many balls ?"
    assert words.decode([*words.encode_completion("two"), words.pad]) == "two"
    with pytest.raises(ValueError, match="words ..blue.. of 'blue balls'"):
        words.encode("blue balls")
