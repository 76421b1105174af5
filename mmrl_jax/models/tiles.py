"""Vision models that read images as square tiles, each on its own: Idefics3, LLaVA, PaliGemma."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.towers import VisionTower, cut_patches
from mmrl_jax.models.transformer import ACTIVATIONS, Activation, Dense
from mmrl_jax.models.vlm import VisionFeatures


class Tiles(NamedTuple):
    """The images of B samples, cut into N tiles, in the order of their image tokens.

    Attributes:
      pixels: float [B, N, H, W, 3], normalised as the processor says.
      present: bool [B, N], False for what fills up samples with fewer tiles; or, where an image may
        fill a tile in part, [B, N, H / p, W / p], its patches (see `VisionTower`).
    """

    pixels: jax.Array
    present: jax.Array


class TiledVision(nn.Module):
    """A tower, and a projector from its tokens to the language model's width.

    Attributes:
      tower: reads a tile.
      width: D, of the language model.
      skip: tokens of the tower that are left out, from the first: a class token.
      shuffle: edge of the square of tokens that are joined to one (pixel shuffle: Shi et al., 2016,
        reversed).
      activation: between two dense layers (Liu et al., 2024); None: there is one.
      bias: the projector has biases.
    """

    tower: VisionTower
    width: int
    skip: int = 0
    shuffle: int = 1
    activation: Activation | None = None
    bias: bool = True

    def features_per_tile(self) -> int:
        """How many image tokens a tile stands for."""
        return (self.tower.patches + self.tower.class_token - self.skip) // self.shuffle**2

    @nn.compact
    def __call__(self, images: Tiles) -> VisionFeatures:
        """Features of all tiles, [B, N * features_per_tile, D]."""
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
        there = jnp.any(present.reshape(batch, tiles, -1), axis=2)
        there = jnp.repeat(there, x.shape[1], axis=1)
        return VisionFeatures(x.reshape(batch, -1, self.width), there)
