"""Attention masks, described by their conditions instead of by an array [B, Q, S]."""

from flax import struct
import jax
import jax.numpy as jnp


class Mask(struct.PyTreeNode):
    """Which keys each query may attend to: those that all of the given conditions allow.

    The queries are the last Q of the S tokens to which the keys belong. Without a condition every
    query attends to every key. A kernel applies the conditions inside its tiles, so that no array
    [B, Q, S] exists; elsewhere `allowed` gives that array.

    Attributes:
      valid: Keys that may be attended to, bool [B, S]; False for padding. None for all keys.
      segments: Id of the segment of each token, int32 [B, S], any but the smallest number; tokens
        attend only within their segment. None for a single segment.
      prefix: Tokens that attend to each other in both directions, whatever the other conditions but
        `valid`, bool [B, S]. They precede all other valid tokens. None for no such tokens.
      positions: Positions of the queries, int32 [B, Q], and of the keys, int32 [B, S], over which
        there is a window. None without a window.
      explicit: Any other condition, bool and broadcastable to [B, Q, S], or to [B, S, S] with one
        row for each token. None for no such condition.
      causal: Whether a token attends only to itself and to earlier tokens.
      window: Number of positions, its own included, back to which a token attends, see `within`.
        None for no limit.
      contiguous: Whether no padding is between valid tokens and positions count these, so that a
        kernel can count a window in tokens.
      readouts: Number of last tokens that attend to themselves and to the tokens before all of
        them, but not to each other.
    """

    valid: jax.Array | None = None
    segments: jax.Array | None = None
    prefix: jax.Array | None = None
    positions: tuple[jax.Array, jax.Array] | None = None
    explicit: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)
    contiguous: bool = struct.field(pytree_node=False, default=False)
    readouts: int = struct.field(pytree_node=False, default=0)

    def within(self, window: int | None, queries: jax.Array, keys: jax.Array) -> "Mask":
        """Returns the mask narrowed to a window over positions int32 [B, Q] and [B, S]."""
        if window is None:
            return self
        return self.replace(window=window, positions=(queries, keys))

    def allowed(self, queries: int, keys: int) -> jax.Array:
        """Returns whether query q may attend to key s, bool, broadcastable to [B, Q, S].

        Args:
          queries: Number Q of queries.
          keys: Number S of keys.
        """
        key = jnp.arange(keys)
        query = key[keys - queries :, None]
        mask = jnp.ones((1, 1, 1), bool)
        if self.explicit is not None:
            mask = _last(self.explicit, queries)
        if self.causal:
            mask = mask & (key <= query)
        if self.readouts:
            first = keys - self.readouts
            mask = mask & ((key < first) | (query < first) | (key == query))
        if self.segments is not None:
            rows = self.segments[:, keys - queries :]
            mask = mask & (rows[:, :, None] == self.segments[:, None, :])
        if self.valid is not None:
            mask = mask & self.valid[:, None, :]
        ahead = None
        if self.prefix is not None:
            readable = self.prefix if self.valid is None else self.prefix & self.valid
            ahead = self.prefix[:, keys - queries :, None] & readable[:, None, :]
            mask = mask | ahead
        if self.window is not None and self.positions is not None:
            rows, columns = self.positions
            near = rows[:, -queries:, None] - columns[:, None, :] < self.window
            mask = mask & (near if ahead is None else near | ahead)
        return mask


def causal_mask(valid: jax.Array, *, contiguous: bool = False) -> Mask:
    """Returns the causal mask over tokens that are not padding.

    Args:
      valid: False for padding, on either side, bool [B, S].
      contiguous: Whether no padding is between valid tokens, see `Mask`.
    """
    return Mask(valid=valid, causal=True, contiguous=contiguous)


def _last(rows: jax.Array, count: int) -> jax.Array:
    """Returns the rows [B, count, S] of the last tokens, or the single row that all share."""
    return rows if rows.shape[1] == 1 else rows[:, rows.shape[1] - count :]
