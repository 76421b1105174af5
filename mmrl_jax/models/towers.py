"""Vision and text towers: the encoders of CLIP, SigLIP and BERT, on the one transformer stack."""

import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.language import causal_mask
from mmrl_jax.models.transformer import (
    ACTIVATIONS,
    Attention,
    BlockSpec,
    Context,
    Dense,
    Norm,
    Transformer,
)

VisionPool = Literal["class", "attention"]
TextPool = Literal["mean", "end", "last"]


class Encoded(NamedTuple):
    """What a tower makes of B inputs.

    Attributes:
      tokens: float [B, S, D], one for every patch (after a class token, if there is one) or word.
      pooled: float32 [B, E], one for the whole; None from a tower without pooling.
    """

    tokens: jax.Array
    pooled: jax.Array | None


def cut_patches(pixels: jax.Array, patch: int) -> jax.Array:
    """Patches [B, H/p * W/p, p * p * C] of images [B, H, W, C], row by row.

    Raises:
      ValueError: H or W is not divisible by `patch`.
    """
    batch, height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"An image of {height}x{width} is not divisible into patches of {patch}.")
    x = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return jnp.swapaxes(x, 2, 3).reshape(batch, -1, patch * patch * channels)


def stretched_positions(present: jax.Array, edge: int) -> jax.Array:
    """Positions of the patches of images that may fill their canvas in part only (Idefics3).

    A patch takes the position of what lies in the same place of a full canvas, its fractional
    coordinates (Dehghani et al., 2023, NaViT). transformers finds it in float32, which for some
    edges that no model here has (19, 25, 29, 31, ...) puts it one too low.

    Args:
      present: bool [B, h, w], a rectangle from the top left; the others get position 0.
      edge: of the table of positions, edge * edge.

    Returns:
      int32 [B, h * w].
    """

    def along(counts: jax.Array, length: int) -> jax.Array:
        return jnp.arange(length) * edge // jnp.maximum(counts, 1)[:, None]

    rows = along(jnp.sum(present[:, :, 0], axis=1), present.shape[1])
    columns = along(jnp.sum(present[:, 0], axis=1), present.shape[2])
    positions = rows[:, :, None] * edge + columns[:, None, :]
    return jnp.where(present, positions, 0).reshape(present.shape[0], -1)


class VisionTower(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021).

    Attributes:
      width: of the stack.
      layers: blocks of the stack.
      block: what they are made of.
      patch: edge of a patch, pixels.
      patches: of an image; each has a learned position.
      class_token: a learned token comes first.
      patch_bias: the patch embedding has a bias.
      pre_norm: normalize the embeddings.
      pool: 'class', the class token, normalized; 'attention', what a learned query reads from the
        tokens, and an MLP (SigLIP); None.
      norm_tokens: normalize all tokens after the stack.
      projection: width E of the pooled features; None for as they are.
      dtype: compute dtype.
      remat: recompute each block's activations in the backward pass.
    """

    width: int
    layers: int
    block: BlockSpec
    patch: int
    patches: int
    class_token: bool = False
    patch_bias: bool = True
    pre_norm: bool = False
    pool: VisionPool | None = None
    norm_tokens: bool = True
    projection: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, present: jax.Array | None = None) -> Encoded:
        """Encodes images, float [B, H, W, 3], normalized as the processor says.

        Args:
          pixels: the images.
          present: bool [B, H / p, W / p], the patches that are no padding, which none reads, see
            `stretched_positions`; without a class token only. By default all are.

        Raises:
          ValueError: the image has another number of patches than `patches`.
        """
        block, normal = self.block, nn.initializers.normal(0.02)
        x = cut_patches(pixels, self.patch)
        if x.shape[1] != self.patches:
            raise ValueError(
                f"Images of {pixels.shape[1]}x{pixels.shape[2]} have {x.shape[1]} patches of "
                f"{self.patch}, but this tower is made for {self.patches}; resize them."
            )
        embed = Dense(self.width, self.dtype, use_bias=self.patch_bias, name="patch_embedding")
        x = embed(x)
        if self.class_token:
            token = self.param("class_embedding", normal, (self.width,)).astype(self.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param("positions", normal, x.shape[1:]).astype(self.dtype)
        mask = jnp.ones((1, 1, 1), bool)
        if present is not None:
            positions = positions[stretched_positions(present, round(self.patches**0.5))]
            mask = present.reshape(present.shape[0], 1, -1)
        x = x + positions
        if self.pre_norm:
            x = Norm(block.norm, block.epsilon, name="pre_norm")(x)
        stack = Transformer(
            self.layers, block, self.dtype, self.remat, final_norm=False, name="stack"
        )
        x = stack(x, Context(mask))
        norm, pooled = Norm(block.norm, block.epsilon, name="norm"), None
        if self.norm_tokens:
            x = norm(x)
        if self.pool == "class":
            pooled = x[:, 0] if self.norm_tokens else norm(x[:, 0])
        elif self.pool == "attention":
            pooled = AttentionPool(block, self.dtype, name="head")(x)
        if pooled is not None and self.projection is not None:
            project = Dense(self.projection, self.dtype, use_bias=False, name="projection")
            pooled = project(pooled)
        return Encoded(x, pooled)


class Pictures(nn.Module):
    """A vision tower behind pictures of any size, as a control policy sees them.

    Attributes:
      tower: its tokens are the features, without a class token.
      mean, std: of the normalization, per channel, for values in [0, 1].
    """

    tower: VisionTower
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps uint8 [B, H, W, 3], resized to the square of the tower, to [B, patches, D]."""
        edge = self.tower.patch * math.isqrt(self.tower.patches)
        x = pixels.astype(jnp.float32) / 255.0
        x = jax.image.resize(x, (len(x), edge, edge, 3), "bicubic")
        x = (jnp.clip(x, 0.0, 1.0) - jnp.array(self.mean)) / jnp.array(self.std)
        return self.tower(x).tokens[:, int(self.tower.class_token) :]


class AttentionPool(nn.Module):
    """A learned query reads the tokens, and an MLP follows (Lee et al., 2019; SigLIP)."""

    block: BlockSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, S, D] to [B, D]."""
        s, width, length = self.block, x.shape[-1], x.shape[1]
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, width))
        mask = jnp.arange(length + 1)[None, None] < length  # The query does not read itself.
        y = jnp.concatenate([x.astype(self.dtype), probe], axis=1)
        y = Attention(s, self.dtype, name="attention")(y, Context(mask), 1)[:, 0]
        z = Norm(s.norm, s.epsilon, name="norm")(y)
        z = ACTIVATIONS[s.activation](Dense(s.hidden, self.dtype, name="mlp_in")(z))
        return y + Dense(width, self.dtype, name="mlp_out")(z)


class TextTower(nn.Module):
    """A text encoder with learned positions.

    Attributes:
      vocabulary: number of token ids.
      width: of the stack.
      layers: blocks of the stack.
      block: what they are made of.
      positions: the most tokens there may be.
      pool: 'mean' of the tokens that are present; 'end', the first token with id `end`, or where
        that is None the one with the highest id (CLIP); 'last', present or not (SigLIP).
      end: see `pool`.
      causal: a token reads those before it only.
      segments: kinds of segments that have an embedding of their own; all tokens are of the first.
      pre_norm: normalize the embeddings.
      final_norm: normalize after the stack.
      projection: width E of the pooled features; None for as they are.
      projection_bias: the projection has one.
      dtype: compute dtype.
      remat: recompute each block's activations in the backward pass.
    """

    vocabulary: int
    width: int
    layers: int
    block: BlockSpec
    positions: int
    pool: TextPool
    end: int | None = None
    causal: bool = False
    segments: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    projection: int | None = None
    projection_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, present: jax.Array) -> Encoded:
        """Encodes token ids int32 [B, L], of which bool [B, L] tells the words from padding.

        Raises:
          ValueError: there are more tokens than positions.
        """
        block, normal, length = self.block, nn.initializers.normal(0.02), tokens.shape[1]
        if length > self.positions:
            raise ValueError(f"{length} tokens, but there are {self.positions} positions.")
        table = self.param("table", normal, (self.vocabulary, self.width)).astype(self.dtype)
        places = self.param("positions_table", normal, (self.positions, self.width))
        x = table[tokens] + places[:length].astype(self.dtype)
        if self.segments:
            kinds = self.param("segments_table", normal, (self.segments, self.width))
            x = x + kinds[0].astype(self.dtype)
        if self.pre_norm:
            x = Norm(block.norm, block.epsilon, name="pre_norm")(x)
        mask = causal_mask(present) if self.causal else present[:, None, :]
        stack = Transformer(
            self.layers, block, self.dtype, self.remat, final_norm=False, name="stack"
        )
        x = stack(x, Context(mask))
        if self.final_norm:
            x = Norm(block.norm, block.epsilon, name="norm")(x)
        pooled = self._pooled(x.astype(jnp.float32), tokens, present)
        if self.projection is not None:
            project = Dense(
                self.projection, self.dtype, use_bias=self.projection_bias, name="projection"
            )
            pooled = project(pooled)
        return Encoded(x, pooled)

    def _pooled(self, x: jax.Array, tokens: jax.Array, present: jax.Array) -> jax.Array:
        if self.pool == "last":
            return x[:, -1]
        if self.pool == "mean":
            weight = present[..., None].astype(jnp.float32)
            return jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
        where = jnp.argmax(tokens if self.end is None else tokens == self.end, axis=1)
        return jnp.take_along_axis(x, where[:, None, None], axis=1)[:, 0]
