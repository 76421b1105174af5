"""Tests of the images, labels and accuracies of the linear probes of DINOv2."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import dinov2_probe as probe
from mmrl_jax.tasks import scenes


def objects_of(image):
    """Returns the contrast of the 9 cells of an image, and the color nearest to their brightest."""
    cells = np.asarray(image, float).reshape(3, probe.EDGE // 3, 3, probe.EDGE // 3, 3)
    cells = cells.swapaxes(1, 2).reshape(9, -1, 3)
    contrast = cells.std(axis=1).max(axis=-1)
    brightest = np.take_along_axis(cells, cells.sum(-1).argmax(1)[:, None, None], axis=1)[:, 0]
    distance = np.linalg.norm(brightest[:, None] - scenes._RGB, axis=-1)
    return contrast, distance.argmin(axis=1)


@pytest.mark.parametrize("objects", [1, 5])
def test_the_labels_are_those_of_the_target(objects):
    images, labels = probe.draw(jax.random.key(0), 30, objects=objects)
    assert images.shape == (30, probe.EDGE, probe.EDGE, 3) and images.dtype == np.uint8
    for image, color, cell in zip(images, labels["color"], labels["cell"], strict=True):
        contrast, nearest = objects_of(image)
        assert np.sum(contrast > 20) == objects  # The noise alone has a contrast of about 6.
        assert contrast[cell] > 20 and nearest[cell] == color
    assert set(np.asarray(labels["shape"])) == (set(range(4)) if objects == 1 else {0})


def test_the_probe_finds_what_is_linear_and_nothing_else(monkeypatch):
    monkeypatch.setattr(probe, "TRAIN", 200)
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 4, 400), rng.normal(size=(400, 30))
    assert probe.accuracy(noise, labels) == pytest.approx(0.25, abs=0.1)
    assert probe.accuracy(noise + 8 * np.eye(4)[labels] @ rng.normal(size=(4, 30)), labels) == 1.0
    swapped = np.where(np.arange(400) < 200, labels, (labels + 1) % 4)
    assert probe.accuracy(8 * np.eye(4)[swapped], labels) == 0.0  # Only the others are tested.
