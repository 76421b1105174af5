"""Tests of weights of samples: their file, and the epochs that they give."""

import json

import numpy as np
import pytest

from mmrl_jax.data import weights
from mmrl_jax.data.records import InvalidData
from mmrl_jax.data.weights import SampleWeight, epoch_order


def test_without_weights_the_order_is_that_of_numpy():
    expected = np.random.default_rng([7, 3]).permutation(10)
    np.testing.assert_array_equal(epoch_order(10, None, seed=7, epoch=3), expected)
    # Equal weights change nothing, also if their sums are not exact in binary.
    for weight in (1.0, 0.1, 1 / 3):
        order = epoch_order(10, np.full(10, weight), seed=7, epoch=3)
        np.testing.assert_array_equal(order, expected)


def test_a_sample_occurs_in_proportion_to_its_weight():
    # n * w / sum(w) = 4 * (3, 1, 0.5, 1.5) / 6 = 2, 2/3, 1/3 and 1 times.
    w = np.array([3, 1, 0.5, 1.5])
    counts = np.array(
        [np.bincount(epoch_order(4, w, seed=0, epoch=e), minlength=4) for e in range(600)]
    )
    assert (counts.sum(axis=1) == 4).all()
    assert (counts[:, 0] == 2).all() and (counts[:, 3] >= 0).all()
    assert set(counts[:, 1]) == {0, 1} and set(counts[:, 2]) == {0, 1}
    np.testing.assert_allclose(counts.mean(axis=0), [2, 2 / 3, 1 / 3, 1], atol=0.07)


def test_a_large_epoch_of_equal_weights_has_each_sample_once():
    order = epoch_order(200_000, np.full(200_000, 0.7), seed=0, epoch=0)
    assert len(np.unique(order)) == 200_000


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "weights.jsonl"
    weights.write(path, [SampleWeight("größe 1", "x", 0.5, ("a",)), SampleWeight("2", "y", 0.0)])
    assert json.loads(path.read_text().splitlines()[0])["flags"] == ["a"]
    # The order is that of the samples, and the file may have others.
    found = weights.select(str(path), ["2", "größe 1"], ["y", "x"], key="k")
    np.testing.assert_array_equal(found, [0, 0.5])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "digest": "y", "weight": 1}', "has no line for 'a'"),
        ('{"id": "a", "digest": "y", "weight": 1}', "was written for other contents of 'a'"),
        ('{"id": "a", "digest": "", "weight": 0}', "is of an audit that could not read 'a'"),
        ('{"id": "a", "digest": "x", "weight": 1}\n' * 2, "has two lines for 'a'; remove one"),
        ('{"id": "a", "digest": "x", "weight": 0}', "gives all 1 samples the weight 0"),
        ('{"id": "a", "digest": "x", "weight": -1}', ":1 is no weight .*-1 is no finite number"),
        ('{"id": "a", "digest": "x", "weight": NaN}', "nan is no finite number"),
        ('{"id": "a", "digest": "x", "weight": true}', "True is no finite number"),
        ('{"id": "a", "digest": "x"}', "KeyError: 'weight'"),
        ("[1]", "is no weight"),
        ("{", "is no weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(line, message, tmp_path):
    path = tmp_path / "weights.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidData, match=message):
        weights.select(str(path), ["a"], ["x"], key="bc.data.weights")
    with pytest.raises(InvalidData, match="bc.data.weights=.* cannot be read"):
        weights.select(str(tmp_path / "no"), ["a"], ["x"], key="bc.data.weights")
