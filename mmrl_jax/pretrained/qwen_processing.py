"""Inputs of Qwen2.5-VL and Qwen3-VL: patches of images, and prompts with a token for each feature.

Images keep their aspect ratios, so their sizes differ; padding makes the shapes of a batch static.
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
ELONGATION = 200  # Maximum ratio of the longest edge to the shortest one.


@dataclasses.dataclass(frozen=True)
class PixelSpec:
    """How pixels are converted to patches.

    Attributes:
      patch: Edge of a patch in pixels.
      frames: Number of frames in a patch; an image is repeated for each.
      merge: Edge in patches of the square that is merged into one feature.
      smallest: Minimum area of an image in pixels.
      largest: Maximum area of an image in pixels.
      mean: Mean of the normalization of red, green and blue, for values in [0, 1].
      std: Standard deviation of the normalization of red, green and blue, for values in [0, 1].
      method: Interpolation of resizing, see `jax.image.resize`.
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
    """A batch for `VisionLanguageModel`, as NumPy arrays.

    Attributes:
      tokens: Token ids, padded on the left, int32 [B, S].
      present: Which tokens are not padding, bool [B, S].
      positions: Positions in time, height and width of each token, int32 [B, 3, S].
      images: Patches of the images, padded to P patches per sample.
    """

    tokens: np.ndarray
    present: np.ndarray
    positions: np.ndarray
    images: PatchImages


def smart_resize(height: int, width: int, spec: PixelSpec) -> tuple[int, int]:
    """Returns the size to which an image is resized: whole features, and an area within the limits.

    This is the rule of Qwen2-VL's processor (Wang et al., 2024), including Python's rounding of
    halves.

    Args:
      height: Height of the image in pixels.
      width: Width of the image in pixels.
      spec: Edges of patches and limits of the area.

    Returns:
      Height and width in pixels.

    Raises:
      ValueError: The image is too elongated.
    """
    if max(height, width) > ELONGATION * min(height, width):
        raise ValueError(
            f"An image of {height}x{width} is too elongated: one edge may be at most {ELONGATION} "
            "times the other; crop it."
        )
    unit = spec.patch * spec.merge
    new_height, new_width = (round(x / unit) * unit for x in (height, width))
    if new_height * new_width > spec.largest:
        shrink = math.sqrt(height * width / spec.largest)
        new_height, new_width = (
            max(unit, math.floor(x / shrink / unit) * unit) for x in (height, width)
        )
    elif new_height * new_width < spec.smallest:
        grow = math.sqrt(spec.smallest / (height * width))
        new_height, new_width = (math.ceil(x * grow / unit) * unit for x in (height, width))
    return new_height, new_width


@functools.partial(jax.jit, static_argnames="spec")
def cut_image(image: jax.Array, spec: PixelSpec) -> jax.Array:
    """Resizes an image and splits it into patches.

    For some images, Pillow 13 resizes rows before columns, whose levels then differ by the
    rounding.

    Args:
      image: Image, uint8 [H, W, 3].
      spec: How the image is resized, normalized and split.

    Returns:
      Patches in the order of `models.qwen_vision`, float32 [P, frames * patch * patch * 3].
    """
    size = smart_resize(image.shape[0], image.shape[1], spec)
    x = processing.resize(image[None].astype(jnp.float32), size, spec.method)[0] / 255
    x = (x - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)
    (new_height, new_width), merge, patch = size, spec.merge, spec.patch
    unit = merge * patch
    x = x.reshape(new_height // unit, merge, patch, new_width // unit, merge, patch, 3)
    x = x.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch * patch * 3)
    return jnp.tile(x, (1, spec.frames))


def grid(height: int, width: int, merge: int) -> np.ndarray:
    """Returns rows and columns, int32 [2, P], of the patches of an image, in the packed order.

    Args:
      height: Height of the image in patches.
      width: Width of the image in patches.
      merge: Edge in patches of the square that is merged into one feature.
    """
    indices = np.indices((height, width), np.int32)
    indices = indices.reshape(2, height // merge, merge, width // merge, merge)
    return indices.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def pack(images: Sequence[Sequence[np.ndarray]], spec: PixelSpec, patches: int) -> PatchImages:
    """Packs the images of each of B samples into one padded sequence of patches.

    Args:
      images: Images of each sample, uint8 [H, W, 3] each, of any sizes.
      spec: How images are converted to patches.
      patches: Number P of patches per sample, including padding.

    Raises:
      ValueError: A sample has more patches, or an image is too elongated.
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
                "increase it, or shrink the images."
            )
        for i, (image, (high, wide)) in enumerate(zip(sample, sizes, strict=True)):
            span = slice(ends[i], ends[i + 1])
            pixels[b, span] = cut_image(image, spec)
            segment[b, span] = i
            rows[b, span], columns[b, span] = grid(
                high // spec.patch, wide // spec.patch, spec.merge
            )
    return PatchImages(pixels, segment, rows, columns)


def axial_positions(
    is_image: chex.Array, present: chex.Array, images: PatchImages, merge: int
) -> jax.Array:
    """Returns positions in time, height and width, int32 [B, 3, S] (M-RoPE, Wang et al., 2024).

    Text tokens are numbered consecutively, with the same position on every axis. All tokens of an
    image have the same time; their rows and columns are counted from it, and the text continues
    after the larger of both. Padding has position 0. This pure function does not check that image
    tokens and features agree.

    Args:
      is_image: Which tokens are image tokens, bool [B, S].
      present: Which tokens are not padding, bool [B, S].
      images: Patches of the images, with one feature for each image token.
      merge: Edge in patches of the square that is merged into one feature.
    """
    first = slice(None, None, merge**2)
    segment = images.segment[:, first]
    row, column = images.rows[:, first] // merge, images.columns[:, first] // merge
    # The last feature of an image is in its last row and column, which determine its larger edge.
    last = jnp.diff(segment, axis=1, append=-2) != 0
    edge = jnp.where(last, jnp.maximum(row, column) + 1, 0)
    index = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)

    def scatter(features: jax.Array) -> jax.Array:
        return jnp.where(is_image, jnp.take_along_axis(features, index, axis=1), 0)

    step = jnp.where(is_image, scatter(edge), present)
    start = jnp.cumsum(step, axis=1) - step
    positions = [start, start + scatter(row), start + scatter(column)]
    return jnp.where(present[:, None], jnp.stack(positions, axis=1), 0).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Processor:
    """Prepares batches of texts and images.

    Attributes:
      tokenizer: Tokenizer of transformers.
      pixels: How images are converted to patches.
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
        """Prepares a batch of B samples.

        Args:
          texts: Texts with one image token for each image.
          images: Images of each text, uint8 [H, W, 3] each.
          length: Number S of tokens per sample, including padding.
          patches: Number P of patches per sample, including padding.

        Raises:
          ValueError: Texts and images disagree, a text has a video or too many tokens, or the
            images do not fit, see `pack`.
        """
        packed = pack(images, self.pixels, patches)
        token = self.tokenizer.convert_tokens_to_ids(IMAGE)
        tokens = np.full((len(texts), length), self.tokenizer.pad_token_id or 0, np.int32)
        present = np.zeros(tokens.shape, bool)
        for b, (text, sample) in enumerate(zip(texts, images, strict=True)):
            ids = self.ids(text, [image.shape[:2] for image in sample])
            if len(ids) > length:
                raise ValueError(
                    f"Text {b} has {len(ids)} tokens, more than length={length}; increase it."
                )
            tokens[b, length - len(ids) :], present[b, length - len(ids) :] = ids, True
        is_image, merge = tokens == token, self.pixels.merge
        check_counts(is_image, packed.segment[:, :: merge**2] >= 0)
        positions = np.asarray(axial_positions(is_image, present, packed, merge))
        return Prompts(tokens, present, positions, packed)

    def ids(self, text: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Returns the token ids of a text, with an image token for each feature.

        Args:
          text: Text with one image token for each image.
          sizes: Height and width of each image in pixels.

        Raises:
          ValueError: Text and images disagree, or the text has a video.
        """
        before, *after = text.split(IMAGE)
        if VIDEO in text:
            raise ValueError(f"Videos are not supported, but a text has {VIDEO!r}: {text!r}.")
        if len(after) != len(sizes):
            raise ValueError(f"{len(sizes)} images for {len(after)} of {IMAGE!r} in {text!r}.")
        unit = self.pixels.patch * self.pixels.merge
        resized = (smart_resize(*size, self.pixels) for size in sizes)
        counts = (height * width // unit**2 for height, width in resized)
        expanded = (IMAGE * count + rest for count, rest in zip(counts, after, strict=True))
        return self.tokenizer(before + "".join(expanded))["input_ids"]


def load_processor(directory: str | pathlib.Path) -> Processor:
    """Loads the processor of a local directory in the hub's format.

    Raises:
      ValueError: The files are damaged or unsupported, see `processor_files.read`.
    """
    # Qwen3-VL's processor has the settings of Qwen2.5-VL's.
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
