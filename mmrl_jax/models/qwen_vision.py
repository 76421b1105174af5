"""The vision towers of Qwen2.5-VL and Qwen3-VL, on the one transformer stack.

Images keep their proportions, so each has its own number of patches. The patches of all images of a
sample make one padded sequence, in which masks keep images (and windows of images) apart. In each
image, merge x merge neighboring patches come one after the other, and become one feature:

    patch   0  1  4  5      feature  0  1
            2  3  6  7
            8  9 12 13               2  3
           10 11 14 15
"""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.language import Rope
from mmrl_jax.models.transformer import ACTIVATIONS, BlockSpec, Context, Dense, Norm, Transformer
from mmrl_jax.models.vlm import VisionFeatures


class PatchImages(NamedTuple):
    """The patches of the images of each of B samples, image after image, and padding at the end.

    Attributes:
      patches: float [B, P, frames * patch * patch * 3], normalized as the processor says.
      segment: int32 [B, P], which image of the sample a patch is of, from 0; -1 for padding.
      rows: int32 [B, P], from the top of the image, in patches.
      columns: int32 [B, P], from the left of the image, in patches.
    """

    patches: chex.Array
    segment: chex.Array
    rows: chex.Array
    columns: chex.Array


def hat(index: chex.Array, count: jax.Array, side: int) -> jax.Array:
    """Weights of linear interpolation between `side` points, float32 [..., side].

    Args:
      index: int [...], of one of the points that are wanted.
      count: int [...], how many they are: the first and the last meet those that there are.
      side: points that there are.
    """
    place = index * (side - 1.0) / jnp.maximum(count - 1, 1)
    return nn.relu(1 - jnp.abs(place[..., None] - jnp.arange(side)))


class Merger(nn.Module):
    """An MLP makes one feature of `group` neighboring patches.

    Attributes:
      features: width of what comes out.
      group: patches to a feature.
      block: whose norm is used.
      dtype: compute dtype.
      norm_merged: it is of the neighbors together, not of each.
    """

    features: int
    group: int
    block: BlockSpec
    dtype: jnp.dtype
    norm_merged: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, P, D] to [B, P / group, features]."""
        norm = Norm(self.block.norm, self.block.epsilon, name="norm")
        merged = (x.shape[0], x.shape[1] // self.group, self.group * x.shape[2])
        x = norm(x.reshape(merged)) if self.norm_merged else norm(x).reshape(merged)
        x = ACTIVATIONS["gelu"](Dense(merged[-1], self.dtype, name="mlp_in")(x))
        return Dense(self.features, self.dtype, name="mlp_out")(x)


class PatchTower(nn.Module):
    """A vision transformer for images of any size (Bai et al., 2025, Qwen2.5-VL and Qwen3-VL).

    Attributes:
      width: of the stack.
      layers: blocks of the stack.
      block: what they are made of.
      features: width of the features, the language model's.
      rope: turns half of each head by rows, the other half by columns; of size head / 2.
      merge: edge of the neighborhood that becomes a feature, patches.
      window: edge of the windows, patches; None where all layers read the whole image.
      full_layers: those that read the whole image where there are windows.
      side: of the square table of learned positions, which is interpolated; None for no table.
      deepstack: blocks after which features are made too.
      patch_bias: the patch embedding has a bias.
      dtype: compute dtype.
      remat: recompute each block's activations in the backward pass.
    """

    width: int
    layers: int
    block: BlockSpec
    features: int
    rope: Rope
    merge: int
    window: int | None
    full_layers: tuple[int, ...]
    side: int | None
    deepstack: tuple[int, ...]
    patch_bias: bool
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    def __call__(self, images: PatchImages) -> VisionFeatures:
        """Encodes images, [B, P] patches as [B, P / merge^2] features.

        Raises:
          ValueError: P is not divisible by merge^2.
        """
        group = self.merge**2
        if images.segment.shape[1] % group:
            raise ValueError(
                f"{images.segment.shape[1]} patches are not divisible by merge^2={group}; pad them."
            )
        same = images.segment[:, :, None] == images.segment[:, None, :]
        embed = Dense(self.width, self.dtype, use_bias=self.patch_bias, name="patch_embedding")
        x = embed(images.patches)
        if self.side is not None:
            normal = nn.initializers.normal(0.02)
            table = self.param("positions", normal, (self.side**2, self.width))
            x = x + (self._places(images, same, self.side) @ table).astype(x.dtype)
        contexts = self._contexts(images, same)
        pattern = tuple(int(i not in self.full_layers) for i in range(self.layers))
        stack = Transformer(
            self.layers,
            self.block,
            self.dtype,
            self.remat,
            pattern=pattern if self.window else None,
            final_norm=False,
            name="stack",
        )
        merger = functools.partial(Merger, self.features, group, self.block, self.dtype)
        deep, done = [], 0
        for k, i in enumerate(self.deepstack):
            x, done = stack(x, contexts, span=range(done, i + 1)), i + 1
            deep.append(merger(norm_merged=True, name=f"deep_merger_{k}")(x))
        x = merger(name="merger")(stack(x, contexts, span=range(done, self.layers)))
        return VisionFeatures(x, images.segment[:, ::group] >= 0, tuple(deep))

    def _contexts(self, images: PatchImages, same: jax.Array) -> tuple[Context, ...]:
        """Of layers that read the image, and of those that read their window."""
        by_axis = [self.rope.angles(x) for x in (images.rows, images.columns)]
        cos, sin = (jnp.concatenate(x, axis=-1) for x in zip(*by_axis, strict=True))
        masks = [same]
        if self.window:
            row, column = (x // self.window for x in (images.rows, images.columns))
            for x in (row, column):
                same = same & (x[:, :, None] == x[:, None, :])
            masks.append(same)
        return tuple(Context(mask, (cos, sin)) for mask in masks)

    def _places(self, images: PatchImages, same: jax.Array, side: int) -> jax.Array:
        """Each patch's weights of the table of positions, float32 [B, P, side * side]."""
        rows, columns = (
            hat(x, jnp.max(jnp.where(same, x[:, None, :], 0), axis=2) + 1, side)
            for x in (images.rows, images.columns)
        )
        weights = rows[..., :, None] * columns[..., None, :]
        return weights.reshape(*weights.shape[:2], -1)
