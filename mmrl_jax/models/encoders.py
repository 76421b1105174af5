"""Encoders of a single modality: raw arrays to tokens of the width of the transformer stack."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.masks import Mask
from mmrl_jax.models.transformer import BlockSpec, Context, Dense, Remat, Transformer


def patchify(pixels: jax.Array, patch: int, margin: int) -> jax.Array:
    """Splits an image into one window per patch: the patch and `margin` pixels around it.

    With a margin of 0 these are the patches of a vision transformer. With a larger margin, a detail
    on the edge between two patches is fully visible to both. The image is padded with copies of its
    edge pixels.

    The function uses slices instead of a convolution or a gather: on XLA's CPU backend, a
    convolution takes a slow path inside `scan`, and a gather takes three times as long.

    Args:
      pixels: Images, uint8 [B, H, W, 3].
      patch: Edge of a patch in pixels.
      margin: Number of surrounding pixels on each side of a patch, at least 0.

    Returns:
      Windows in row-major order, float32 [B, H/patch * W/patch, (patch + 2 margin)^2 * 3] in
      [-1, 1].

    Raises:
      ValueError: `patch` does not divide H or W.
    """
    batch, height, width, _ = pixels.shape
    if height % patch or width % patch:
        raise ValueError(
            f"An image of {height}x{width} is not divisible into patches of {patch}; "
            f"choose a patch that divides both."
        )
    padding = (margin, margin)
    x = jnp.pad(pixels, ((0, 0), padding, padding, (0, 0)), mode="edge")
    size = patch + 2 * margin
    x = jnp.stack([x[:, i : i + size] for i in range(0, height, patch)], axis=1)
    x = jnp.stack([x[:, :, :, j : j + size] for j in range(0, width, patch)], axis=2)
    x = x.reshape(batch, x.shape[1] * x.shape[2], -1)
    return x.astype(jnp.float32) / 127.5 - 1.0


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns the sine-cosine embedding of a grid, float32 [rows * columns, width] (MAE)."""
    frequency = np.exp(np.linspace(np.log(np.pi / 2), np.log(8 * np.pi), width // 4))
    parts = []
    for position, count in (
        (np.repeat(np.arange(rows), columns), rows),
        (np.tile(np.arange(columns), rows), columns),
    ):
        angle = ((position + 0.5) / count)[:, None] * frequency[None]
        parts += [np.sin(angle), np.cos(angle)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def modulate(x: jax.Array, film: jax.Array) -> jax.Array:
    """Scales and shifts features [B, S, F] with `film` [B, 2 F] (FiLM, Perez et al., 2018)."""
    scale, shift = jnp.split(film[:, None], 2, axis=-1)
    return x * (1 + scale) + shift


class VisionProjection(nn.Module):
    """Projects features of a pretrained vision encoder to tokens, with optional FiLM modulation.

    Attributes:
      width: Width of the tokens.
      dtype: Compute dtype.
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Maps features [B, patches, E] and condition [B, D] or None to [B, patches, width]."""
        x = Dense(self.width, self.dtype, name="project")(features)
        if condition is not None:
            x = modulate(x, Dense(2 * self.width, self.dtype, name="film")(condition))
        return Dense(self.width, self.dtype, name="out")(nn.gelu(x))


class VisionEncoder(nn.Module):
    """Maps pixels to patch tokens, with optional FiLM modulation and self-attention.

    A two-layer perceptron processes each patch, so that a token can represent a conjunction such as
    'red and round' before any attention. FiLM modulates its hidden layer with the instruction, so
    that each patch can be compared with what the instruction asks for.

    Attributes:
      width: Width D of the tokens.
      patch: Edge of a patch in pixels.
      margin: Number of surrounding pixels that a patch token also sees, see `patchify`.
      hidden: Number of hidden units of the per-patch perceptron.
      layers: Number of self-attention blocks; 0 for none.
      heads: Number of attention heads in each block.
      mlp_ratio: Hidden width of the blocks' MLPs, divided by `width`.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
    """

    width: int
    patch: int
    margin: int
    hidden: int
    layers: int
    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(self, pixels: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Maps pixels uint8 [B, H, W, 3] and condition [B, D] or None to [B, patches, D]."""
        rows, columns = pixels.shape[1] // self.patch, pixels.shape[2] // self.patch
        x = patchify(pixels, self.patch, self.margin)
        x = Dense(self.hidden, self.dtype, name="patch_in")(x)
        if condition is not None:
            x = modulate(x, Dense(2 * self.hidden, self.dtype, name="film")(condition))
        x = Dense(self.width, self.dtype, name="patch_out")(nn.gelu(x))
        position_embedding = self.param(
            "place",
            lambda _, shape: jnp.asarray(sincos_2d(rows, columns, self.width)).reshape(shape),
            (rows * columns, self.width),
        )
        x = x + position_embedding.astype(self.dtype)
        if self.layers:
            block = BlockSpec(self.heads, self.mlp_ratio * self.width)
            stack = Transformer(self.layers, block, self.dtype, self.remat, name="stack")
            x = stack(x, Context(Mask()))
        return x


class TextEncoder(nn.Module):
    """Maps the tokens of an instruction to word features of width D.

    Attributes:
      width: Width D of the features.
      vocabulary: Number of token ids.
      layers: Number of self-attention blocks; 0 for none.
      heads: Number of attention heads in each block.
      mlp_ratio: Hidden width of the blocks' MLPs, divided by `width`.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
    """

    width: int
    vocabulary: int
    layers: int
    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens int32 [B, L] and mask bool [B, L], False for padding, to [B, L, D]."""
        length = tokens.shape[1]
        normal = nn.initializers.normal(1.0)
        table = self.param("words", normal, (self.vocabulary, self.width))
        position_embedding = self.param("place", nn.initializers.normal(0.1), (length, self.width))
        # A one-hot matmul has a matmul as its gradient, whereas a gather has a slow scatter.
        x = jax.nn.one_hot(tokens, self.vocabulary, dtype=self.dtype) @ table.astype(self.dtype)
        x = x + position_embedding.astype(self.dtype)
        if self.layers:
            block = BlockSpec(self.heads, self.mlp_ratio * self.width)
            stack = Transformer(self.layers, block, self.dtype, self.remat, name="stack")
            x = stack(x, Context(Mask(valid=mask)))
        return x


class ProprioEncoder(nn.Module):
    """Maps proprioception float32 [B, P] to one token [B, 1, D]."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, proprio: jax.Array) -> jax.Array:
        x = nn.gelu(Dense(self.width, self.dtype, name="hidden")(proprio))
        return Dense(self.width, self.dtype, name="token")(x)[:, None]
