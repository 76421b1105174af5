"""Log-probs of given completions, with one pass over a prompt for all of its completions.

    prompt      [B, S]     How  many  red  balls  ?        one pass, forward and backward
    completions [B, G, T]                            two  <end>  <pad>
    features from the token before each token:        ?    two   <end>

The results and their gradients equal those of a pass over each prompt and completion together, but
each prompt is computed once instead of G times (PrefixGrouper, arXiv 2506.05433). Short completions
may share a row, see `packing`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mmrl_jax.models.language import CachePosition, LanguageModel
from mmrl_jax.models.masks import causal_mask
from mmrl_jax.rl.token_log_probs import TokenLogProbs, token_log_probs
from mmrl_jax.rollouts import packing
from mmrl_jax.rollouts.generate import EmbeddedPrompt, Prefill, Variables, prefill

Output = TypeVar("Output")


def completion_log_probs(
    model: LanguageModel,
    variables: Variables,
    prompt: EmbeddedPrompt,
    tokens: jax.Array,
    mask: jax.Array,
    per_token: Callable[[jax.Array, jax.Array], Output],
    *,
    pack_rows: int | None = None,
) -> Output:
    """Applies a function to each token of completions and the features of the token before it.

    Args:
      model: The language model.
      variables: Variables of the model.
      prompt: Embedded prompts, B of them.
      tokens: Tokens of the completions, int32 [B, G, T].
      mask: False for padding, which follows the tokens, bool [B, G, T].
      per_token: Function of features float32 [B, R, T, D] and tokens int32 [B, R, T] that returns a
        tree of arrays [B, R, T], for example `log_probs_from_features`.
      pack_rows: Number of rows of T tokens that the completions of a prompt are packed into; those
        that do not fit take a second pass, which is skipped if all fit. None for a row for each
        completion.

    Returns:
      A tree of arrays [B, G, T]. The entries of padding are 0 if completions are packed, and have
      no meaning otherwise.
    """
    prefilled = prefill(model, variables, prompt, num_completions=1, max_new_tokens=1)

    def outputs(rows: packing.Rows, packed: bool = True) -> Output:
        features = _features(model, variables, prefilled, rows, packed=packed)
        return per_token(features, rows.tokens)

    if pack_rows is None or pack_rows >= tokens.shape[1]:
        return outputs(packing.padded(tokens, mask), packed=False)
    rows, slots = packing.pack(tokens, mask)
    first = jax.tree.map(lambda x: x[:, :pack_rows], rows)
    rest = jax.tree.map(lambda x: x[:, pack_rows:], rows)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(outputs, rest))
    second = jax.lax.cond(jnp.any(rest.segment_ids >= 0), outputs, lambda _: zeros, rest)

    def unpack(x: jax.Array, y: jax.Array) -> jax.Array:
        flat = jnp.concatenate([x, y], axis=1).reshape(len(tokens), -1)
        indices = jnp.maximum(slots, 0).reshape(len(tokens), -1)
        gathered = jnp.take_along_axis(flat, indices, axis=1)
        return jnp.where(mask, gathered.reshape(mask.shape), 0)

    return jax.tree.map(unpack, outputs(first), second)


def _features(
    model: LanguageModel,
    variables: Variables,
    prefilled: Prefill,
    rows: packing.Rows,
    *,
    packed: bool,
) -> jax.Array:
    """Returns the features of the token before each token of rows [B, R, T], float32 [B, R, T, D].

    The token before the first token of a completion is the last one of the prompt.
    """
    batch, count, length = rows.tokens.shape
    samples, slots = batch * count, length - 1  # The last token predicts nothing.
    first = prefilled.features[:, None, None]
    if not slots:
        return jnp.broadcast_to(first, (batch, count, 1, first.shape[-1]))
    apply: Callable[..., Any] = model.apply
    tokens, segment_ids, offset = (x.reshape(samples, length)[:, :slots] for x in rows)
    prompt_mask, positions = (
        jnp.repeat(x, count, axis=0) for x in (prefilled.prompt_mask, prefilled.key_positions)
    )
    positions = jnp.concatenate([positions[:, :-1], positions[:, -1:] + offset], axis=1)
    repeated = prefilled._replace(prompt_mask=prompt_mask, key_positions=positions)
    readable = jnp.concatenate([prompt_mask, jnp.ones((samples, slots), bool)], axis=1)
    mask = causal_mask(readable)
    if packed:  # A completion reads the prompt and itself.
        reads_row = segment_ids[:, :, None] == segment_ids[:, None, :]
        prompt = ((0, 0), (0, 0), (prompt_mask.shape[1], 0))
        mask = mask.replace(explicit=jnp.pad(reads_row, prompt, constant_values=True))
    rest, _ = apply(
        {**variables, "prefix": prefilled.prefix, "cache": repeated.cache(slots)},
        apply(variables, tokens, method="embed"),
        mask,
        repeated.query_positions(jnp.zeros((), jnp.int32), slots),
        cache_position=CachePosition(jnp.zeros((), jnp.int32), positions),
        method="hidden_states",
        mutable=["cache"],
    )
    rest = jnp.pad(rest.reshape(batch, count, slots, -1), ((0, 0), (0, 0), (1, 0), (0, 0)))
    return jnp.where(rows.positions[..., None] == 0, first, rest)


def log_probs_from_features(
    model: LanguageModel,
    variables: Variables,
    features: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    tile: int = 4096,
    shards: int = 1,
) -> TokenLogProbs:
    """Returns the log-probs and entropies of tokens int32 [B, G, T], float32 [B, G, T] each.

    Args:
      model: The language model.
      variables: Variables of the model.
      features: Features of the token before each token, float [B, G, T, D].
      tokens: Token ids, int32 [B, G, T]; padding is treated as any other token.
      temperature: Sampling temperature, > 0.
      tile: Number of rows of the output layer in a tile, see `token_log_probs`.
      shards: Number of shards of the rows of the output layer, see `token_log_probs`.
    """
    params = variables["params"]
    table = params["table"] if model.tied else params["head"].T
    log_probs = token_log_probs(
        features.reshape(-1, features.shape[-1]).astype(model.dtype),
        table,
        tokens.reshape(-1),
        temperature=temperature,
        softcap=model.softcap,
        tile=tile,
        shards=shards,
    )
    return jax.tree.map(lambda x: x.reshape(tokens.shape), log_probs)
