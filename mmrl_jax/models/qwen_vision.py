"""The vision towers of Qwen2.5-VL and Qwen3-VL, on the shared transformer stack.

Images keep their aspect ratios, so each has a different number of patches. The patches of all
images of a sample form one padded sequence, in which masks separate the images (and windows of
images). In each image, merge x merge neighboring patches are contiguous in the sequence and form
one feature:

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
from mmrl_jax.models.masks import Mask
from mmrl_jax.models.transformer import (
    ACTIVATIONS,
    BlockSpec,
    Context,
    Dense,
    Norm,
    Remat,
    Transformer,
)
from mmrl_jax.models.vlm import VisionFeatures


class PatchImages(NamedTuple):
    """Patches of the images of B samples, one image after another, with padding at the end.

    Attributes:
      patches: Patches normalized as the processor specifies, float [B, P, frames * patch^2 * 3].
      segment: Index within the sample of the image of each patch, int32 [B, P]; -1 for padding.
      rows: Row of each patch in its image, counted in patches from the top, int32 [B, P].
      columns: Column of each patch in its image, counted in patches from the left, int32 [B, P].
    """

    patches: chex.Array
    segment: chex.Array
    rows: chex.Array
    columns: chex.Array


def hat(index: chex.Array, count: jax.Array, side: int) -> jax.Array:
    """Returns weights of linear interpolation between `side` table entries, float32 [..., side].

    Args:
      index: Index of the output point, int [...].
      count: Number of output points, int [...]; the first and last coincide with the first and last
        table entries.
      side: Number of table entries.
    """
    table_position = index * (side - 1.0) / jnp.maximum(count - 1, 1)
    return nn.relu(1 - jnp.abs(table_position[..., None] - jnp.arange(side)))


class Merger(nn.Module):
    """An MLP that merges `group` neighboring patches into one feature.

    Attributes:
      features: Width of the output.
      group: Number of patches that form a feature.
      block: Specification of the stack's blocks, whose kind of norm is used.
      dtype: Compute dtype.
      norm_merged: Whether the norm is over the merged patches; otherwise it is over each patch.
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
      width: Width D of the stack.
      layers: Number of blocks.
      block: Specification of the blocks.
      features: Width of the output features, which is that of the language model.
      rope: Rotary embedding of size head_size / 2, applied to half of each head by rows and to the
        other half by columns.
      merge: Edge in patches of the square that is merged into one feature.
      window: Edge in patches of the attention windows; None if all layers read the whole image.
      full_layers: Indices of the layers that read the whole image when there are windows.
      side: Edge of the square table of learned positions, which is interpolated; None for no table.
      deepstack: Indices of the blocks after which additional features are computed.
      patch_bias: Whether the patch embedding has a bias.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      scan: Whether the blocks run in a loop over their stacked parameters, see `Transformer`; must
        be False if there are `deepstack` blocks.
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
    remat: Remat
    scan: bool = False

    @nn.compact
    def __call__(self, images: PatchImages) -> VisionFeatures:
        """Encodes images, from [B, P] patches to [B, P / merge^2] features.

        Raises:
          ValueError: P is not divisible by merge^2.
        """
        group = self.merge**2
        if images.segment.shape[1] % group:
            raise ValueError(
                f"{images.segment.shape[1]} patches are not divisible by merge^2={group}; pad them."
            )
        embed = Dense(self.width, self.dtype, use_bias=self.patch_bias, name="patch_embedding")
        x = embed(images.patches)
        if self.side is not None:
            normal = nn.initializers.normal(0.02)
            table = self.param("positions", normal, (self.side**2, self.width))
            weights = self._position_weights(images, self.side)
            x = x + (weights @ table).astype(x.dtype)
        contexts = self._contexts(images)
        pattern = tuple(int(i not in self.full_layers) for i in range(self.layers))
        stack = Transformer(
            self.layers,
            self.block,
            self.dtype,
            self.remat,
            pattern=pattern if self.window else None,
            final_norm=False,
            scan=self.scan,
            name="stack",
        )
        merger = functools.partial(Merger, self.features, group, self.block, self.dtype)
        deep, next_block = [], 0
        for k, i in enumerate(self.deepstack):
            x, next_block = stack(x, contexts, span=range(next_block, i + 1)), i + 1
            deep.append(merger(norm_merged=True, name=f"deep_merger_{k}")(x))
        x = merger(name="merger")(stack(x, contexts, span=range(next_block, self.layers)))
        return VisionFeatures(x, images.segment[:, ::group] >= 0, tuple(deep))

    def _contexts(self, images: PatchImages) -> tuple[Context, ...]:
        """Returns the contexts of layers that read the whole image and of layers with windows."""
        by_axis = [self.rope.angles(x) for x in (images.rows, images.columns)]
        cos, sin = (jnp.concatenate(x, axis=-1) for x in zip(*by_axis, strict=True))
        segments = [images.segment]
        if self.window:
            same_window, count = images.segment, -(-images.segment.shape[1] // self.window)
            for x in (images.rows, images.columns):
                same_window = same_window * count + x // self.window
            segments.append(same_window)
        return tuple(Context(Mask(segments=x), (cos, sin)) for x in segments)

    def _position_weights(self, images: PatchImages, side: int) -> jax.Array:
        """Returns each patch's weights over the table of positions, float32 [B, P, side * side]."""
        same_image = images.segment[:, :, None] == images.segment[:, None, :]
        rows, columns = (
            hat(x, jnp.max(jnp.where(same_image, x[:, None, :], 0), axis=2) + 1, side)
            for x in (images.rows, images.columns)
        )
        weights = rows[..., :, None] * columns[..., None, :]
        return weights.reshape(*weights.shape[:2], -1)
