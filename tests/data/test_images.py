"""Compares the conversion of images of every mode with transformers and PIL."""

import io

import numpy as np
from PIL import Image, ImageOps
import pytest
from transformers.image_transforms import convert_to_rgb

from mmrl_jax.data import images
from mmrl_jax.data.images import ImageInfo

SIZE = (16, 16)
RAMP = np.linspace(0, 1, 256).reshape(SIZE)  # 256 grays, black to white.


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def palette():
    image = Image.new("P", SIZE, 0)
    image.putpalette([255, 0, 0] + [0, 0, 255] + [0] * 762)
    image.paste(1, (0, 0, 4, 4))
    return image


def noise(mode, seed=0):
    bands = len(Image.new(mode, SIZE).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (*SIZE, bands), dtype=np.uint8)
    return Image.frombytes(mode, SIZE, values.tobytes())


TRANSPARENT = {
    "nothing on black": encoded(Image.new("RGBA", SIZE, (0, 0, 0, 0))),
    "half of black": encoded(Image.new("RGBA", SIZE, (0, 0, 0, 128))),
    "every alpha": encoded(noise("RGBA")),
    "gray": encoded(noise("LA")),
    "a color of a palette": encoded(palette(), transparency=0),
    "alphas of a palette": encoded(palette(), transparency=bytes([100, 200])),
    "a color": encoded(Image.new("RGB", SIZE, (255, 0, 0)), transparency=(255, 0, 0)),
    "a gray": encoded(Image.new("L", SIZE, 7), transparency=7),
}
OPAQUE = {
    "RGB": encoded(noise("RGB")),
    "JPEG": encoded(noise("RGB"), "JPEG"),
    "opaque RGBA": encoded(Image.new("RGBA", SIZE, (9, 8, 7, 255))),
    "L": encoded(noise("L")),
    "1": encoded(noise("L").convert("1")),
    "P": encoded(palette()),
    "CMYK": encoded(noise("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("name", [*TRANSPARENT, *OPAQUE])
def test_pixels_are_those_of_transformers(name):
    data = (TRANSPARENT | OPAQUE)[name]
    found, info = images.read_rgb(data)
    theirs = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    np.testing.assert_array_equal(found, theirs)
    assert found.mode == "RGB" and (info.width, info.height) == found.size == SIZE
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(found, plain) == (name in OPAQUE)


def big_endian(values):
    """Returns a TIFF whose 16-bit pixels are big-endian."""
    image = Image.frombytes("I;16B", SIZE, values.astype(">u2").tobytes())
    return encoded(image, "TIFF")


DEEP = {
    "I;16": encoded(Image.fromarray((65535 * RAMP).round().astype(np.uint16))),
    "I;16B": big_endian((65535 * RAMP).round()),
    "I": encoded(Image.fromarray((65535 * RAMP).round().astype(np.int32)), "TIFF"),
    "F": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("mode", DEEP)
def test_gray_of_more_than_8_bits_keeps_its_levels(mode):
    found, info = images.read_rgb(DEEP[mode])
    assert info.mode == mode and images.is_deep(mode)
    # 65535 is 255 * 257, so that each of the 256 grays comes back exactly.
    expected = np.arange(256).reshape(SIZE)
    np.testing.assert_array_equal(found, np.stack([expected] * 3, axis=-1))


def test_a_transparent_value_of_16_bits_is_white_and_its_neighbors_are_not():
    values = np.tile(np.array([5000, 5001], np.uint16), (16, 8))
    found, _ = images.read_rgb(encoded(Image.fromarray(values), transparency=5000))
    np.testing.assert_array_equal(np.asarray(found)[0, :2, 0], [255, 19])  # 5001 / 257 = 19.46


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32([[0, 200]]), r"floats in \[0, 200\]"),
        (np.float32([[-0.5, 0.5]]), r"floats in \[-0.5, 0.5\]"),
        (np.float32([[np.nan, 0.5]]), r"floats in \[nan, nan\]"),
        (np.int32([[0, 200]]), r"integers in \[0, 200\]"),
        (np.int32([[0, 65536]]), r"integers in \[0, 65536\]"),
        (np.int32([[-1, 500]]), r"integers in \[-1, 500\]"),
    ],
    ids=["bytes", "negative", "NaN", "of 8 bits or dark", "above 16 bits", "negative integers"],
)
def test_an_image_that_does_not_say_what_white_is_is_refused(values, reason):
    with pytest.raises(
        ValueError, match=rf"{reason}, so that the white level is unknown;.*16 bits"
    ):
        images.read_rgb(encoded(Image.fromarray(values), "TIFF"))


def test_black_of_32_bits_is_black():
    found, _ = images.read_rgb(encoded(Image.fromarray(np.zeros((2, 2), np.int32)), "TIFF"))
    assert np.all(np.asarray(found) == 0)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (64, 64), (96, 30), (31, 97), (500, 3)])
@pytest.mark.parametrize("whole", [(24, 40), (32, 32)])
def test_a_letterbox_is_that_of_pil(size, whole):
    height, width = whole
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    found = images.fit(image, whole, resize="letterbox")
    if min(size) > 3:  # Of a line PIL makes an image without pixels.
        theirs = ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color="black")
        np.testing.assert_array_equal(found, theirs)
    stretched = images.fit(image, whole, resize="stretch")
    np.testing.assert_array_equal(
        stretched, image.resize((width, height), Image.Resampling.BICUBIC)
    )
    # Where nothing is to be padded the two are one.
    same = size[0] * height == size[1] * width
    assert np.array_equal(found, stretched) == same


def test_what_is_done_to_images_is_said():
    infos = [
        ImageInfo("a", "RGB", 64, 64),
        ImageInfo("b", "RGB", 69, 64),  # By 8 %.
        ImageInfo("c", "I;16", 71, 64),  # By 11 %.
        ImageInfo("d", "F", 64, 200),
    ]
    odd, deep = images.summary(infos, (32, 32), resize="letterbox")
    assert odd.startswith("2 of 4 images differ") and "padded with black" in odd
    assert deep.startswith("2 of 4 images are grayscale with more than 8 bits")
    assert "1 of mode 'F', 1 of mode 'I;16'" in deep
    assert "distorted" in images.summary(infos, (32, 32), resize="stretch")[0]
    assert images.summary(infos[:2], (32, 32), resize="letterbox") == []
