"""The one transformer stack: of every encoder, of the fusion of modalities, of language models."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # Finite, so that a row whose keys are all masked has finite gradients.

NormKind = Literal["plain", "layer", "rms", "rms_offset"]
Placement = Literal["pre", "post", "both"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a stack are made of.

    Attributes:
      heads: attention heads.
      hidden: hidden width of the MLP.
      kv_heads: heads of keys and values, which must divide `heads`; None for as many.
      head_size: of a head; None for width / heads.
      norm: 'plain' (layer norm without scale and bias), 'layer', 'rms' (Zhang and Sennrich, 2019),
        or 'rms_offset', whose scale is 1 + its parameter.
      epsilon: of the norms.
      placement: of the norms: 'pre', x + f(norm(x)); 'post', norm(x + f(x)); 'both',
        x + norm(f(norm(x))).
      activation: of the MLP.
      gated: the MLP is out(activation(gate(x)) * in(x)) (Shazeer, 2020).
      biases: which layers have one, of 'query', 'key', 'value', 'out' and 'mlp'.
      qk_norm: queries and keys of each head are normalized before they are rotated.
      scale: of the scores; None for 1 / sqrt(head_size).
      softcap: scores are softcap * tanh(scores / softcap); None for as they are.
    """

    heads: int
    hidden: int
    kv_heads: int | None = None
    head_size: int | None = None
    norm: NormKind = "plain"
    epsilon: float = 1e-6
    placement: Placement = "pre"
    activation: Activation = "gelu_tanh"
    gated: bool = False
    biases: tuple[str, ...] = ("query", "key", "value", "out", "mlp")
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None


class Context(NamedTuple):
    """What a block needs beside its tokens.

    Attributes:
      mask: bool [B, S, S] (or broadcastable), True where token q may read token s.
      rotary: cos and sin of the angles by which queries and keys are turned, float32
        [B, S, head_size / 2] (or broadcastable), see `rotate`; None for not at all.
      slot: int32 [], where in the cache the tokens go, see `Attention`; None: no cache is used.
    """

    mask: jax.Array
    rotary: tuple[jax.Array, jax.Array] | None = None
    slot: jax.Array | None = None


class Dense(nn.Module):
    """A dense layer on the last axis, as one two-dimensional matmul.

    XLA's CPU backend runs [B, S, D] @ [D, F] at half the speed of [B*S, D] @ [D, F], so the
    leading axes are flattened first. Parameters are float32; the product runs in `dtype`. A kernel
    may be int8, with its scale beside it, and an adapter may be added, see `models.lora`: its
    dropout is on where there is a random stream 'dropout'.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = rows @ kernel.astype(self.dtype)
        if self.has_variable("params", "kernel_scale"):
            y = (y * self.get_variable("params", "kernel_scale")).astype(self.dtype)
        if self.has_variable("lora", "adapter"):
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            y = y + self.get_variable("lora", "adapter")(rows, key)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax (Vaswani et al., 2017).

    Args:
      query: [B, Q, N, H], N heads of size H.
      key: [B, S, K, H]; K divides N, and N / K neighboring heads share a key head.
      value: [B, S, K, H].
      mask: bool, broadcastable to [B, Q, S]; True where query q may read key s.
      scale: of the scores, see `BlockSpec`.
      softcap: of the scores, see `BlockSpec`.

    Returns:
      [B, Q, N, H], in the dtype of `value`. A query that may read nothing gets the mean value.
    """
    batch, queries, heads, size = query.shape
    groups, length = key.shape[2], key.shape[1]
    # Heads before tokens: XLA's CPU backend runs these as plain batched matmuls, forward and
    # backward in half the time of the einsum over [B, S, N, H].
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    query = query.reshape(batch, groups, -1, size)
    scores = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, queries, length) * (scale or size**-0.5)
    weights = _softmax(scores, mask, softcap).astype(value.dtype)
    mixed = jnp.matmul(weights.reshape(batch, groups, -1, length), value)
    return jnp.swapaxes(mixed.reshape(batch, heads, queries, size), 1, 2)


def cached_attention(
    query: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`attention` over a prefix that G neighboring samples share, and over their own keys.

    Args:
      query: [B * G, Q, N, H].
      prefix: keys and values, [B, K, S, H] each.
      own: keys and values, [B * G, K, T, H] each.
      mask: bool, broadcastable to [B * G, Q, S + T].
      scale: of the scores, see `BlockSpec`.
      softcap: of the scores, see `BlockSpec`.

    Returns:
      [B * G, Q, N, H], in the dtype of the values.
    """
    samples, queries, heads, size = query.shape
    batch, groups, length, _ = prefix[0].shape
    rows = (heads // groups) * queries  # Of queries that read the same keys.
    query = jnp.swapaxes(query, 1, 2).reshape(samples, groups, rows, size)

    def shared(x: jax.Array) -> jax.Array:  # The samples of a group side by side.
        x = jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
        return x.reshape(batch, groups, -1, x.shape[-1])

    def apart(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(batch, groups, -1, rows, x.shape[-1]), 1, 2)
        return x.reshape(samples, groups, rows, x.shape[-1])

    def scores(q: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.matmul(q, jnp.swapaxes(keys, 2, 3), preferred_element_type=jnp.float32)

    both = [apart(scores(shared(query), prefix[0])), scores(query, own[0])]
    score = jnp.concatenate(both, axis=-1).reshape(samples, heads, queries, -1)
    weights = _softmax(score * (scale or size**-0.5), mask, softcap).astype(own[1].dtype)
    weights = weights.reshape(samples, groups, rows, -1)
    mixed = apart(jnp.matmul(shared(weights[..., :length]), prefix[1]))
    mixed = mixed + jnp.matmul(weights[..., length:], own[1])
    return jnp.swapaxes(mixed.reshape(samples, heads, queries, size), 1, 2)


def _softmax(scores: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    """Weights of scaled scores, float32 [B, N, Q, S]."""
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jax.nn.softmax(jnp.where(mask[:, None], scores, NEGATIVE), axis=-1)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x_i, x_{i + H/2}) of each head (Su et al., 2021, RoPE), float32 inside.

    Args:
      x: [B, S, N, H].
      rotary: cos and sin, float32 [B, S, H / 2] or broadcastable.

    Returns:
      [B, S, N, H], in the dtype of `x`.
    """
    cos, sin = (angle[:, :, None] for angle in rotary)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Layer norm without scale and bias (Ba et al., 2016), [..., D], float32 statistics.

    Every use of it feeds dense layers, which can express both; on XLA's CPU backend applying them
    here took half of the time of the norm and the matmul after it.
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


class Norm(nn.Module):
    """A norm over the last axis, see `BlockSpec.norm`; float32 inside."""

    kind: NormKind
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in the dtype of `x`."""
        if self.kind == "plain":
            return layer_norm(x, self.epsilon)
        y, width = x.astype(jnp.float32), x.shape[-1:]
        offset = self.kind == "rms_offset"
        init = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", init, width).astype(jnp.float32) + offset
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, width).astype(jnp.float32)
            return (layer_norm(y, self.epsilon) * scale + bias).astype(x.dtype)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of `x[:, -queries:]` over all of `x`.

    For generation, keys and values are kept, [B, K, S, H] each. A pass with mutable collection
    'prefix' stores those of a prompt there. With a slot in the context, `x` is what follows: its
    own are written into collection 'cache', [B * G, K, T, H] each, at the slot, and it reads the
    prefix and the cache. G samples may follow each prompt; see `rollouts/generate.py`.
    """

    spec: BlockSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, queries: int) -> jax.Array:
        """Maps x [B, S, D] to [B, queries, D]; of the context, the last rows are used."""
        s, width, first = self.spec, x.shape[-1], x.shape[1] - queries
        groups = s.kv_heads or s.heads
        if s.head_size is None and width % s.heads:
            raise ValueError(f"width={width} is not divisible by heads={s.heads}.")
        if s.heads % groups:
            raise ValueError(f"heads={s.heads} is not divisible by kv_heads={groups}.")
        size = s.head_size or width // s.heads

        def project(y: jax.Array, heads: int, name: str) -> jax.Array:
            y = Dense(heads * size, self.dtype, use_bias=name in s.biases, name=name)(y)
            return y.reshape(*y.shape[:-1], heads, size)

        query = project(x[:, first:], s.heads, "query")
        key, value = (project(x, groups, name) for name in ("key", "value"))
        if s.qk_norm:
            query = Norm(s.norm, s.epsilon, name="query_norm")(query)
            key = Norm(s.norm, s.epsilon, name="key_norm")(key)
        if context.rotary is not None:
            cos, sin = context.rotary
            query = rotate(query, (cos[:, first:], sin[:, first:]))
            key = rotate(key, context.rotary)
        mask = context.mask[:, first:] if context.mask.shape[1] > 1 else context.mask
        how = {"scale": s.scale, "softcap": s.softcap}
        if context.slot is None:
            if self.is_mutable_collection("prefix") and not self.is_initializing():
                self._keep("prefix", jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
            mixed = attention(query, key, value, mask, **how)
        else:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=context.slot, axis=2
            )
            keys, values = self._kept("cache")
            own = write(keys, jnp.swapaxes(key, 1, 2)), write(values, jnp.swapaxes(value, 1, 2))
            self._keep("cache", *own)
            mixed = cached_attention(query, self._kept("prefix"), own, mask, **how)
        mixed = mixed.reshape(*mixed.shape[:2], s.heads * size)
        return Dense(width, self.dtype, use_bias="out" in s.biases, name="out")(mixed)

    def _keep(self, collection: str, key: jax.Array, value: jax.Array) -> None:
        self.put_variable(collection, "key", key)
        self.put_variable(collection, "value", value)

    def _kept(self, collection: str) -> tuple[jax.Array, jax.Array]:
        return self.get_variable(collection, "key"), self.get_variable(collection, "value")


class Block(nn.Module):
    """Attention and MLP, each with its norms and its residual, on the last `queries` tokens.

    What it returns can be had from inside a stack: collection 'hidden', name 'out'.
    """

    spec: BlockSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, queries: int) -> jax.Array:
        """Maps x [B, S, D] to [B, queries, D]."""
        s = self.spec

        def before(y: jax.Array, name: str) -> jax.Array:
            return y if s.placement == "post" else Norm(s.norm, s.epsilon, name=name)(y)

        def after(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            if s.placement == "pre":
                return x + y
            norm = Norm(s.norm, s.epsilon, name=name)
            return norm(x + y) if s.placement == "post" else x + norm(y)

        y = Attention(s, self.dtype, name="attention")(
            before(x, "attention_norm"), context, queries
        )
        x = after(x[:, x.shape[1] - queries :], y, "attention_out_norm")
        y = self._mlp(before(x, "mlp_norm"))
        x = after(x, y, "mlp_out_norm")
        if not self.is_initializing():
            self.sow("hidden", "out", x)
        return x

    def _mlp(self, x: jax.Array) -> jax.Array:
        s, activation = self.spec, ACTIVATIONS[self.spec.activation]
        dense = functools.partial(Dense, dtype=self.dtype, use_bias="mlp" in s.biases)
        y = dense(s.hidden, name="mlp_in")(x)
        if s.gated:
            y = activation(dense(s.hidden, name="mlp_gate")(x)) * y
        else:
            y = activation(y)
        return dense(x.shape[-1], name="mlp_out")(y)


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
      layers: number of blocks.
      block: what they are made of.
      dtype: compute dtype; parameters, norms and softmax statistics are float32.
      remat: recompute each block's activations in the backward pass.
      pattern: which of several contexts each layer uses; by default the first.
      final_norm: normalize what the last block returns.
    """

    layers: int
    block: BlockSpec
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    pattern: tuple[int, ...] | None = None
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        contexts: Context | Sequence[Context],
        readouts: int | None = None,
        *,
        only_readouts: bool = False,
        added: Sequence[jax.Array] = (),
        span: range | None = None,
    ) -> jax.Array:
        """Runs the stack.

        Args:
          x: [B, S, D] tokens.
          contexts: of all layers, or several, see `pattern`.
          readouts: when given, only the last `readouts` tokens are wanted, and the last block
            computes only those: their values are the same, half of a two-block stack is saved.
          only_readouts: the other tokens stay as they come, and every block computes the
            readouts alone: cross-attention.
          added: [B, S, D] each, added to the tokens after the first blocks (deepstack).
          span: the blocks to run, for who wants the tokens between them too; None for all. The
            final norm comes after the last of the stack.

        Returns:
          [B, S, D], or [B, readouts, D]; float32 after a final norm, else of `dtype`.
        """
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        if isinstance(contexts, Context):
            contexts = (contexts,)
        length = x.shape[1]
        x = x.astype(self.dtype)
        for i in range(self.layers) if span is None else span:
            last = i == self.layers - 1
            queries = length if readouts is None or not (last or only_readouts) else readouts
            context = contexts[self.pattern[i] if self.pattern else 0]
            y = block(self.block, self.dtype, name=f"block_{i}")(x, context, queries)
            x = y if last else jnp.concatenate([x[:, : length - queries], y], axis=1)
            if i < len(added):
                x = x + added[i].astype(x.dtype)
        if readouts is not None:
            x = x[:, x.shape[1] - readouts :]
        if self.final_norm and (span is None or self.layers - 1 in span):
            x = Norm(self.block.norm, self.block.epsilon, name="norm")(x.astype(jnp.float32))
        return x
