"""Reads image files as 8-bit RGB images of one size, the input format of models.

The EXIF orientation is applied, transparency is composited on white as in the image processors of
transformers, and 16-bit and float grayscale images are scaled by the range of their type. An image
whose white level is ambiguous is rejected rather than guessed.

PIL is imported inside the functions, so that it is needed only where files are read.
"""

from collections import Counter
from collections.abc import Iterable
import hashlib
import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

LETTERBOX, STRETCH = RESIZES = ("letterbox", "stretch")
# A change of the aspect ratio by more than this factor is reported.
MAX_ASPECT_CHANGE = 1.1
UINT16_MAX, UINT8_MAX = 65535, 255


class ImageInfo(NamedTuple):
    """Properties of an image without its pixels.

    Attributes:
      digest: BLAKE2b digest of the file's bytes in 32 hexadecimal digits, which identifies the
        image. The decoded pixels are not used, because they may differ between decoder versions.
      mode: PIL mode of the file, for example 'RGB' or 'I;16'.
      width: Width in pixels, after the EXIF orientation is applied.
      height: Height in pixels, after the EXIF orientation is applied.
    """

    digest: str
    mode: str
    width: int
    height: int


def read_rgb(image: bytes | np.ndarray) -> tuple["PIL.Image.Image", ImageInfo]:
    """Decodes an image to mode 'RGB', and returns it with its properties.

    Args:
      image: Bytes of an encoded image, or pixels uint8 [H, W, 3].

    Raises:
      ValueError: If the array has another dtype or shape, or the white level is ambiguous, see
        `to_rgb`.
      OSError: If the bytes are not a complete image.
    """
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, bytes):
        # Cameras store the pixels in the orientation of the sensor, and the rotation as EXIF.
        try:
            opened = PIL.Image.open(io.BytesIO(image))
        except PIL.UnidentifiedImageError as error:  # Its text names an object in memory.
            raise OSError("it is no image of a format that PIL reads") from error
        stored = PIL.ImageOps.exif_transpose(opened)
        data = image
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ValueError(f"image is {array.dtype} {array.shape}; give uint8 [H, W, 3].")
        stored = PIL.Image.fromarray(array)
        data = str(array.shape).encode() + array.tobytes()
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return to_rgb(stored), ImageInfo(digest, stored.mode, *stored.size)


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Converts an image of any PIL mode to mode 'RGB'.

    Transparency is composited on white with the arithmetic of
    `transformers.image_transforms.convert_to_rgb`, so that the pixels are the same for all 8-bit
    modes.

    Raises:
      ValueError: If the pixels have 32 bits and their range leaves the white level ambiguous.
    """
    import PIL.Image

    if is_deep(image.mode):
        image = _to_8_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def is_deep(mode: str) -> bool:
    """Returns whether a PIL mode has more than 8 bits: 16-bit, 32-bit or float grayscale."""
    return mode in ("I", "F") or mode.startswith("I;16")


def _to_8_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Converts 16-bit, 32-bit or float grayscale to 'L', or 'LA' if a value is transparent.

    The conversion of PIL is not used: it clips at 255, so that most 16-bit images become white and
    images in [0, 1] become black.
    """
    import PIL.Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        white = 1
        if not (low >= 0 and high <= white):  # The comparison is also false for NaN.
            raise ValueError(
                f"its pixels are floats in [{low:g}, {high:g}], so that the white level is "
                "unknown; scale them to [0, 1], or save it with 8 or 16 bits."
            )
    else:
        white = UINT16_MAX
        # An image of mode 'I' with values up to 255 may be an 8-bit or a dark 16-bit image.
        ambiguous = image.mode == "I" and 0 < high <= UINT8_MAX
        if ambiguous or low < 0 or high > white:
            raise ValueError(
                f"its pixels are 32-bit integers in [{low}, {high}], so that the white level is "
                "unknown; save it with 8 or 16 bits."
            )
    gray = PIL.Image.fromarray(np.round(values / white * UINT8_MAX).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha = np.where(values == transparent, 0, UINT8_MAX).astype(np.uint8)
        gray.putalpha(PIL.Image.fromarray(alpha))
    return gray


def fit(image: "PIL.Image.Image", size: tuple[int, int], *, resize: str) -> np.ndarray:
    """Resizes an image in mode 'RGB' to an array uint8 [*size, 3].

    Args:
      image: Image of any size.
      size: Height and width of the result in pixels.
      resize: 'letterbox' keeps the aspect ratio: the image is scaled to fit, centered, and padded
        with black as in the processors of LLaVA-NeXT and LLaVA-OneVision. 'stretch' scales both
        sides independently and changes the aspect ratio.
    """
    import PIL.Image

    outer = size[1], size[0]
    inner = _contained(image.size, outer) if resize == LETTERBOX else outer
    if image.size != inner:
        image = image.resize(inner, PIL.Image.Resampling.BICUBIC)
    if inner != outer:
        canvas = PIL.Image.new("RGB", outer, "black")
        left, top = (round((a - b) / 2) for a, b in zip(outer, inner, strict=True))
        canvas.paste(image, (left, top))
        image = canvas
    return np.asarray(image)


def encode_png(image: np.ndarray) -> bytes:
    """Returns an image uint8 [H, W, 3] as PNG, without loss."""
    import PIL.Image

    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def _contained(size: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest (width, height) within `outer` that has the aspect ratio of `size`."""
    (width, height), (outer_width, outer_height) = size, outer
    if width * outer_height > outer_width * height:
        return outer_width, max(1, round(height / width * outer_width))
    return max(1, round(width / height * outer_height)), outer_height


def summary(infos: Iterable[ImageInfo], size: tuple[int, int], *, resize: str) -> list[str]:
    """Describes in sentences how images are changed before a model receives them.

    Args:
      infos: Properties of the images, without duplicates.
      size: Height and width in pixels to which the images are resized.
      resize: Method of resizing, see `fit`.

    Returns:
      A sentence for each kind of change; an empty list if nothing noteworthy is changed.
    """
    infos, (height, width) = list(infos), size
    ratios = [x.width * height / (x.height * width) for x in infos]
    changed = sum(max(ratio, 1 / ratio) > MAX_ASPECT_CHANGE for ratio in ratios)
    modes = Counter(x.mode for x in infos if is_deep(x.mode))
    sentences = []
    if changed and resize == LETTERBOX:
        sentences.append(
            f"{changed} of {len(infos)} images differ by more than 10 % from the aspect ratio of "
            f"{width} x {height}: they are padded with black (dataset.resize='letterbox')."
        )
    if changed and resize == STRETCH:
        sentences.append(
            f"{changed} of {len(infos)} images differ by more than 10 % from the aspect ratio of "
            f"{width} x {height}: they are distorted (dataset.resize='stretch')."
        )
    if modes:
        counts = ", ".join(f"{count} of mode {mode!r}" for mode, count in sorted(modes.items()))
        sentences.append(
            f"{modes.total()} of {len(infos)} images are grayscale with more than 8 bits and are "
            f"scaled by the range of their type ({counts})."
        )
    return sentences
