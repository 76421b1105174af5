"""Critics of observations and actions, for algorithms that learn from the actions of others."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class ActionValues(nn.Module):
    """Independent MLPs over features and an action, each of which estimates the return.

    The critics are small, so that every device holds them whole.

    Attributes:
      critics: Number C of critics.
      layers: Widths of the hidden layers.
    """

    critics: int = 2
    layers: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, features: jax.Array, action: jax.Array) -> jax.Array:
        """Maps features [B, F] and actions [B, A] to values, float32 [C, B]."""
        x = jnp.concatenate([features, action], axis=-1).astype(jnp.float32)
        x = jnp.broadcast_to(x, (self.critics, *x.shape))
        init = nn.initializers.lecun_uniform(batch_axis=(0,))
        for i, width in enumerate((*self.layers, 1)):
            weight = self.param(f"weight_{i}", init, (self.critics, x.shape[-1], width))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.critics, 1, width))
            x = jnp.einsum("cbi,cio->cbo", x, weight) + bias
            if i < len(self.layers):
                x = nn.relu(x)
        return x[..., 0]
