"""The vision tower of DINOv2, on the shared transformer stack."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.towers import VisionTower, cut_patches
from mmrl_jax.models.transformer import Dense


def resize_matrix(length: int, target: int, *, antialias: bool) -> np.ndarray:
    """Returns the weights with which torch's bicubic interpolation resizes a vector.

    Both variants use the cubic kernel of Keys (1981). Without antialiasing, its parameter is -0.75,
    and entries beyond the ends equal those at the ends. With antialiasing, its parameter is -0.5,
    the kernel widens where the vector shrinks, and entries beyond the ends have no weight.

    Args:
      length: Length of the vector.
      target: Length of the resized vector.
      antialias: Whether the interpolation is antialiased.

    Returns:
      Weights, float32 [target, length], each row of which sums to 1.
    """
    centers = (np.arange(target) + 0.5) * length / target - 0.5
    if antialias:
        offsets = centers[:, None] - np.arange(length)
        weights = _cubic(offsets / max(length / target, 1.0), -0.5)
        weights /= weights.sum(axis=1, keepdims=True)
    else:
        taps = np.floor(centers)[:, None] + np.arange(-1, 3)
        columns = np.clip(taps, 0, length - 1).astype(int)
        weights = np.zeros((target, length))
        np.add.at(weights, (np.arange(target)[:, None], columns), _cubic(centers[:, None] - taps))
    return weights.astype(np.float32)


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Returns the cubic kernel of Keys (1981) with parameter `a` at offsets x."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class DinoTower(VisionTower):
    """The vision transformer of DINOv2 (Oquab et al., 2024), for images of any number of patches.

    Position embeddings are learned on a square grid of `patches` places, and resized to the grid of
    the image, as in transformers. The tokens are those of the class, the registers and the patches.

    Attributes:
      registers: Number of learned tokens without a position (Darcet et al., 2024).
      antialias: Whether the resizing of position embeddings is antialiased, see `resize_matrix`.
    """

    class_token: bool = True
    registers: int = 0
    antialias: bool = False

    def embed(self, pixels: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Returns the tokens [B, 1 + registers + patches, D] of images before the stack."""
        normal = nn.initializers.normal(0.02)

        def tokens(name: str, count: int) -> jax.Array:
            return self.param(name, normal, (1, count, self.width)).astype(self.dtype)

        def for_all(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (len(pixels), *x.shape[1:]))

        x = cut_patches(pixels, self.patch)
        x = Dense(self.width, self.dtype, use_bias=self.patch_bias, name="patch_embedding")(x)
        positions = self.param("positions", normal, (1, self.patches + 1, self.width))
        first, others = positions[:, :1].astype(self.dtype), positions[0, 1:]
        grid = pixels.shape[1] // self.patch, pixels.shape[2] // self.patch
        x = x + self._resized(others, grid).astype(self.dtype)
        parts = [for_all(tokens("class_embedding", 1) + first), x]
        if self.registers:
            parts.insert(1, for_all(tokens("registers", self.registers)))
        return jnp.concatenate(parts, axis=1)

    def leading_tokens(self) -> int:
        """Returns the number of tokens before those of the patches."""
        return 1 + self.registers

    def _resized(self, positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Resizes position embeddings [patches, D] to a grid, float32 [1, rows * columns, D]."""
        edge = round(self.patches**0.5)
        x = positions.astype(jnp.float32)
        if grid != (edge, edge):
            rows, columns = (resize_matrix(edge, n, antialias=self.antialias) for n in grid)
            x = x.reshape(edge, edge, -1)
            x = jnp.einsum("ri,cj,ijd->rcd", rows, columns, x, precision=jax.lax.Precision.HIGHEST)
        return x.reshape(1, -1, x.shape[-1])
