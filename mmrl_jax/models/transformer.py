"""The transformer stack that the encoders, the fusion of modalities and language models share."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.distributed.mesh import split_samples
from mmrl_jax.distributed.partition import gathered, keep_in_loop
from mmrl_jax.models.attention import attend, attend_cached, attention_weights
from mmrl_jax.models.masks import Mask

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

# Collections in which each block of a scanned stack has its part.
LAYERED = ("params", "lora", "prefix", "cache", "hidden", "attention", "attention_offset")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Specification of the blocks of a stack.

    Attributes:
      heads: Number of attention heads.
      hidden: Hidden width of the MLP.
      kv_heads: Number of key and value heads, which must divide `heads`; None for `heads`.
      head_size: Width of a head; None for width / heads.
      norm: 'plain' (layer norm without scale and bias), 'layer', 'rms' (Zhang and Sennrich, 2019),
        or 'rms_offset', whose scale is 1 + its parameter.
      epsilon: Constant that the norms add to the variance.
      placement: Placement of the norms: 'pre' for x + f(norm(x)), 'post' for norm(x + f(x)), 'both'
        for x + norm(f(norm(x))).
      activation: Activation of the MLP.
      gated: Whether the MLP is out(activation(gate(x)) * in(x)) (Shazeer, 2020).
      biases: Names of the layers that have a bias, out of 'query', 'key', 'value', 'out' and 'mlp'.
      layer_scale: Whether to multiply the outputs of attention and MLP by learned vectors before
        they are added to the tokens (LayerScale, Touvron et al., 2021).
      qk_norm: Whether to normalize the queries and keys of each head before their rotation.
      scale: Factor of the attention logits; None for 1 / sqrt(head_size).
      softcap: Bound of the attention logits, softcap * tanh(logits / softcap); None for no bound.
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
    layer_scale: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None


class Context(NamedTuple):
    """Inputs of a block other than its tokens.

    Attributes:
      mask: Attention mask over the S tokens, or over the keys of the prefix and the cache if there
        is a slot.
      rotary: Cosine and sine of the rotation angles of queries and keys, float32
        [B, S, head_size / 2] each or broadcastable, see `rotate`; None for no rotation.
      slot: Cache slot at which the tokens are written, int32 [], see `Attention`; None for no
        cache.
    """

    mask: Mask
    rotary: tuple[jax.Array, jax.Array] | None = None
    slot: jax.Array | None = None


class Dense(nn.Module):
    """A dense layer on the last axis, computed as one two-dimensional matmul.

    XLA's CPU backend runs [B, S, D] @ [D, F] at half the speed of [B*S, D] @ [D, F], so the layer
    flattens the leading axes first. The kernel is initialized in float32 and may be stored in
    bfloat16, or in int8 with a 'kernel_scale'; the product is computed in `dtype`. An adapter may
    be added, see `models.lora`; its dropout is active if there is a random stream 'dropout'.

    Attributes:
      features: Width of the output.
      dtype: Compute dtype.
      kernel_init: Initializer of the kernel.
      use_bias: Whether the layer has a bias, initially zero.
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
        kernel, rows = keep_in_loop(kernel, rows)
        y = rows @ gathered(kernel, (*self.path, "kernel")).astype(self.dtype)
        if self.has_variable("params", "kernel_scale"):
            y = (y * self.get_variable("params", "kernel_scale")).astype(self.dtype)
        if self.has_variable("lora", "adapter"):
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            adapter = self.get_variable("lora", "adapter")
            y = y + adapter.gathered((*self.path, "adapter"))(rows, key)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of each head (RoPE, Su et al., 2021) in float32.

    Args:
      x: Queries or keys, float [B, S, N, H].
      rotary: Cosine and sine of the angles, float32 [B, S, H / 2] each or broadcastable.

    Returns:
      Rotated queries or keys [B, S, N, H], in the dtype of `x`.
    """
    cos, sin = (angle[:, :, None] for angle in rotary)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Layer norm of [..., D] without scale and bias (Ba et al., 2016), with float32 statistics.

    The output always feeds dense layers, which can express both. On XLA's CPU backend, applying
    scale and bias here took half of the time of the norm and the matmul after it.
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


class Norm(nn.Module):
    """A norm over the last axis, computed in float32, see `BlockSpec.norm`."""

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

    For generation, keys and values are stored, [B, K, S, H] each. A pass with the mutable
    collection 'prefix' stores those of a prompt in it. If the context has a slot, `x` follows a
    prompt: its keys and values are written into the collection 'cache', [B * G, K, T, H] each, at
    the slot, and it attends to the prefix and the cache. G samples may follow each prompt; see
    `rollouts/generate.py`.

    A pass with the mutable collection 'attention' sows the attention weights into it under the name
    'weights', float32 [B, N, queries, S]. The collection 'attention_offset' may have a 'weights' of
    the same shape that is added to them, by which a target is differentiated.
    """

    spec: BlockSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, queries: int) -> jax.Array:
        """Maps x [B, S, D] to [B, queries, D], the outputs of the last tokens."""
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
        options: dict[str, Any] = {"scale": s.scale, "softcap": s.softcap}
        options["initializing"] = self.is_initializing()
        if context.slot is None:
            if self.is_mutable_collection("prefix") and not self.is_initializing():
                self._store("prefix", jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
            if self.is_mutable_collection("attention") and not self.is_initializing():
                mixed = self._attend_visibly(query, key, value, context.mask)
            else:
                mixed = attend(query, key, value, context.mask, **options)
        else:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=context.slot, axis=2
            )
            keys, values = self._load("cache")
            own = write(keys, jnp.swapaxes(key, 1, 2)), write(values, jnp.swapaxes(value, 1, 2))
            self._store("cache", *own)
            mixed = attend_cached(query, self._load("prefix"), own, context.mask, **options)
        mixed = mixed.reshape(*mixed.shape[:2], s.heads * size)
        return Dense(width, self.dtype, use_bias="out" in s.biases, name="out")(mixed)

    def _attend_visibly(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask
    ) -> jax.Array:
        """Computes `attend` with weights that an explanation can read and differentiate by."""
        spec = self.spec
        allowed = mask.allowed(query.shape[1], key.shape[1])
        weights = attention_weights(query, key, allowed, scale=spec.scale, softcap=spec.softcap)
        self.sow("attention", "weights", weights)
        weights = self.perturb("weights", weights, "attention_offset").astype(value.dtype)
        value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
        return jnp.einsum("bnqs,bsnh->bqnh", weights, value)

    def _store(self, collection: str, key: jax.Array, value: jax.Array) -> None:
        self.put_variable(collection, "key", key)
        self.put_variable(collection, "value", value)

    def _load(self, collection: str) -> tuple[jax.Array, jax.Array]:
        return self.get_variable(collection, "key"), self.get_variable(collection, "value")


class Block(nn.Module):
    """Attention and MLP with norms and residual connections, for the last `queries` tokens.

    Its output is sown into the collection 'hidden' under the name 'out'.
    """

    spec: BlockSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, queries: int) -> jax.Array:
        """Maps x [B, S, D] to [B, queries, D]."""
        s = self.spec

        def before(y: jax.Array, name: str) -> jax.Array:
            return y if s.placement == "post" else Norm(s.norm, s.epsilon, name=name)(y)

        def after(x: jax.Array, y: jax.Array, part: str) -> jax.Array:
            if s.layer_scale:
                scale = self.param(f"{part}_scale", nn.initializers.ones, y.shape[-1:])
                y = y * scale.astype(y.dtype)
            if s.placement == "pre":
                return x + y
            norm = Norm(s.norm, s.epsilon, name=f"{part}_out_norm")
            return norm(x + y) if s.placement == "post" else x + norm(y)

        y = Attention(s, self.dtype, name="attention")(
            before(x, "attention_norm"), context, queries
        )
        x = after(x[:, x.shape[1] - queries :], y, "attention")
        y = self._mlp(before(x, "mlp_norm"))
        x = after(x, y, "mlp")
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


# What is recomputed in the backward pass to save memory: nothing (False), all activations inside a
# block (True), or all but the outputs of products with parameters ('dots').
Remat = bool | Literal["dots"]


def _remat(block: type[nn.Module], remat: Remat, *, prevent_cse: bool = True) -> type[nn.Module]:
    """Returns a class of blocks whose activations are recomputed as `remat` says."""
    if not remat:
        return block
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = dots if remat == "dots" else None
    return nn.remat(block, static_argnums=(3,), prevent_cse=prevent_cse, policy=policy)


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
      layers: Number of blocks.
      block: Specification of the blocks.
      dtype: Compute dtype; norms and softmax statistics are float32.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      pattern: Index of the context of each layer, among several contexts; None for the first.
      final_norm: Whether to normalize the output of the last block.
      scan: Whether the blocks run in a loop over their parameters, which must then be stacked, see
        `models.stacked`. The program contains one block, and compiles faster.
    """

    layers: int
    block: BlockSpec
    dtype: jnp.dtype = jnp.float32
    remat: Remat = False
    pattern: tuple[int, ...] | None = None
    final_norm: bool = True
    scan: bool = False

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
          x: Tokens, float [B, S, D].
          contexts: Context of all layers, or one for each kind of layer, see `pattern`.
          readouts: Number of trailing tokens to return; None for all. The last block then computes
            only those, with the same values, which saves half of a two-block stack.
          only_readouts: Whether every block computes only the readouts (cross-attention), so that
            the other tokens stay unchanged.
          added: Features to add to the tokens after each of the first blocks (deepstack), float
            [B, S, D] each.
          span: Indices of the blocks to run, so that a caller can use the tokens between them; None
            for all. The final norm is applied after the last block of the stack.

        Returns:
          Tokens [B, S, D] or [B, readouts, D]; float32 after a final norm, otherwise of `dtype`.

        Raises:
          ValueError: The blocks are scanned, and only some tokens or blocks are asked for.
        """
        if isinstance(contexts, Context):
            contexts = (contexts,)
        x = split_samples(x.astype(self.dtype))
        if self.scan:
            if readouts is not None or span not in (None, range(self.layers)):
                raise ValueError(f"scan=True, but readouts={readouts} and span={span} are given.")
            x = self._scanned(x, contexts, added)
        else:
            x = self._unrolled(x, contexts, readouts, only_readouts, added, span)
        if readouts is not None:
            x = x[:, x.shape[1] - readouts :]
        if self.final_norm and (span is None or self.layers - 1 in span):
            x = Norm(self.block.norm, self.block.epsilon, name="norm")(x.astype(jnp.float32))
        return x

    def _unrolled(
        self,
        x: jax.Array,
        contexts: Sequence[Context],
        readouts: int | None,
        only_readouts: bool,
        added: Sequence[jax.Array],
        span: range | None,
    ) -> jax.Array:
        """Runs the blocks one after another, see `__call__`."""
        block = _remat(Block, self.remat)
        if self.layers > 1 and not self.is_initializing():
            # All blocks of equal shape are traced once. Initialization is left out, because the
            # random numbers of parameters depend on the calls in which they are made.
            block = nn.jit(block, static_argnums=(3,))
        length = x.shape[1]
        for i in range(self.layers) if span is None else span:
            last = i == self.layers - 1
            queries = length if readouts is None or not (last or only_readouts) else readouts
            context = contexts[self.pattern[i] if self.pattern else 0]
            y = block(self.block, self.dtype, name=f"block_{i}")(x, context, queries)
            x = y if last else jnp.concatenate([x[:, : length - queries], y], axis=1)
            x = split_samples(x)
            if i < len(added):
                x = x + added[i].astype(x.dtype)
        return x

    def _scanned(
        self, x: jax.Array, contexts: Sequence[Context], added: Sequence[jax.Array]
    ) -> jax.Array:
        """Runs the blocks in a loop, see `__call__`."""
        # Inside a loop, XLA does not merge the recomputation with the forward pass.
        block = _remat(Block, self.remat, prevent_cse=False)(self.block, self.dtype, name="blocks")
        extra = jnp.stack([y.astype(x.dtype) for y in added]) if added else None
        branches = [
            lambda block, x, context=context: block(x, context, x.shape[1]) for context in contexts
        ]

        def step(
            block: nn.Module, x: jax.Array, layer: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            i, kind = layer
            x = branches[0](block, x) if not self.pattern else nn.switch(kind, branches, block, x)
            x = split_samples(x)
            if extra is not None:
                own = jax.lax.dynamic_index_in_dim(extra, jnp.minimum(i, len(extra) - 1), 0, False)
                x = x + jnp.where(i < len(extra), own, 0)
            return x, None

        scan = nn.scan(
            step,
            variable_axes={name: 0 for name in LAYERED},
            split_rngs={"params": True, "dropout": True},
            length=self.layers,
        )
        kinds = jnp.asarray(self.pattern or (0,) * self.layers, jnp.int32)
        return scan(block, x, (jnp.arange(self.layers), kinds))[0]
