"""The one transformer stack, used by every encoder and by the fusion of modalities."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # Finite, so that a row whose keys are all masked has finite gradients.


class Dense(nn.Module):
    """A dense layer on the last axis, as one two-dimensional matmul.

    XLA's CPU backend runs [B, S, D] @ [D, F] at half the speed of [B*S, D] @ [D, F], so the
    leading axes are flattened first. Parameters are float32; the product runs in `dtype`.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax (Vaswani et al., 2017).

    Args:
      query: [B, Q, N, H], N heads of size H.
      key: [B, S, N, H].
      value: [B, S, N, H].
      mask: bool, broadcastable to [B, Q, S]; True where query q may read key s.

    Returns:
      [B, Q, N, H], in the dtype of `value`. A query that may read nothing gets the mean value.
    """
    # Heads before tokens: XLA's CPU backend runs these as plain batched matmuls, forward and
    # backward in half the time of the einsum over [B, S, N, H].
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.swapaxes(jnp.matmul(weights.astype(value.dtype), value), 1, 2)


def normalise(x: jax.Array) -> jax.Array:
    """Layer norm without scale and bias (Ba et al., 2016), [..., D], float32 statistics.

    Every use of it feeds dense layers, which can express both; on XLA's CPU backend applying them
    here took half of the time of the norm and the matmul after it.
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of `x[:, -queries:]` over all of `x`."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, queries: int) -> jax.Array:
        """Maps x [B, S, D] and mask [B, queries, S] to [B, queries, D]."""
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width={width} is not divisible by heads={self.heads}.")

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        query = split(Dense(width, self.dtype, name="query")(x[:, x.shape[1] - queries :]))
        key = split(Dense(width, self.dtype, name="key")(x))
        value = split(Dense(width, self.dtype, name="value")(x))
        mixed = attention(query, key, value, mask)
        return Dense(width, self.dtype, name="out")(mixed.reshape(*mixed.shape[:2], width))


class Block(nn.Module):
    """Pre-norm block, x + attention(norm(x)), then x + mlp(norm(x)), on the last `queries`."""

    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, queries: int) -> jax.Array:
        """Maps x [B, S, D] and mask [B, queries, S] to [B, queries, D]."""
        width = x.shape[-1]
        y = Attention(self.heads, self.dtype, name="attention")(normalise(x), mask, queries)
        x = x[:, x.shape[1] - queries :] + y
        y = nn.gelu(Dense(self.mlp_ratio * width, self.dtype, name="mlp_in")(normalise(x)))
        return x + Dense(width, self.dtype, name="mlp_out")(y)


class Transformer(nn.Module):
    """A stack of pre-norm blocks and a final norm.

    Attributes:
      layers: number of blocks.
      heads: attention heads; must divide the width of the input.
      mlp_ratio: hidden width of the MLP over the width of the stack.
      dtype: compute dtype; parameters and softmax statistics are float32.
      remat: recompute each block's activations in the backward pass.
    """

    layers: int
    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        readouts: int | None = None,
        *,
        only_readouts: bool = False,
    ) -> jax.Array:
        """Runs the stack.

        Args:
          x: [B, S, D] tokens.
          mask: bool [B, S, S] (or broadcastable), True where token q may read token s.
          readouts: when given, only the last `readouts` tokens are wanted, and the last block
            computes only those: their values are the same, half of a two-block stack is saved.
          only_readouts: the other tokens stay as they come, and every block computes the
            readouts alone: cross-attention.

        Returns:
          [B, S, D], or [B, readouts, D].
        """
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        length = x.shape[1]
        mask = jnp.broadcast_to(mask, (mask.shape[0], length, length))
        x = x.astype(self.dtype)
        for i in range(self.layers):
            last = i == self.layers - 1
            queries = length if readouts is None or not (last or only_readouts) else readouts
            y = block(self.heads, self.mlp_ratio, self.dtype, name=f"block_{i}")(
                x, mask[:, length - queries :], queries
            )
            x = y if last else jnp.concatenate([x[:, : length - queries], y], axis=1)
        if readouts is not None:
            x = x[:, x.shape[1] - readouts :]
        return normalise(x.astype(jnp.float32))
