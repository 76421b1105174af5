"""Random changes of images that keep the meaning of an observation, inside `jit`.

All frames of a sample get the same draw, so that a history stays consistent. Images are not
flipped, because instructions and actions have a left and a right.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.config.options import NON_NEGATIVE, between, option

# Weights of red, green and blue in the luma of ITU-R BT.601, as in PIL.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# From RGB to luma and two axes of color, in which a rotation changes the hue (YIQ, NTSC).
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """The options of the augmentation of images; 0 switches a change off."""

    shift: int = option(
        0,
        "Maximum number of pixels by which an image is shifted in each direction; the border is "
        "repeated (DrQ, arXiv 2004.13649).",
        NON_NEGATIVE,
    )
    brightness: float = option(
        0.0,
        "Largest relative change of the brightness: 0.3 multiplies it by a factor in [0.7, 1.3].",
        between(0, 1),
    )
    contrast: float = option(
        0.0,
        "Largest relative change of the contrast: 0.3 multiplies it by a factor in [0.7, 1.3].",
        between(0, 1),
    )
    saturation: float = option(
        0.0,
        "Largest relative change of the saturation: 0.3 multiplies it by a factor in [0.7, 1.3].",
        between(0, 1),
    )
    hue: float = option(
        0.0,
        "Maximum rotation of the hue as a fraction of the color circle; it must be 0 where "
        "instructions name colors.",
        between(0, 0.5),
    )
    noise: float = option(
        0.0, "Standard deviation of noise on the pixels, of which white is 255.", NON_NEGATIVE
    )
    cutout: int = option(
        0, "Edge in pixels of a square that is replaced by the mean color.", NON_NEGATIVE
    )

    @property
    def changes(self) -> bool:
        """Whether any change is switched on."""
        return any(getattr(self, field.name) for field in dataclasses.fields(self))


class Draw(NamedTuple):
    """The random numbers of N samples.

    Attributes:
      offset: Shift of the content down and to the right in pixels, int32 [N, 2].
      brightness: Factor of the brightness, float32 [N].
      contrast: Factor of the contrast, float32 [N].
      saturation: Factor of the saturation, float32 [N].
      hue: Rotation of the hue in radians, float32 [N].
      corner: Row and column of the square that is cut out, float32 [N, 2] in [0, 1).
      noise: PRNG keys of the noise, [N].
    """

    offset: jax.Array
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array
    corner: jax.Array
    noise: jax.Array


def draw(rng: jax.Array, count: int, options: AugmentationOptions) -> Draw:
    """Draws the changes of `count` samples. Those of sample i do not depend on `count`."""

    def one(index: jax.Array) -> Draw:
        keys = jax.random.split(jax.random.fold_in(rng, index), 7)

        def factor(key: jax.Array, width: float) -> jax.Array:
            return jax.random.uniform(key, minval=1 - width, maxval=1 + width)

        o = options
        return Draw(
            offset=jax.random.randint(keys[0], (2,), -o.shift, o.shift + 1),
            brightness=factor(keys[1], o.brightness),
            contrast=factor(keys[2], o.contrast),
            saturation=factor(keys[3], o.saturation),
            hue=2 * jnp.pi * jax.random.uniform(keys[4], minval=-o.hue, maxval=o.hue),
            corner=jax.random.uniform(keys[5], (2,)),
            noise=keys[6],
        )

    return jax.vmap(one)(jnp.arange(count))


def apply(pixels: jax.Array, drawn: Draw, options: AugmentationOptions) -> jax.Array:
    """Returns the changed images of N samples, uint8 [N, H, W, 3] or, with frames, [N, K, H, W, 3].

    Args:
      pixels: Images of the samples.
      drawn: Random numbers of the samples.
      options: Options with which the random numbers were drawn.
    """

    def one(pixels: jax.Array, drawn: Draw) -> jax.Array:
        if options.shift:
            pixels = shift(pixels, drawn.offset)
        x = pixels.astype(jnp.float32)
        if options.brightness:
            x = jnp.clip(x * drawn.brightness, 0, 255)
        if options.contrast:
            mean = jnp.mean(x @ _LUMA, axis=(-2, -1), keepdims=True)[..., None]
            x = jnp.clip(mean + drawn.contrast * (x - mean), 0, 255)
        if options.saturation:
            luma = (x @ _LUMA)[..., None]
            x = jnp.clip(luma + drawn.saturation * (x - luma), 0, 255)
        if options.hue:
            x = jnp.clip(rotate_hue(x, drawn.hue), 0, 255)
        if options.noise:
            noise = jax.random.normal(drawn.noise, x.shape[-3:])
            x = jnp.clip(x + options.noise * noise, 0, 255)
        if options.cutout:
            x = cut_out(x, drawn.corner, options.cutout)
        return jnp.round(x).astype(jnp.uint8)

    return jax.vmap(one)(pixels, drawn)


def shift(pixels: jax.Array, offset: jax.Array) -> jax.Array:
    """Moves the content of images [..., H, W, 3] down and to the right by `offset` pixels [2]."""
    height, width = pixels.shape[-3:-1]
    rows = jnp.clip(jnp.arange(height) - offset[0], 0, height - 1)
    columns = jnp.clip(jnp.arange(width) - offset[1], 0, width - 1)
    return jnp.take(jnp.take(pixels, rows, axis=-3), columns, axis=-2)


def rotate_hue(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotates the hue of colors float32 [..., 3] by an angle in radians; the luma stays."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    zero, one = jnp.zeros(()), jnp.ones(())
    rotation = jnp.stack(
        [jnp.stack([one, zero, zero]), jnp.stack([zero, cos, -sin]), jnp.stack([zero, sin, cos])]
    )
    return x @ (np.linalg.inv(_YIQ) @ rotation @ _YIQ).T


def cut_out(x: jax.Array, corner: jax.Array, size: int) -> jax.Array:
    """Replaces a square of images [..., H, W, 3] by the mean color of each image.

    Args:
      x: Images, float32.
      corner: Place of the upper left corner among all those of squares inside the image, float32
        [2] in [0, 1).
      size: Edge of the square in pixels.
    """
    inside = jnp.ones((), bool)
    for axis, (length, start) in enumerate(zip(x.shape[-3:-1], corner, strict=True)):
        first = jnp.floor(start * max(length - size + 1, 1))
        along = (jnp.arange(length) >= first) & (jnp.arange(length) < first + size)
        inside = inside & (along[:, None] if axis == 0 else along[None, :])
    mean = jnp.mean(x, axis=(-3, -2), keepdims=True)
    return jnp.where(inside[..., None], mean, x)


def shifted_position(position: jax.Array, drawn: Draw, height: int, width: int) -> jax.Array:
    """Returns where positions in N images are after the shift.

    Args:
      position: Positions (x, y) as fractions of width and height, float32 [N, 2].
      drawn: Random numbers of the samples.
      height: Height of the images in pixels.
      width: Width of the images in pixels.

    Returns:
      The new positions, float32 [N, 2]; the border is repeated, so that they stay in [0, 1].
    """
    moved = drawn.offset[:, ::-1] / jnp.array([width, height], jnp.float32)
    return jnp.clip(position + moved, 0.0, 1.0)
