"""Images from files as models are given them: 8-bit RGB of one size.

A file is read as PIL's users expect it: turned as its camera says, transparency on white as the
image processors of transformers put it, 16-bit and float gray by its own range. An image whose file
does not say what white is raises, and is never guessed at.

PIL is imported inside the functions, so that a training host needs it only where it reads files.
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
SIMILAR = 1.1
UINT16_MAX, UINT8_MAX = 65535, 255


class ImageInfo(NamedTuple):
    """What is known of an image without its pixels.

    Attributes:
      digest: BLAKE2b of the file's bytes, 32 hexadecimal digits: equal for equal files only. It is
        not taken of the decoded pixels, which may differ between versions of a decoder.
      mode: PIL's mode of the file, for example 'RGB' or 'I;16'.
      width: pixels across, as it is shown.
      height: pixels down, as it is shown.
    """

    digest: str
    mode: str
    width: int
    height: int


def read_rgb(image: bytes | np.ndarray) -> tuple["PIL.Image.Image", ImageInfo]:
    """An encoded image, or uint8 [H, W, 3], as an image in mode 'RGB', and what is known of it.

    Raises:
      ValueError: the array is of another dtype or shape, or see `to_rgb`.
      OSError: the bytes are no image, or a part of them is missing.
    """
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, bytes):
        # Cameras store an image as the sensor lay, and how to turn it beside.
        stored = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(image)))
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
    """An image of any mode of PIL in mode 'RGB'.

    Transparency is composited on white by the arithmetic of transformers'
    `image_transforms.convert_to_rgb`, whose pixels these are for all modes of 8 bits.

    Raises:
      ValueError: the pixels are of 32 bits, in a range that does not say what white is.
    """
    import PIL.Image

    if is_deep(image.mode):
        image = _to_8_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def is_deep(mode: str) -> bool:
    """Says whether images of a mode have more than 8 bits: gray of 16 or 32 bits, or floats."""
    return mode in ("I", "F") or mode.startswith("I;16")


def _to_8_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Gray of 16 or 32 bits in mode 'L', or 'LA' where one value is declared transparent.

    PIL's own conversion clips at 255, which makes almost every such image white, and every image
    in [0, 1] black.
    """
    import PIL.Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        white = 1
        if not (low >= 0 and high <= white):  # NaN is neither.
            raise ValueError(
                f"its pixels are floats in [{low:g}, {high:g}], of which white is not known; scale "
                "them to [0, 1], or save it with 8 or 16 bits."
            )
    else:
        white = UINT16_MAX
        # Of 8 bits or a dark one of 16: the mode 'I' leaves that open, except for black.
        vague = image.mode == "I" and 0 < high <= UINT8_MAX
        if vague or low < 0 or high > white:
            raise ValueError(
                f"its pixels are 32-bit integers in [{low}, {high}], of which white is not known; "
                "save it with 8 or 16 bits."
            )
    gray = PIL.Image.fromarray(np.round(values / white * UINT8_MAX).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha = np.where(values == transparent, 0, UINT8_MAX).astype(np.uint8)
        gray.putalpha(PIL.Image.fromarray(alpha))
    return gray


def fit(image: "PIL.Image.Image", size: tuple[int, int], *, resize: str) -> np.ndarray:
    """An image in mode 'RGB' as uint8 [*size, 3].

    Args:
      image: of any size.
      size: height and width, pixels.
      resize: 'letterbox' keeps the aspect ratio: the image is as large as fits, in the middle, and
        black beside it, as the processors of LLaVA-NeXT and LLaVA-OneVision pad. 'stretch' fills
        the size whatever the aspect ratio.
    """
    import PIL.Image

    whole = size[1], size[0]
    inner = _contained(image.size, whole) if resize == LETTERBOX else whole
    if image.size != inner:
        image = image.resize(inner, PIL.Image.Resampling.BICUBIC)
    if inner != whole:
        canvas = PIL.Image.new("RGB", whole, "black")
        left, top = (round((a - b) / 2) for a, b in zip(whole, inner, strict=True))
        canvas.paste(image, (left, top))
        image = canvas
    return np.asarray(image)


def _contained(size: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int]:
    """The largest size of an aspect ratio in another size, both (width, height)."""
    (width, height), (across, down) = size, whole
    if width * down > across * height:
        return across, max(1, round(height / width * across))
    return max(1, round(width / height * down)), down


def summary(infos: Iterable[ImageInfo], size: tuple[int, int], *, resize: str) -> list[str]:
    """Sentences on what is done to images before a model is given them; none where nothing is.

    Args:
      infos: of the images, each once.
      size: see `fit`.
      resize: see `fit`.
    """
    infos, (height, width) = list(infos), size
    ratios = [x.width * height / (x.height * width) for x in infos]
    odd = sum(max(ratio, 1 / ratio) > SIMILAR for ratio in ratios)
    modes = Counter(x.mode for x in infos if is_deep(x.mode))
    told = []
    if odd and resize == LETTERBOX:
        told.append(
            f"{odd} of {len(infos)} images differ by more than 10 % from the aspect ratio of "
            f"{width} x {height}: they are padded with black (dataset.resize='letterbox')."
        )
    if odd and resize == STRETCH:
        told.append(
            f"{odd} of {len(infos)} images differ by more than 10 % from the aspect ratio of "
            f"{width} x {height}: they are distorted (dataset.resize='stretch')."
        )
    if modes:
        found = ", ".join(f"{count} of mode {mode!r}" for mode, count in sorted(modes.items()))
        told.append(
            f"{modes.total()} of {len(infos)} images are gray of more than 8 bits and are "
            f"converted by their range ({found})."
        )
    return told
