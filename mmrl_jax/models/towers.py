"""Vision and text towers of CLIP, SigLIP and BERT, on the shared transformer stack."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.models.masks import Mask, causal_mask
from mmrl_jax.models.transformer import (
    ACTIVATIONS,
    Attention,
    BlockSpec,
    Context,
    Dense,
    Norm,
    Remat,
    Transformer,
)

VisionPool = Literal["class", "attention"]
TextPool = Literal["mean", "end", "last"]


class Encoded(NamedTuple):
    """Output of a tower for B inputs.

    Attributes:
      tokens: Features of each patch or word, float [B, S, D]; a class token, if any, comes first.
      pooled: Features of the whole input, float32 [B, E]; None from a tower without pooling.
    """

    tokens: jax.Array
    pooled: jax.Array | None


def cut_patches(pixels: jax.Array, patch: int) -> jax.Array:
    """Splits images [B, H, W, C] into row-major patches [B, H/p * W/p, p * p * C].

    Raises:
      ValueError: `patch` does not divide H or W.
    """
    batch, height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"An image of {height}x{width} is not divisible into patches of {patch}.")
    x = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return jnp.swapaxes(x, 2, 3).reshape(batch, -1, patch * patch * channels)


def stretched_positions(present: jax.Array, edge: int) -> jax.Array:
    """Returns position indices of the patches of images that may fill only part of a canvas.

    A patch takes the index of the table entry at the same fractional coordinates (Dehghani et al.,
    2023, NaViT; used by Idefics3). transformers computes it in float32, which for some edges that
    no supported model has (19, 25, 29, 31, ...) rounds to an index that is one too low.

    Args:
      present: Which patches are not padding, bool [B, h, w]: a rectangle at the top left. Padding
        gets index 0.
      edge: Edge of the square table of positions, which has edge * edge entries.

    Returns:
      Indices into the table of positions, int32 [B, h * w].
    """

    def axis_positions(counts: jax.Array, length: int) -> jax.Array:
        return jnp.arange(length) * edge // jnp.maximum(counts, 1)[:, None]

    rows = axis_positions(jnp.sum(present[:, :, 0], axis=1), present.shape[1])
    columns = axis_positions(jnp.sum(present[:, 0], axis=1), present.shape[2])
    positions = rows[:, :, None] * edge + columns[:, None, :]
    return jnp.where(present, positions, 0).reshape(present.shape[0], -1)


class VisionTower(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021).

    Attributes:
      width: Width D of the stack.
      layers: Number of blocks.
      block: Specification of the blocks.
      patch: Edge of a patch in pixels.
      patches: Number of patches in an image; each has a learned position embedding.
      class_token: Whether a learned class token precedes the patches.
      patch_bias: Whether the patch embedding has a bias.
      pre_norm: Whether to normalize the embeddings before the stack.
      pool: 'class' for the normalized class token; 'attention' for a learned query that attends to
        the tokens, followed by an MLP (SigLIP); None for no pooling.
      norm_tokens: Whether to normalize all tokens after the stack.
      projection: Width E of the pooled features; None for no projection.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      scan: Whether the blocks run in a loop over their stacked parameters, see `Transformer`.
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
    remat: Remat = False
    scan: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, present: jax.Array | None = None) -> Encoded:
        """Encodes images.

        Args:
          pixels: Images normalized as the processor specifies, float [B, H, W, 3].
          present: Which patches are not padding, bool [B, H / p, W / p], see `stretched_positions`;
            no token reads padding. It is supported only without a class token. By default there is
            no padding.

        Raises:
          ValueError: The number of patches in the image is not `patches`.
        """
        block, x, mask = self.block, self.embed(pixels, present), Mask()
        if present is not None:
            mask = Mask(valid=present.reshape(present.shape[0], -1))
        if self.pre_norm:
            x = Norm(block.norm, block.epsilon, name="pre_norm")(x)
        stack = Transformer(
            self.layers,
            block,
            self.dtype,
            self.remat,
            final_norm=False,
            scan=self.scan,
            name="stack",
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

    def embed(self, pixels: jax.Array, present: jax.Array | None) -> jax.Array:
        """Returns the tokens [B, S, D] of images before the stack, see `__call__`."""
        normal = nn.initializers.normal(0.02)
        x = cut_patches(pixels, self.patch)
        if x.shape[1] != self.patches:
            raise ValueError(
                f"Images of {pixels.shape[1]}x{pixels.shape[2]} have {x.shape[1]} patches of "
                f"{self.patch} pixels, but this tower takes {self.patches} patches; resize them."
            )
        embed = Dense(self.width, self.dtype, use_bias=self.patch_bias, name="patch_embedding")
        x = embed(x)
        if self.class_token:
            token = self.param("class_embedding", normal, (self.width,)).astype(self.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param("positions", normal, x.shape[1:]).astype(self.dtype)
        if present is not None:
            positions = positions[stretched_positions(present, round(self.patches**0.5))]
        return x + positions

    def leading_tokens(self) -> int:
        """Returns the number of tokens before those of the patches."""
        return int(self.class_token)


class ResizingVisionTower(nn.Module):
    """A vision tower that takes images of any size, for a policy.

    Attributes:
      tower: Vision tower whose patch tokens are the features.
      mean: Mean of the normalization per channel, for values in [0, 1].
      std: Standard deviation of the normalization per channel, for values in [0, 1].
      edge: Edge in pixels of the square to which images are resized.
    """

    tower: VisionTower
    mean: tuple[float, ...]
    std: tuple[float, ...]
    edge: int

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Resizes uint8 [B, H, W, 3] to the square and maps it to features [B, patches, D]."""
        x = pixels.astype(jnp.float32) / 255.0
        x = jax.image.resize(x, (len(x), self.edge, self.edge, 3), "bicubic")
        x = (jnp.clip(x, 0.0, 1.0) - jnp.array(self.mean)) / jnp.array(self.std)
        return self.tower(x).tokens[:, self.tower.leading_tokens() :]


class AttentionPool(nn.Module):
    """Pooling by a learned query and an MLP (Lee et al., 2019, as used by SigLIP)."""

    block: BlockSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, S, D] to [B, D]."""
        s, width, length = self.block, x.shape[-1], x.shape[1]
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, width))
        # The query does not read itself.
        mask = Mask(valid=jnp.arange(length + 1)[None] < length)
        y = jnp.concatenate([x.astype(self.dtype), probe], axis=1)
        y = Attention(s, self.dtype, name="attention")(y, Context(mask), 1)[:, 0]
        z = Norm(s.norm, s.epsilon, name="norm")(y)
        z = ACTIVATIONS[s.activation](Dense(s.hidden, self.dtype, name="mlp_in")(z))
        return y + Dense(width, self.dtype, name="mlp_out")(z)


class TextTower(nn.Module):
    """A text encoder with learned positions.

    Attributes:
      vocabulary: Number of token ids.
      width: Width D of the stack.
      layers: Number of blocks.
      block: Specification of the blocks.
      positions: Maximum number of tokens.
      pool: 'mean' for the mean over tokens that are not padding; 'end' for the first token with id
        `end`, or, where that is None, the token with the highest id (CLIP); 'last' for the last
        token even if it is padding (SigLIP).
      end: Token id that marks the end of a text, for pool='end'.
      causal: Whether a token attends only to itself and earlier tokens.
      segments: Number of segment types that have an embedding; all tokens are of the first type.
      pre_norm: Whether to normalize the embeddings before the stack.
      final_norm: Whether to normalize the tokens after the stack.
      projection: Width E of the pooled features; None for no projection.
      projection_bias: Whether the projection has a bias.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
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
    remat: Remat = False

    @nn.compact
    def __call__(self, tokens: jax.Array, present: jax.Array) -> Encoded:
        """Encodes token ids int32 [B, L] with mask bool [B, L], which is False for padding.

        Raises:
          ValueError: There are more tokens than `positions`.
        """
        block, normal, length = self.block, nn.initializers.normal(0.02), tokens.shape[1]
        if length > self.positions:
            raise ValueError(f"The text has {length} tokens, but the maximum is {self.positions}.")
        table = self.param("table", normal, (self.vocabulary, self.width)).astype(self.dtype)
        position_table = self.param("positions_table", normal, (self.positions, self.width))
        x = table[tokens] + position_table[:length].astype(self.dtype)
        if self.segments:
            segment_table = self.param("segments_table", normal, (self.segments, self.width))
            x = x + segment_table[0].astype(self.dtype)
        if self.pre_norm:
            x = Norm(block.norm, block.epsilon, name="pre_norm")(x)
        mask = causal_mask(present) if self.causal else Mask(valid=present)
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
        end_index = jnp.argmax(tokens if self.end is None else tokens == self.end, axis=1)
        return jnp.take_along_axis(x, end_index[:, None, None], axis=1)[:, 0]
