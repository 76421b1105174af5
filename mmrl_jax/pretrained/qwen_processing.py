"""What Qwen2.5-VL and Qwen3-VL read: patches of images, and prompts with a token for each feature.

Images keep their proportions, so their sizes differ; padding makes the shapes of a batch static.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.qwen_vision import PatchImages
from mmrl_jax.models.vlm import check_counts
from mmrl_jax.pretrained import processing, processor_files

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
ELONGATION = 200  # The longest edge to the shortest one, at most.


@dataclasses.dataclass(frozen=True)
class PixelSpec:
    """How pixels become patches.

    Attributes:
      patch: edge of a patch, pixels.
      frames: of a patch; a picture is repeated.
      merge: edge of the neighborhood that becomes a feature, patches.
      smallest: size of an image, pixels.
      largest: size of an image, pixels.
      mean: of red, green and blue, of the range from 0 to 1.
      std: of red, green and blue.
      method: of resizing, see `jax.image.resize`.
    """

    patch: int
    frames: int
    merge: int
    smallest: int
    largest: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = "bicubic"


class Prompts(NamedTuple):
    """A batch for `VisionLanguageModel`; arrays of NumPy.

    Attributes:
      tokens: int32 [B, S], padded on the left.
      present: bool [B, S], False for padding.
      positions: int32 [B, 3, S].
      images: of at most P patches to a sample.
    """

    tokens: np.ndarray
    present: np.ndarray
    positions: np.ndarray
    images: PatchImages


def smart_resize(height: int, width: int, spec: PixelSpec) -> tuple[int, int]:
    """The size that an image is given: edges of whole features, and an area within the limits.

    As Qwen2-VL's processor does it (Wang et al., 2024), Python's rounding of halves included.

    Raises:
      ValueError: the image is too elongated.
    """
    if max(height, width) > ELONGATION * min(height, width):
        raise ValueError(
            f"An image of {height}x{width} is too elongated: one edge may be {ELONGATION} times "
            "the other; crop it."
        )
    unit = spec.patch * spec.merge
    high, wide = (round(x / unit) * unit for x in (height, width))
    if high * wide > spec.largest:
        shrink = math.sqrt(height * width / spec.largest)
        high, wide = (max(unit, math.floor(x / shrink / unit) * unit) for x in (height, width))
    elif high * wide < spec.smallest:
        grow = math.sqrt(spec.smallest / (height * width))
        high, wide = (math.ceil(x * grow / unit) * unit for x in (height, width))
    return high, wide


@functools.partial(jax.jit, static_argnames="spec")
def cut_image(image: jax.Array, spec: PixelSpec) -> jax.Array:
    """Patches, float32 [P, frames * patch * patch * 3], of an image, uint8 [H, W, 3].

    They come neighborhood by neighborhood, see `models.qwen_vision`. Pillow 13 resizes the rows
    of some images first, whose levels then differ by the rounding.
    """
    size = smart_resize(image.shape[0], image.shape[1], spec)
    x = processing.resize(image[None].astype(jnp.float32), size, spec.method)[0] / 255
    x = (x - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)
    (high, wide), merge, patch = size, spec.merge, spec.patch
    unit = merge * patch
    x = x.reshape(high // unit, merge, patch, wide // unit, merge, patch, 3)
    x = x.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch * patch * 3)
    return jnp.tile(x, (1, spec.frames))


def grid(height: int, width: int, merge: int) -> np.ndarray:
    """Rows and columns, int32 [2, P], of the patches of an image of height x width patches."""
    places = np.indices((height, width), np.int32)
    places = places.reshape(2, height // merge, merge, width // merge, merge)
    return places.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def pack(images: Sequence[Sequence[np.ndarray]], spec: PixelSpec, patches: int) -> PatchImages:
    """Packs the images of each of B samples.

    Args:
      images: uint8 [H, W, 3] each, of any sizes.
      spec: how they are cut.
      patches: P of the result; the rest is padding.

    Raises:
      ValueError: a sample has more patches than that, or an image cannot be resized.
    """
    shape = (len(images), patches)
    pixels = np.zeros((*shape, spec.frames * spec.patch**2 * 3), np.float32)
    segment = np.full(shape, -1, np.int32)
    rows, columns = np.zeros((2, *shape), np.int32)
    for b, sample in enumerate(images):
        sizes = [smart_resize(image.shape[0], image.shape[1], spec) for image in sample]
        ends = np.cumsum([0, *(high * wide // spec.patch**2 for high, wide in sizes)])
        if ends[-1] > patches:
            raise ValueError(
                f"The images of sample {b} have {ends[-1]} patches, more than patches={patches}; "
                "allow more, or shrink the images."
            )
        for i, (image, (high, wide)) in enumerate(zip(sample, sizes, strict=True)):
            here = slice(ends[i], ends[i + 1])
            pixels[b, here] = cut_image(image, spec)
            segment[b, here] = i
            rows[b, here], columns[b, here] = grid(
                high // spec.patch, wide // spec.patch, spec.merge
            )
    return PatchImages(pixels, segment, rows, columns)


def axial_positions(
    is_image: chex.Array, present: chex.Array, images: PatchImages, merge: int
) -> jax.Array:
    """Positions of time, height and width, int32 [B, 3, S] (Wang et al., 2024, Qwen2-VL's M-RoPE).

    A pure function, which does not see whether image tokens and features agree.

    Those of a text are counted, the same on every axis. An image is all at one time; its rows and
    columns are counted from there, and the text goes on after the larger of both. Padding is at 0.

    Args:
      is_image: bool [B, S], image tokens.
      present: bool [B, S].
      images: one feature for each image token.
      merge: edge of the neighborhood that becomes a feature, patches.
    """
    first = slice(None, None, merge**2)
    segment = images.segment[:, first]
    row, column = images.rows[:, first] // merge, images.columns[:, first] // merge
    # An image's last feature is in its last row and column, so it knows both edges.
    last = jnp.diff(segment, axis=1, append=-2) != 0
    edge = jnp.where(last, jnp.maximum(row, column) + 1, 0)
    which = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)

    def placed(features: jax.Array) -> jax.Array:
        return jnp.where(is_image, jnp.take_along_axis(features, which, axis=1), 0)

    step = jnp.where(is_image, placed(edge), present)
    start = jnp.cumsum(step, axis=1) - step
    positions = [start, start + placed(row), start + placed(column)]
    return jnp.where(present[:, None], jnp.stack(positions, axis=1), 0).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Processor:
    """Makes batches of texts and images.

    Attributes:
      tokenizer: transformers' own.
      pixels: how images are cut.
    """

    tokenizer: Any
    pixels: PixelSpec

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[np.ndarray]],
        *,
        length: int,
        patches: int,
    ) -> Prompts:
        """A batch of B samples.

        Args:
          texts: with one image token for each image.
          images: of each text, uint8 [H, W, 3] each.
          length: S, tokens.
          patches: P, see `pack`.

        Raises:
          ValueError: texts and images disagree, a text has a video or too many tokens, or see
            `pack`.
        """
        packed = pack(images, self.pixels, patches)
        token = self.tokenizer.convert_tokens_to_ids(IMAGE)
        tokens = np.full((len(texts), length), self.tokenizer.pad_token_id or 0, np.int32)
        present = np.zeros(tokens.shape, bool)
        for b, (text, sample) in enumerate(zip(texts, images, strict=True)):
            ids = self.ids(text, [image.shape[:2] for image in sample])
            if len(ids) > length:
                raise ValueError(
                    f"Text {b} has {len(ids)} tokens, more than length={length}; allow more."
                )
            tokens[b, length - len(ids) :], present[b, length - len(ids) :] = ids, True
        is_image, merge = tokens == token, self.pixels.merge
        check_counts(is_image, packed.segment[:, :: merge**2] >= 0)
        positions = np.asarray(axial_positions(is_image, present, packed, merge))
        return Prompts(tokens, present, positions, packed)

    def ids(self, text: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The ids of a text with images of these heights and widths, a token for every feature.

        Raises:
          ValueError: texts and images disagree, or the text has a video.
        """
        before, *after = text.split(IMAGE)
        if VIDEO in text:
            raise ValueError(f"Videos are not supported, but a text has {VIDEO!r}: {text!r}.")
        if len(after) != len(sizes):
            raise ValueError(f"{len(sizes)} images for {len(after)} of {IMAGE!r} in {text!r}.")
        unit = self.pixels.patch * self.pixels.merge
        resized = (smart_resize(*size, self.pixels) for size in sizes)
        counts = (high * wide // unit**2 for high, wide in resized)
        expanded = (IMAGE * count + rest for count, rest in zip(counts, after, strict=True))
        return self.tokenizer(before + "".join(expanded))["input_ids"]


def load_processor(directory: str | pathlib.Path) -> Processor:
    """The processor of a local directory in the hub's format.

    Raises:
      ValueError: see `processor_files.read`.
    """
    # Qwen2.5-VL and Qwen3-VL have the same one.
    tokenizer, _, image = processor_files.read(directory, "qwen2_5_vl")
    mean, std = processor_files.mean_and_std(image)
    spec = PixelSpec(
        patch=image["patch_size"],
        frames=image["temporal_patch_size"],
        merge=image["merge_size"],
        smallest=image["size"]["shortest_edge"],
        largest=image["size"]["longest_edge"],
        mean=mean,
        std=std,
        method=processor_files.METHODS[image["resample"]],
    )
    return Processor(tokenizer, spec)
