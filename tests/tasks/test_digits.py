"""Sums of two handwritten digits: nothing of a held-out split is learned from, answers are right.

A fake data set of 40 images, four of each digit, stands in for scikit-learn's where that is not
installed, and where an image has to say what it is.
"""

import builtins
import functools

import jax
import numpy as np
import pytest

from mmrl_jax.tasks import digits
from mmrl_jax.tasks.digits import Digits
from mmrl_jax.tasks.prompts import WordTokenizer

SIZE = dict(height=24, width=32, image_tokens=2)  # The side of a digit is 3 * 16 // 4 = 12.


def fake():
    """Returns 40 images, of which image i has the shade 5 * i + 20, and the digit i % 10."""
    shades = (np.arange(40) * 5 + 20).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None], (40, 8, 8)), np.arange(40) % 10


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(digits, "load", fake)
    return Digits(**SIZE)


@functools.cache
def sampled(made, split, count=400):
    sample = jax.jit(made.sample, static_argnums=(1, 2))
    return jax.device_get(sample(jax.random.key(0), count, split))


def shown(image):
    """Returns the indices of the left and the right image of the fake data set, from the pixels."""
    halves = image[:, :16, 0], image[:, 16:, 0]
    for half in halves:
        assert (half > 0).sum() == 12 * 12  # A whole digit, on black.
    return tuple((int(half.max()) - 20) // 5 for half in halves)


@pytest.mark.parametrize("split", digits.SPLITS)
def test_the_image_decides_the_answer(task, split):
    prompts = sampled(task, split)
    for image, text, answer in zip(prompts.images, prompts.text, prompts.answer, strict=True):
        a, b = (i % 10 for i in shown(image))
        right = f"{a} {b}" if split == "caption" else str(a + b)
        assert task.texts.answers[answer] == right
        assert ("sum" in task.texts.prompts[text]) == (split != "caption")
    assert prompts.images.dtype == np.uint8 and prompts.images.shape[1:] == (24, 32, 3)
    assert (prompts.images == prompts.images[..., :1]).all()


def test_no_split_shares_what_another_holds_out(task):
    images, pairs = {}, {}
    for split in digits.SPLITS:
        indices = np.array([shown(image) for image in sampled(task, split).images])
        images[split] = set(indices.ravel())
        pairs[split] = {tuple(sorted(pair)) for pair in (indices % 10).tolist()}
    # Of 40 images the first 30 are for training, and each is shown.
    assert images["train"] == images["caption"] == images["heldout_pair"] == set(range(30))
    assert images["heldout_sample"] == set(range(30, 40))
    # Unordered pairs: 55, of which 7 differ by 3 and 6 by 4.
    learned = pairs["train"] | pairs["caption"]
    assert len(learned) == 42 and learned == pairs["heldout_sample"]
    assert len(pairs["heldout_pair"]) == 13 and not learned & pairs["heldout_pair"]


def test_who_does_not_look_is_at_chance(task):
    for split, answers in (("train", 19), ("heldout_sample", 19), ("heldout_pair", 13)):
        counts = np.bincount(sampled(task, split, 4000).answer)
        counts = counts[counts > 0]
        # Sums 0 to 18; of pairs that differ by 3 or 4: 3 to 15. 5 standard deviations of 1 / 13.
        assert len(counts) == answers
        np.testing.assert_allclose(counts / 4000, 1 / answers, atol=0.021)
    captions = np.bincount(sampled(task, "caption", 4000).answer)
    assert (captions > 0).sum() == 74  # Ordered: 100 less 2 * 13.


def test_places_differ_and_stay_in_their_half(task):
    rows = {
        np.flatnonzero(image[:, :, 0].any(axis=1))[0] for image in sampled(task, "train").images
    }
    left = {np.flatnonzero(x[:, :16, 0].any(axis=0))[0] for x in sampled(task, "train").images}
    # A half is 16 wide and a digit 12, so that it moves by 0 to 4. It is centered vertically.
    assert left == {0, 1, 2, 3, 4} and rows == {4, 5, 6, 7, 8}


def test_a_prompt_depends_on_its_number_alone(task):
    few, many = sampled(task, "train", 5), sampled(task, "train", 30)
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b[:5])


def test_the_training_pairs_have_every_digit_and_every_sum():
    learned = digits.pairs(heldout=False)
    assert set(learned.ravel()) == set(range(10)) and set(learned.sum(axis=1)) == set(range(19))


def test_the_data_of_scikit_learn_has_no_image_in_both_parts():
    pytest.importorskip("sklearn")
    images, labels = digits.load()
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8 and images.max() == 255
    train, heldout = digits.parts(len(labels))
    assert len(train) == 1348 and len(heldout) == 449  # 0.75 * 1797 = 1347.75.
    first, second = ({images[i].tobytes() for i in part} for part in (train, heldout))
    assert not first & second
    assert set(labels[train]) == set(labels[heldout]) == set(range(10))
    made = Digits(**SIZE, tokenizer=None)
    assert isinstance(made.texts.tokenizer, WordTokenizer)
    assert sampled(made, "heldout_sample", 8).images.max() > 128


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, task):
    with pytest.raises(ValueError, match="split='test' is not one of"):
        task.sample(jax.random.key(0), 1, "test")
    with pytest.raises(ValueError, match="task.width=20 leave 7 pixels .* height=11 and width=22"):
        Digits(**SIZE | {"width": 20})
    assert Digits(**SIZE | {"height": 11, "width": 22}).sample(jax.random.key(0), 2, "train")
    monkeypatch.undo()
    imported = builtins.__import__

    def without(name, *arguments):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="task.name='digits'.*pip install scikit-learn"):
        Digits(**SIZE)
