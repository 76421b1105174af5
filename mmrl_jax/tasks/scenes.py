"""Renders images of flat colored shapes on a grid, in pure JAX.

A grid cell contains at most one object, so that a pixel depends on one object only, and the cost of
an image does not depend on the number of objects.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.rendering.pixels import unpack

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
MIN_RADIUS = 1.8  # In pixels; the shapes of smaller objects cannot be distinguished.
_RGB = np.array(
    [[220, 40, 40], [40, 170, 60], [50, 80, 230], [230, 210, 50], [170, 60, 190], [235, 235, 235]],
    np.float32,
)


class Objects(NamedTuple):
    """The objects in the C cells of a grid, row by row.

    Attributes:
      shape: Index into SHAPES, int32 [C].
      color: Index into COLORS, int32 [C].
      occupied: Whether the cell contains an object, bool [C].
    """

    shape: jax.Array
    color: jax.Array
    occupied: jax.Array


def render(
    rng: jax.Array,
    objects: Objects,
    *,
    rows: int,
    height: int,
    width: int,
    radius: jax.Array | float,
    spread: jax.Array | float,
) -> jax.Array:
    """Renders an image with `rows` x `rows` cells.

    Positions within the cells, sizes, shades, the dark background and the noise are sampled with
    `rng`. Edges are antialiased over one pixel.

    Args:
      rng: PRNG key.
      objects: Objects in the cells.
      rows: Number of rows of cells, and of columns.
      height: Height H of the image in pixels.
      width: Width W of the image in pixels.
      radius: Minimum radius of an object relative to the side of a cell, float32 [].
      spread: Maximum radius minus minimum radius, relative to the side of a cell, float32 [].
        `radius + spread` must be at most 0.46.

    Returns:
      Image, uint8 [H, W, 3].

    Raises:
      ValueError: If the image cannot be divided into equal cells.
    """
    if height % rows or width % rows:
        raise ValueError(
            f"height={height} and width={width} do not divide into {rows}x{rows} cells."
        )
    cells, pixels = rows * rows, height * width
    object_key, noise_key = jax.random.split(rng)
    # All random numbers are sampled in one call: each call costs compile time on CPU.
    u = jax.random.uniform(object_key, (4 * cells + 3,))
    objects_u, background = u[:-3].reshape(cells, 4), 10 + 50 * u[-3:]
    radii = radius + spread * objects_u[:, 0]
    max_offset = 0.5 - radii[:, None] - 0.04
    center = 0.5 + max_offset * (2 * objects_u[:, 1:3] - 1)
    color = jnp.asarray(_RGB)[objects.color] * (0.8 + 0.25 * objects_u[:, 3:])
    # Each random word gives the noise of four pixels, in [-10, 10].
    bits = jax.random.bits(noise_key, (-(-pixels // 4),), jnp.uint32)
    noise = (bits[:, None] >> np.arange(0, 32, 8, dtype=np.uint32) & 255).astype(jnp.float32)
    noise = (20 / 255 * noise - 10).reshape(-1)[:pixels]

    def per_pixel(x: jax.Array) -> jax.Array:
        """Reshapes values of the cells [C, ...] to [rows, 1, rows, 1, ...] for broadcasting."""
        return x.reshape(rows, 1, rows, 1, *x.shape[1:])

    # Pixels have the shape [rows, h, rows, w], so that values of the cells are broadcast. A gather
    # by pixel would take ten times as long.
    cell_height, cell_width = height // rows, width // rows
    y = jnp.asarray((np.arange(cell_height) + 0.5) / cell_height, jnp.float32)[:, None, None]
    x = jnp.asarray((np.arange(cell_width) + 0.5) / cell_width, jnp.float32)
    size = per_pixel(radii)
    local_y = (y - per_pixel(center[:, 0])) / size  # The object extends over [-1, 1].
    local_x = (x - per_pixel(center[:, 1])) / size
    coverage = _coverage(per_pixel(objects.shape), local_y, local_x, cell_height * size)
    coverage = jnp.where(per_pixel(objects.occupied), coverage, 0.0)
    noise = noise.reshape(coverage.shape)
    shade, packed = per_pixel(color), jnp.int32(0)
    for i in range(3):
        value = background[i] + coverage * (shade[..., i] - background[i]) + noise
        packed |= jnp.round(jnp.clip(value, 0, 255)).astype(jnp.int32) << (8 * i)
    return unpack(packed).reshape(height, width, 3)


def _coverage(shape: jax.Array, y: jax.Array, x: jax.Array, radius: jax.Array) -> jax.Array:
    """Returns the fraction of each pixel that a shape covers, float32.

    Args:
      shape: Index into SHAPES.
      y: Vertical position relative to the center, in units of the radius.
      x: Horizontal position relative to the center, in units of the radius.
      radius: Radius in pixels.
    """
    ax, ay = jnp.abs(x), jnp.abs(y)
    distance = jnp.select(
        [shape == 0, shape == 1, shape == 2],
        [
            jnp.sqrt(x * x + y * y) - 1.0,
            jnp.maximum(ax, ay) - 0.85,
            # The tip of the triangle is above its base.
            jnp.maximum((2 * ax - y - 1.0) / 5**0.5, y - 0.9),
        ],
        jnp.maximum(jnp.minimum(ax, ay) - 0.3, jnp.maximum(ax, ay) - 0.95),
    )
    return jnp.clip(0.5 - distance * radius, 0.0, 1.0)
