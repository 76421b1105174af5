"""Vision models that read images as square tiles: Idefics3, SmolVLM, PaliGemma, the LLaVAs."""

import math
from typing import NamedTuple

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.towers import VisionTower, cut_patches
from mmrl_jax.models.transformer import ACTIVATIONS, Activation, Dense
from mmrl_jax.models.vlm import VisionFeatures


class Tiles(NamedTuple):
    """Images of B samples, split into N tiles, in the order of their image tokens.

    Attributes:
      pixels: Tiles normalized as the processor specifies, float [B, N, H, W, 3].
      present: Which tiles are not padding, bool [B, N]. Where an image may fill only part of a
        tile, which patches are not padding, bool [B, N, H / p, W / p], see `VisionTower`.
    """

    pixels: jax.Array
    present: jax.Array


class TiledVision(nn.Module):
    """A vision tower, and a projector from its tokens to the width of the language model.

    Attributes:
      tower: Vision tower that encodes a tile.
      width: Width D of the language model.
      skip: Number of leading tokens of the tower that are dropped, e.g. 1 for a class token.
      shuffle: Edge of the square of tokens that are concatenated into one (pixel shuffle of Shi et
        al., 2016, in reverse); 1 for none.
      activation: Activation between the two dense layers of the projector (Liu et al., 2024); None
        for a projector of one layer.
      bias: Whether the projector has biases.
    """

    tower: VisionTower
    width: int
    skip: int = 0
    shuffle: int = 1
    activation: Activation | None = None
    bias: bool = True

    def features_per_tile(self) -> int:
        """Returns the number of image tokens per tile."""
        return (self.tower.patches + self.tower.class_token - self.skip) // self.shuffle**2

    @nn.compact
    def __call__(self, images: Tiles) -> VisionFeatures:
        """Encodes all tiles to features [B, N * features_per_tile, D]."""
        pixels, present = images
        batch, tiles = pixels.shape[:2]
        patches = present.reshape(-1, *present.shape[2:]) if present.ndim == 4 else None
        x = self.tower(pixels.reshape(-1, *pixels.shape[2:]), patches).tokens[:, self.skip :]
        if self.shuffle > 1:
            edge = math.isqrt(x.shape[1])
            x = cut_patches(x.reshape(-1, edge, edge, x.shape[-1]), self.shuffle)
        dtype = self.tower.dtype
        x = Dense(self.width, dtype, use_bias=self.bias, name="projector")(x)
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
            x = Dense(self.width, dtype, use_bias=self.bias, name="projector_out")(x)
        feature_present = jnp.any(present.reshape(batch, tiles, -1), axis=2)
        feature_present = jnp.repeat(feature_present, x.shape[1], axis=1)
        return VisionFeatures(x.reshape(batch, -1, self.width), feature_present)


@struct.dataclass
class AnyresTiles:
    """Images of B samples, I images each, of one size, split into tiles (LLaVA-OneVision).

    Attributes:
      pixels: Normalized tiles, float [B, I, T, H, W, 3]: the whole image first, then a grid of
        tiles in row-major order, in whose center the image is as large as fits.
      present: Which images are not padding, bool [B, I].
      size: Original height and width of the images in pixels.
      grid: Number of rows and columns of tiles; (0, 0) if there is only the whole image.
    """

    pixels: jax.Array
    present: jax.Array
    size: tuple[int, int] = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)


def grid_shape(
    size: tuple[int, int], grid: tuple[int, int], edge: int, most: int
) -> tuple[int, ...]:
    """Returns the shape of a grid's features without padding.

    Args:
      size: Original height and width of the image in pixels.
      grid: Number of rows and columns of tiles.
      edge: Edge of a tile in features.
      most: Number of tiles above which features are scaled down, see `AnyresVision`.

    Returns:
      Six counts of features: padding above, padding to the left, rows, columns, and the rows and
      columns after scaling.
    """
    rows, columns = (edge * n for n in grid)
    above = left = 0
    # The order of operations is that of transformers, whose rounding depends on it.
    if size[1] / size[0] > columns / rows:
        above = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
    else:
        left = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
    rows, columns = rows - 2 * above, columns - 2 * left
    ratio = math.sqrt(rows * columns / (most * edge**2))
    scaled = (rows, columns) if ratio <= 1.1 else (int(rows // ratio), int(columns // ratio))
    return above, left, rows, columns, *scaled


def anyres_features(size: tuple[int, int], grid: tuple[int, int], whole: int, most: int) -> int:
    """Returns the number of image tokens of an image.

    Args:
      size: Original height and width of the image in pixels.
      grid: Number of rows and columns of tiles; (0, 0) if there is only the whole image.
      whole: Number of features of a tile.
      most: Number of tiles above which features are scaled down, see `AnyresVision`.
    """
    if grid == (0, 0):
        return whole + 1
    rows, columns = grid_shape(size, grid, math.isqrt(whole), most)[-2:]
    return whole + rows * (columns + 1)


class AnyresVision(nn.Module):
    """Features of an image, then of its grid with a newline after each row (Li et al., 2024).

    Attributes:
      tiles: Module that encodes tiles.
      most: Number of tiles whose features are used unscaled; those of larger grids are scaled down
        to about this number.
    """

    tiles: TiledVision
    most: int

    def features_per_tile(self) -> int:
        """Returns the number of features of the whole image, and of each tile before scaling."""
        return self.tiles.features_per_tile()

    def features_per_image(self, size: tuple[int, int], grid: tuple[int, int]) -> int:
        """Returns the number of image tokens of an image, see `anyres_features`."""
        return anyres_features(size, grid, self.features_per_tile(), self.most)

    @nn.compact
    def __call__(self, images: AnyresTiles) -> VisionFeatures:
        """Encodes all images to features [B, I * features_per_image, D]."""
        batch, count, tiles = images.pixels.shape[:3]
        pixels = images.pixels.reshape(batch, count * tiles, *images.pixels.shape[3:])
        present = jnp.repeat(images.present, tiles, axis=1)
        x = self.tiles(Tiles(pixels, present)).tokens
        width = x.shape[-1]
        x = x.reshape(batch * count, tiles, -1, width)
        newline = self.param("newline", nn.initializers.normal(width**-0.5), (width,))
        newline = newline.astype(x.dtype)
        whole, grid = x[:, 0], newline[None, None]
        if images.grid != (0, 0):
            edge = math.isqrt(x.shape[2])
            shape = grid_shape(images.size, images.grid, edge, self.most)
            above, left, rows, columns, *scaled = shape
            grid = x[:, 1:].reshape(-1, *images.grid, edge, edge, width)
            grid = jnp.swapaxes(grid, 2, 3)
            grid = grid.reshape(-1, images.grid[0] * edge, images.grid[1] * edge, width)
            grid = grid[:, above : above + rows, left : left + columns]
            if scaled != [rows, columns]:
                resized = (len(grid), *scaled, width)
                grid = jax.image.resize(grid, resized, "linear", antialias=False)
            newlines = jnp.broadcast_to(newline, (*grid.shape[:2], 1, width))
            grid = jnp.concatenate([grid, newlines], axis=2).reshape(len(grid), -1, width)
        grid = jnp.broadcast_to(grid, (len(whole), *grid.shape[1:]))
        x = jnp.concatenate([whole, grid], axis=1)
        feature_present = jnp.repeat(images.present, x.shape[1], axis=1)
        return VisionFeatures(x.reshape(batch, -1, width), feature_present)
