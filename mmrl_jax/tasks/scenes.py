"""Flat pictures of colored shapes on a grid, drawn in pure JAX.

Every object lies within a cell of its own, so that a pixel asks after one object only, however many
there are: a picture costs the same as one of a single shape in each cell.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.rendering.pixels import unpack

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
LEAST_RADIUS = 1.8  # Pixels; the shapes of smaller objects cannot be told apart.
_RGB = np.array(
    [[220, 40, 40], [40, 170, 60], [50, 80, 230], [230, 210, 50], [170, 60, 190], [235, 235, 235]],
    np.float32,
)


class Objects(NamedTuple):
    """What there is in each of the C cells of a grid, row by row; int32 and bool [C].

    Attributes:
      shape: index into SHAPES.
      color: index into COLORS.
      there: whether there is an object.
    """

    shape: jax.Array
    color: jax.Array
    there: jax.Array


def draw(
    rng: jax.Array,
    objects: Objects,
    *,
    rows: int,
    height: int,
    width: int,
    radius: jax.Array | float,
    spread: jax.Array | float,
) -> jax.Array:
    """A picture, uint8 [H, W, 3], of `rows` x `rows` cells.

    Places within the cells, sizes, shades and the dark background vary with `rng`; edges are
    smooth over one pixel.

    Args:
      rng: key.
      objects: what there is.
      rows: of cells, as many as columns.
      height: pixels.
      width: pixels.
      radius: float32 [], the least of an object, of a cell's side.
      spread: float32 [], by how much more it may be; `radius + spread` is at most 0.46.

    Raises:
      ValueError: the picture is not divisible into cells.
    """
    if height % rows or width % rows:
        raise ValueError(
            f"height={height} and width={width} do not divide into {rows}x{rows} cells."
        )
    cells, pixels = rows * rows, height * width
    object_key, noise_key = jax.random.split(rng)
    # One call for all random numbers: on CPU each further one costs compile time.
    u = jax.random.uniform(object_key, (4 * cells + 3,))
    objects_u, ground = u[:-3].reshape(cells, 4), 10 + 50 * u[-3:]
    radii = radius + spread * objects_u[:, 0]
    free = 0.5 - radii[:, None] - 0.04
    center = 0.5 + free * (2 * objects_u[:, 1:3] - 1)
    color = jnp.asarray(_RGB)[objects.color] * (0.8 + 0.25 * objects_u[:, 3:])
    # Four pixels' noise out of each word, in [-10, 10].
    bits = jax.random.bits(noise_key, (-(-pixels // 4),), jnp.uint32)
    noise = (bits[:, None] >> np.arange(0, 32, 8, dtype=np.uint32) & 255).astype(jnp.float32)
    noise = (20 / 255 * noise - 10).reshape(-1)[:pixels]

    def of_pixels(x: jax.Array) -> jax.Array:
        """Of every cell [C, ...], for all of its pixels: [rows, 1, rows, 1, ...]."""
        return x.reshape(rows, 1, rows, 1, *x.shape[1:])

    # Pixels are [rows, h, rows, w]: broadcasts, for gathers by pixel take ten times as long.
    tall, wide = height // rows, width // rows
    y = jnp.asarray((np.arange(tall) + 0.5) / tall, jnp.float32)[:, None, None]
    x = jnp.asarray((np.arange(wide) + 0.5) / wide, jnp.float32)
    size = of_pixels(radii)
    local_y = (y - of_pixels(center[:, 0])) / size  # An object fills [-1, 1].
    local_x = (x - of_pixels(center[:, 1])) / size
    covered = _inside(of_pixels(objects.shape), local_y, local_x, tall * size)
    covered = jnp.where(of_pixels(objects.there), covered, 0.0)
    noise = noise.reshape(covered.shape)
    shade, packed = of_pixels(color), jnp.int32(0)
    for i in range(3):
        value = ground[i] + covered * (shade[..., i] - ground[i]) + noise
        packed |= jnp.round(jnp.clip(value, 0, 255)).astype(jnp.int32) << (8 * i)
    return unpack(packed).reshape(height, width, 3)


def _inside(shape: jax.Array, y: jax.Array, x: jax.Array, radius: jax.Array) -> jax.Array:
    """How much of each pixel a shape covers, float32; places in radii, the radius in pixels."""
    ax, ay = jnp.abs(x), jnp.abs(y)
    distance = jnp.select(
        [shape == 0, shape == 1, shape == 2],
        [
            jnp.sqrt(x * x + y * y) - 1.0,
            jnp.maximum(ax, ay) - 0.85,
            # From the tip above to the base below.
            jnp.maximum((2 * ax - y - 1.0) / 5**0.5, y - 0.9),
        ],
        jnp.maximum(jnp.minimum(ax, ay) - 0.3, jnp.maximum(ax, ay) - 0.95),
    )
    return jnp.clip(0.5 - distance * radius, 0.0, 1.0)
