"""Scores of given answers, to learn from: one pass over the prompts for a group.

    prompt [B, S]   How  many  red  balls  ?      read once for the G answers, forward and backward
    answers [B, G, T]                       two  <end>  <pad>
    features            of what stands before:  ?    two   <end>

They equal those of a pass over prompt and answer together, and so do their gradients; the prompt
costs 1 / G of it (PrefixGrouper, arXiv 2506.05433). Short answers may share a row, see `packing`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mmrl_jax.models.language import CachePosition, LanguageModel
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
    """Scores of each token of the answers, from the features of what stands before it.

    Args:
      model: the language model.
      variables: its variables.
      prompt: of B samples.
      tokens: int32 [B, G, T].
      mask: bool [B, G, T]; an answer begins at its first place and has no holes.
      per_token: features float32 [B, R, T, D] and tokens int32 [B, R, T] to a tree of [B, R, T].
      pack_rows: the answers to a question are packed, and those beyond the first so many rows go
        through a second pass, which is left out where there are none. None: each has its row.

    Returns:
      A tree of [B, G, T]; of padding 0 where answers are packed, else anything.
    """
    read = prefill(model, variables, prompt, num_completions=1, max_new_tokens=1)

    def outputs(rows: packing.Rows) -> Output:
        return per_token(_features(model, variables, read, rows), rows.tokens)

    if pack_rows is None or pack_rows >= tokens.shape[1]:
        return outputs(packing.padded(tokens, mask))
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
    model: LanguageModel, variables: Variables, read: Prefill, rows: packing.Rows
) -> jax.Array:
    """What predicts each token of rows [B, R, T], float32 [B, R, T, D].

    Of an answer's first token it is the prompt's last one that is there.
    """
    batch, count, length = rows.tokens.shape
    samples, slots = batch * count, length - 1  # What comes behind the last token is not asked.
    first = read.features[:, None, None]
    if not slots:
        return jnp.broadcast_to(first, (batch, count, 1, first.shape[-1]))
    apply: Callable[..., Any] = model.apply
    tokens, segment_ids, offset = (x.reshape(samples, length)[:, :slots] for x in rows)
    prompt_mask, positions = (
        jnp.repeat(x, count, axis=0) for x in (read.prompt_mask, read.key_positions)
    )
    positions = jnp.concatenate([positions[:, :-1], positions[:, -1:] + offset], axis=1)
    packed = read._replace(prompt_mask=prompt_mask, key_positions=positions)
    order = jnp.arange(slots)
    own = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (order <= order[:, None])
    before = jnp.broadcast_to(prompt_mask[:, None], (samples, slots, prompt_mask.shape[1]))
    rest, _ = apply(
        {**variables, "prefix": read.prefix, "cache": packed.cache(slots)},
        apply(variables, tokens, method="embed"),
        jnp.concatenate([before, own], axis=2),
        packed.query_positions(jnp.zeros((), jnp.int32), slots),
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
    """Log-probs and entropies of tokens int32 [B, G, T] under features [B, G, T, D].

    Returns:
      float32 [B, G, T] each, of padding too; see `token_log_probs`.
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
