"""Decoder-only language models, from token ids to logits, on the shared transformer stack."""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.distributed.partition import embedding_lookup, gathered, keep_in_loop
from mmrl_jax.models.masks import Mask, causal_mask
from mmrl_jax.models.transformer import BlockSpec, Context, Remat, Transformer


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021).

    Attributes:
      theta: Base of the frequencies: pair i rotates by theta^(-2i / size) per position.
      size: Head size, an even number.
      factor: Factor by which positions are divided (linear scaling).
      llama3: (low, high, original length) of Llama 3.1's scaling. It divides frequencies by
        `factor` if their wavelength is above original / low, keeps them if it is below
        original / high, and interpolates smoothly between. None applies `factor` to all.
      sections: Number of pairs that each axis of multi-axis positions rotates, with sum size / 2
        (M-RoPE of Qwen2-VL, Wang et al., 2024). None for a single axis.
      interleaved: Whether the axes alternate over the pairs, with the remaining pairs for the first
        axis (Qwen3-VL). Otherwise the pairs of an axis are contiguous.
    """

    theta: float
    size: int
    factor: float = 1.0
    llama3: tuple[float, float, int] | None = None
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    def frequencies(self) -> np.ndarray:
        """Returns the angle per position of each pair, in radians, float32 [size / 2]."""
        base = 1.0 / self.theta ** (np.arange(0, self.size, 2, dtype=np.float32) / self.size)
        if self.llama3 is None:
            return (base / self.factor).astype(np.float32)
        low, high, original = self.llama3
        turns = original * base / (2 * math.pi)  # Of each pair, within the original length.
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - smooth) * base / self.factor + smooth * base).astype(np.float32)

    def axes(self) -> np.ndarray:
        """Returns the index of the position axis that rotates each pair, int [size / 2].

        Raises:
          ValueError: The sections do not sum to size / 2.
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
        """Returns the cosine and the sine of the rotation angles, float32 [B, S, size / 2] each.

        Args:
          positions: Token positions, int32 [B, S], shared by all axes, or [B, A, S] for A axes.
        """
        if positions.ndim == 3:
            positions = jnp.swapaxes(positions[:, self.axes()], 1, 2)
        else:
            positions = positions[..., None]
        angle = positions.astype(jnp.float32) * self.frequencies()
        return jnp.cos(angle), jnp.sin(angle)


class CachePosition(NamedTuple):
    """Position in the key-value cache of tokens that are read after a prefix.

    Attributes:
      slot: Number of cache slots that are already filled, int32 [].
      positions: Positions of the P tokens of the prefix and of the T cache slots, int32 [B, P + T].
    """

    slot: jax.Array
    positions: jax.Array


def next_position(positions: chex.Array, present: chex.Array) -> jax.Array:
    """Returns the position of the next token: one more than the largest position on any axis.

    Args:
      positions: Token positions, int32 [B, S], or [B, A, S] for A axes.
      present: Which tokens are not padding, bool [B, S].

    Returns:
      Position of the next token, int32 [B].
    """
    valid = present if positions.ndim == 2 else present[:, None]
    return jnp.max(jnp.where(valid, positions, -1), axis=range(1, positions.ndim)) + 1


class LanguageModel(nn.Module):
    """A decoder-only language model, from token ids to logits.

    Attributes:
      vocabulary: Number of token ids.
      width: Width D of the embeddings and of the stack.
      layers: Number of blocks.
      block: Specification of the blocks.
      ropes: Rotary embedding of each kind of layer, see `pattern`.
      pattern: Index of the kind of each layer; None if all are of the first kind.
      windows: Attention window of each kind of layer, in positions and including the token itself;
        None for unlimited attention.
      embedding_scale: Factor by which embeddings are multiplied.
      tied: Whether the output layer is the transposed embedding table.
      softcap: Bound of the logits, softcap * tanh(logits / softcap); None for unbounded logits.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      scan: Whether the blocks run in a loop over their stacked parameters, see `Transformer`.
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
    remat: Remat = False
    scan: bool = False

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.table = self.param("table", normal, (self.vocabulary, self.width))
        if not self.tied:
            self.head = self.param("head", normal, (self.width, self.vocabulary))
        self.stack = Transformer(
            self.layers, self.block, self.dtype, self.remat, pattern=self.pattern, scan=self.scan
        )

    def __call__(
        self,
        tokens: jax.Array,
        present: jax.Array,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes logits, float32 [B, S, V].

        Args:
          tokens: Token ids, int32 [B, S].
          present: Which tokens are not padding, bool [B, S]; padding may be on either side.
          positions: Token positions, int32 [B, S]; by default, the tokens that are not padding are
            numbered from 0.
        """
        mask = causal_mask(present, contiguous=positions is None)
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
        hidden = self.hidden_states(self.embed(tokens), mask, positions)
        return self.logits(hidden)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings [B, S, D] of token ids [B, S]."""
        rows = embedding_lookup(self.table, tokens).astype(self.dtype)
        return rows * jnp.asarray(self.embedding_scale, self.dtype)

    def hidden_states(
        self,
        x: jax.Array,
        mask: Mask,
        positions: jax.Array,
        added: Sequence[jax.Array] = (),
        cache_position: CachePosition | None = None,
    ) -> jax.Array:
        """Maps embeddings [B, S, D] to features after the final norm, float32 [B, S, D].

        Args:
          x: Input embeddings of tokens or images, float [B, S, D].
          mask: Attention mask over the S tokens; windows narrow it further. With `cache_position`
            it is over a prefix of P tokens and the T slots of the cache.
          positions: Token positions, int32 [B, S], or [B, A, S] for A axes, see `Rope.angles`.
          added: Features to add after the first blocks, float [B, S, D] each, see `Transformer`.
          cache_position: Position of `x` in the cache after a prefix that an earlier pass stored,
            see `Attention`; None without a cache.
        """
        slot, keys = (None, positions) if cache_position is None else cache_position
        contexts = []
        for rope, window in zip(self.ropes, self.windows, strict=True):
            narrowed = mask.within(window, positions, keys)
            contexts.append(Context(narrowed, rope.angles(positions), slot))
        return self.stack(x, contexts, added=added)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps features [..., D] to logits, float32 [..., V]."""
        rows = hidden.reshape(-1, self.width).astype(self.dtype)
        name = "table" if self.tied else "head"
        head, rows = keep_in_loop(getattr(self, name), rows)
        head = gathered(head, (*self.path, name))
        head = head.T if self.tied else head
        logits = jnp.matmul(rows, head.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits.reshape(*hidden.shape[:-1], self.vocabulary)
