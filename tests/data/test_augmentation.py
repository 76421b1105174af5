"""Tests of the augmentation of images, with numpy and PIL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from mmrl_jax.data import augmentation
from mmrl_jax.data.augmentation import AugmentationOptions

ALL = AugmentationOptions(
    shift=2, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.1, noise=5.0, cutout=3
)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 8, 6, 3)).astype(np.uint8)


def changed(pixels, options, seed=1):
    drawn = augmentation.draw(jax.random.key(seed), len(pixels), options)
    return augmentation.apply(jnp.asarray(pixels), drawn, options), drawn


def test_a_shift_is_a_crop_of_the_image_with_a_repeated_border():
    pixels, options = images(16), AugmentationOptions(shift=2)
    found, drawn = changed(pixels, options)
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for i, (dy, dx) in enumerate(np.asarray(drawn.offset)):
        np.testing.assert_array_equal(found[i], padded[i, 2 - dy : 10 - dy, 2 - dx : 8 - dx])
    assert set(np.asarray(drawn.offset).ravel().tolist()) == {-2, -1, 0, 1, 2}


def test_a_position_moves_with_what_it_points_at():
    pixels = np.zeros((32, 8, 6, 3), np.uint8)
    pixels[:, 4, 2] = 255  # Its center is at x = 2.5 / 6 and y = 4.5 / 8.
    found, drawn = changed(pixels, AugmentationOptions(shift=2))
    position = jnp.tile(jnp.array([2.5 / 6, 4.5 / 8]), (32, 1))
    moved = augmentation.shifted_position(position, drawn, 8, 6)
    for image, (x, y) in zip(np.asarray(found), np.asarray(moved), strict=True):
        assert image[int(y * 8), int(x * 6), 0] == 255


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", PIL.ImageEnhance.Brightness),
        ("contrast", PIL.ImageEnhance.Contrast),
        ("saturation", PIL.ImageEnhance.Color),
    ],
)
def test_colors_change_as_in_pil(name, enhancer):
    pixels, options = images(8), AugmentationOptions(**{name: 0.5})
    found, drawn = changed(pixels, options)
    for i, factor in enumerate(np.asarray(getattr(drawn, name))):
        assert 0.5 <= factor <= 1.5
        expected = np.asarray(enhancer(PIL.Image.fromarray(pixels[i])).enhance(float(factor)))
        # PIL rounds in between.
        assert np.abs(np.asarray(found[i], int) - expected).max() <= 2
    assert np.asarray(found != pixels).mean() > 0.5


def test_a_rotation_of_the_hue_keeps_the_luma_and_gray():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (5, 3)).astype(np.float32)
    x[0] = 100.0
    third = augmentation.rotate_hue(jnp.asarray(x), jnp.float32(2 * np.pi / 3))
    np.testing.assert_allclose(third[0], x[0], atol=0.2)
    np.testing.assert_allclose(third @ augmentation._LUMA, x @ augmentation._LUMA, atol=0.2)
    assert np.abs(third[1:] - x[1:]).max() > 20
    back = augmentation.rotate_hue(third, jnp.float32(-2 * np.pi / 3))
    np.testing.assert_allclose(back, x, atol=0.2)


def test_a_square_of_the_mean_color_is_cut_out():
    pixels, options = images(4), AugmentationOptions(cutout=3)
    found, _ = changed(pixels, options)
    for before, after in zip(pixels, np.asarray(found), strict=True):
        rows, columns = np.nonzero((after != before).any(-1))
        assert np.ptp(rows) == 2 and np.ptp(columns) == 2 and len(rows) == 9
        mean = np.round(before.mean((0, 1)))
        np.testing.assert_allclose(after[rows[0], columns[0]], mean, atol=1)


def test_noise_has_its_deviation():
    pixels = np.full((64, 8, 6, 3), 128, np.uint8)
    found, _ = changed(pixels, AugmentationOptions(noise=10.0))
    assert np.asarray(found, float).std() == pytest.approx(10.0, rel=0.05)
    assert np.asarray(found, float).mean() == pytest.approx(128.0, abs=0.5)


def test_all_frames_of_a_history_have_the_same_draw():
    one = images(4)
    frames = np.stack([one, one], axis=1)
    found, _ = changed(frames, ALL)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    assert (np.asarray(found[:, 0]) != one).mean() > 0.5


def test_a_sample_does_not_depend_on_the_others():
    pixels = images(6)
    few, _ = changed(pixels[:3], ALL)
    many, _ = changed(pixels, ALL)
    np.testing.assert_array_equal(few, many[:3])
    other, _ = changed(pixels, ALL, seed=2)
    assert (np.asarray(other) != np.asarray(many)).mean() > 0.5
    assert not np.array_equal(many[0], many[1])


def test_without_options_nothing_changes():
    pixels, off = images(3), AugmentationOptions()
    found, _ = changed(pixels, off)
    np.testing.assert_array_equal(found, pixels)
    assert not off.changes
    assert all(
        dataclasses.replace(off, **{field.name: getattr(ALL, field.name)}).changes
        for field in dataclasses.fields(off)
    )
