"""Visual questions: the picture holds what the answer says, blind answers are at chance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.tasks import shapes
from mmrl_jax.tasks.question import ABSENT, Words, tokenise
from mmrl_jax.tasks.scenes import COLOURS, SHAPES, Objects, draw

# Compiling is what these tests wait for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZE = dict(rows=4, height=40, width=40, counts=(0, 6), seen=(1, 3), distractors=4)


@functools.cache
def task(kinds=shapes.KINDS, **changes):
    return shapes.make(kinds=kinds, image_tokens=2, **(SIZE | changes))


@functools.cache
def drawn(split="train", kinds=shapes.KINDS, count=600, **changes):
    made = task(kinds, **changes)
    return jax.device_get(jit(lambda rng: made.sample(rng, count, split))(jax.random.key(0)))


def words(made, question, i):
    return made.texts.prompts[question.text[i]], made.texts.answers[question.answer[i]]


@functools.cache
def patterns():
    """[pairs, 10, 10, 3]: an object of each kind as it fills a cell, without noise."""

    def one(pair):
        colour, shape = pair // len(SHAPES), pair % len(SHAPES)
        there = jnp.arange(16) == 5
        objects = Objects(jnp.full(16, shape), jnp.full(16, colour), there)
        return draw(jax.random.key(1), objects, rows=4, height=40, width=40)

    return np.asarray(jax.vmap(one)(jnp.arange(shapes.PAIRS)))


def seen(picture):
    """The objects of a picture as (cell, colour, shape), from its pixels alone.

    The colour is the nearest one of what stands out from the background; of the shape, how much of
    its box is filled, and where.
    """
    picture = picture.astype(float)
    ground = np.median(picture.reshape(-1, 3), axis=0)
    rgb = np.array(
        [[220, 40, 40], [40, 170, 60], [50, 80, 230], [230, 210, 50], [170, 60, 190], [235] * 3]
    )
    found = []
    for cell in range(16):
        y, x = cell // 4 * 10, cell % 4 * 10
        patch = picture[y : y + 10, x : x + 10]
        out = np.abs(patch - ground).max(axis=-1) > 45
        if out.sum() < 8:
            continue
        mean = patch[out].mean(axis=0)
        scaled = rgb / np.linalg.norm(rgb, axis=1, keepdims=True)
        near = np.linalg.norm(mean / np.linalg.norm(mean) - scaled, axis=1)
        found.append((cell, COLOURS[int(near.argmin())], out))
    return found


def test_the_picture_has_the_counted_objects():
    made = task(("count",), distractors=0)
    question = drawn("train", ("count",), 200, distractors=0)
    for i in range(200):
        text, answer = words(made, question, i)
        found = seen(question.images[i])
        assert len(found) == shapes.NUMBERS.index(answer), (i, text, answer)
        assert all(colour in text for _, colour, _ in found), (i, text, answer)


def test_left_and_right_are_where_the_answer_says():
    made = task(("relation",), distractors=0)
    question = drawn("train", ("relation",), 200, distractors=0)
    checked = 0
    for i in range(200):
        text, answer = words(made, question, i)
        place = {colour: cell % 4 for cell, colour, _ in seen(question.images[i])}
        colours = [word for word in text.split() if word in COLOURS]
        if len(set(colours)) < 2:
            continue
        first, second = (place[colour] for colour in colours)
        said = first > second if "right of" in text else first < second
        assert said == (answer == "yes"), (i, text, answer)
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("shape", range(4))
def test_shapes_look_different(shape):
    alone = patterns()
    other = [s for s in range(4) if s != shape]
    for s in other:
        assert np.abs(alone[shape].astype(int) - alone[s]).max() > 60


def test_who_does_not_look_is_at_chance():
    made, question = task(), drawn(count=6000)
    for k, kind in enumerate(shapes.KINDS):
        rows = question.kind == k
        assert 800 < rows.sum() < 1200
        answers = question.answer[rows]
        counts = np.bincount(answers, minlength=len(made.texts.answers)) / rows.sum()
        chance = {"count": 1 / 3, "colour": 1 / 4, "shape": 1 / 3}.get(kind, 1 / 2)
        assert counts.max() < chance + 0.06, (kind, counts)
        # Nor does a text give its answer away: the most frequent one of each, where there are many.
        texts = question.text[rows]
        for text in np.unique(texts):
            same = answers[texts == text]
            if len(same) >= 25:
                most = np.bincount(same).max() / len(same)
                assert most < chance + 4 * np.sqrt(chance * (1 - chance) / len(same)), (kind, text)


def test_splits_hold_out_what_they_say():
    made = task()

    def things(split):
        question = drawn(split, ("count",), 400)
        kind = task(("count",))
        return [words(kind, question, i) for i in range(400)]

    held = {f"{c} {s}" for i, (c, s) in enumerate((c, s) for c in COLOURS for s in SHAPES)
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
    layout = drawn("heldout_layout", ("count",), 100)
    for picture in layout.images:
        columns = {cell % 4 // 2 for cell, *_ in seen(picture)}
        assert len(columns) <= 1
    assert made.texts.prompt_tokens.shape[0] == len(made.texts.prompts)


def test_a_question_depends_on_its_number_alone():
    made = task(("count", "relation"))
    few = jit(lambda rng: made.sample(rng, 5, "train"))(jax.random.key(0))
    many = drawn("train", ("count", "relation"), 30)
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b[:5])


def test_answers_are_read_exactly():
    texts = tokenise(
        ["how many ?"],
        ["one", "twenty one", "two"],
        lambda text: [9],
        lambda text: [*{"one": [4], "twenty one": [7, 4], "two": [5]}[text], 1],
        pad=0,
    )
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
    present = jnp.arange(4) < lengths[:, None]
    expected = [0, 1, 2, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT]
    np.testing.assert_array_equal(texts.parse(given, present), expected)
    question = texts.ask(jnp.zeros((2, 8, 8, 3), jnp.uint8), *(jnp.array([0, 0]),) * 3)
    question = question._replace(answer=jnp.array([1, 2]))
    score = texts.score(question, given.reshape(2, 4, 4), present.reshape(2, 4, 4), penalty=0.5)
    np.testing.assert_array_equal(score.correct, [[0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(score.malformed, [[0, 0, 0, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(score.reward, [[0, 1, 0, -0.5], [-0.5] * 4])


def test_labels_are_the_right_answers():
    made, question = task(), drawn()
    labels, there = made.texts.labels(question)
    parsed = made.texts.parse(labels, there)
    np.testing.assert_array_equal(parsed, question.answer)
    assert (np.asarray(labels)[~np.asarray(there)] == Words.PAD).all()


def test_prompts_have_their_image_tokens():
    question = drawn()
    assert ((question.tokens == Words.IMAGE).sum(axis=1) == 2).all()
    assert not question.tokens[~question.present].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("colours",)}, "kinds has 'colours'"),
        ({"kinds": ()}, "kinds is empty"),
        ({"counts": (2, 1)}, r"counts=\(2, 1\)"),
        ({"counts": (0, 11)}, r"counts=\(0, 11\)"),
        ({"distractors": 20}, "may want 31 objects, but rows=4 has 16 places"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shapes.make(**({"kinds": shapes.KINDS} | SIZE | changes))


def test_splits_and_pictures_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="split='test' is none of"):
        task(("count",)).sample(jax.random.key(0), 1, "test")
    with pytest.raises(ValueError, match=r"seen=\(0, 6\) leaves none"):
        task(("count",), seen=(0, 6)).sample(jax.random.key(0), 1, "heldout_count")
    with pytest.raises(ValueError, match="height=40 and width=41 do not divide"):
        jax.eval_shape(lambda: task(("count",), width=41).sample(jax.random.key(0), 1, "train"))
    with pytest.raises(ValueError, match="have the same tokens"):
        tokenise(["a"], ["b", "c"], lambda _: [1], lambda _: [2], pad=0)
