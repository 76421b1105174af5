"""Decoder-only language models: token ids to logits, on the one transformer stack."""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.transformer import BlockSpec, Context, Transformer


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021).

    Attributes:
      theta: base of the frequencies, theta^(-2i / size) for pair i.
      size: of a head.
      factor: positions are divided by it.
      llama3: (low, high, original length) of Llama 3.1's scaling, which divides the frequencies
        whose wavelength is above original / low by `factor`, leaves those below original / high as
        they are, and goes smoothly between; None: `factor` is for all.
      sections: how many pairs turn with each axis of positions that have several (Wang et al.,
        2024, Qwen2-VL's M-RoPE): size / 2 in all; None: there is one axis.
      interleaved: the axes take turns, and the first one has what is left of the pairs (Qwen3-VL);
        otherwise each has its pairs side by side.
    """

    theta: float
    size: int
    factor: float = 1.0
    llama3: tuple[float, float, int] | None = None
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    def frequencies(self) -> np.ndarray:
        """Angles per position, float32 [size / 2]."""
        base = 1.0 / self.theta ** (np.arange(0, self.size, 2, dtype=np.float32) / self.size)
        if self.llama3 is None:
            return (base / self.factor).astype(np.float32)
        low, high, original = self.llama3
        turns = original * base / (2 * math.pi)  # Of each pair within the original length.
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - smooth) * base / self.factor + smooth * base).astype(np.float32)

    def axes(self) -> np.ndarray:
        """The axis that each pair turns with, int [size / 2].

        Raises:
          ValueError: the sections are not of size / 2 pairs in all.
        """
        sections = self.sections or (self.size // 2,)
        if sum(sections) != self.size // 2:
            raise ValueError(
                f"sections={sections} have {sum(sections)} pairs in all, but a head of "
                f"{self.size} has {self.size // 2}."
            )
        if not self.interleaved:
            return np.repeat(np.arange(len(sections)), sections)
        pair = np.arange(self.size // 2)
        turn = pair % len(sections)
        return np.where(pair // len(sections) < np.asarray(sections)[turn], turn, 0)

    def angles(self, positions: chex.Array) -> tuple[jax.Array, jax.Array]:
        """Cos and sin, float32 [B, S, size / 2].

        Args:
          positions: [B, S], the same on every axis, or [B, A, S] on A axes, see `sections`.
        """
        if positions.ndim == 3:
            positions = jnp.swapaxes(positions[:, self.axes()], 1, 2)
        else:
            positions = positions[..., None]
        angle = positions.astype(jnp.float32) * self.frequencies()
        return jnp.cos(angle), jnp.sin(angle)


def causal_mask(present: jax.Array) -> jax.Array:
    """Who may read whom: bool [B, S, S], the earlier tokens and itself, of present ones [B, S]."""
    order = jnp.arange(present.shape[1])
    return (order[None, :] <= order[:, None])[None] & present[:, None, :]


class CachePosition(NamedTuple):
    """Where tokens stand that are read after a prefix.

    Attributes:
      slot: int32 [], slots of the cache that are taken.
      positions: int32 [B, P + T], of the tokens of the prefix, and of those of the cache.
    """

    slot: jax.Array
    positions: jax.Array


def next_position(positions: chex.Array, present: chex.Array) -> jax.Array:
    """The position of the token that follows, on every axis: the largest one and 1.

    Args:
      positions: int32 [B, S], or [B, A, S] on A axes.
      present: bool [B, S].

    Returns:
      int32 [B].
    """
    valid = present if positions.ndim == 2 else present[:, None]
    return jnp.max(jnp.where(valid, positions, -1), axis=range(1, positions.ndim)) + 1


class LanguageModel(nn.Module):
    """Token ids to logits.

    Attributes:
      vocabulary: number of token ids.
      width: of the stack.
      layers: blocks of the stack.
      block: what they are made of.
      ropes: one for every kind of layer, see `pattern`.
      pattern: kind of each layer; None where there is one.
      windows: how far back a layer of each kind reads, in positions, itself included; None: all.
      embedding_scale: that embeddings are multiplied by.
      tied: the output layer is the transposed embedding table.
      softcap: of the logits, softcap * tanh(logits / softcap); None: as they are.
      dtype: compute dtype.
      remat: recompute each block's activations in the backward pass.
    """

    vocabulary: int
    width: int
    layers: int
    block: BlockSpec
    ropes: tuple[Rope, ...]
    pattern: tuple[int, ...] | None = None
    windows: tuple[int | None, ...] = (None,)
    embedding_scale: float = 1.0
    tied: bool = True
    softcap: float | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.table = self.param("table", normal, (self.vocabulary, self.width))
        if not self.tied:
            self.head = self.param("head", normal, (self.width, self.vocabulary))
        self.stack = Transformer(
            self.layers, self.block, self.dtype, self.remat, pattern=self.pattern
        )

    def __call__(
        self,
        tokens: jax.Array,
        present: jax.Array,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 [B, S, V].

        Args:
          tokens: int32 [B, S].
          present: bool [B, S], False for padding, on either side.
          positions: int32 [B, S]; by default counted over the tokens that are present.
        """
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
        hidden = self.hidden_states(self.embed(tokens), causal_mask(present), positions)
        return self.logits(hidden)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [B, S, D] of token ids [B, S]."""
        table = self.table.astype(self.dtype)
        return table[tokens] * jnp.asarray(self.embedding_scale, self.dtype)

    def hidden_states(
        self,
        x: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        added: Sequence[jax.Array] = (),
        ahead: jax.Array | None = None,
        cache_position: CachePosition | None = None,
    ) -> jax.Array:
        """Features float32 [B, S, D] of embeddings [B, S, D].

        Args:
          x: embeddings, of tokens or of whatever else.
          mask: bool [B, S, S], who may read whom; windows narrow it. With a cursor [B, S, P + T],
            over a prefix of P tokens and the T slots of the cache.
          positions: int32 [B, S], or [B, A, S], see `Rope.angles`.
          added: see `Transformer`.
          ahead: bool [B, S, S], of the mask what no window narrows.
          cache_position: where `x` stands behind a prefix that an earlier pass has kept, see
            `Attention`.
        """
        slot, keys = (None, positions) if cache_position is None else cache_position
        contexts = []
        for rope, window in zip(self.ropes, self.windows, strict=True):
            narrowed = mask
            if window is not None:
                near = positions[:, :, None] - keys[:, None, :] < window
                narrowed = mask & (near if ahead is None else near | ahead)
            contexts.append(Context(narrowed, rope.angles(positions), slot))
        return self.stack(x, contexts, added=added)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of features [..., D]."""
        head = self.table.T if self.tied else self.head
        rows = hidden.reshape(-1, self.width).astype(self.dtype)
        logits = jnp.matmul(rows, head.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits.reshape(*hidden.shape[:-1], self.vocabulary)
