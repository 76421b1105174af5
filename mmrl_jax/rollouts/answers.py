"""Features and log-probs of given answers, to learn from: one pass over the prompts for a group.

    prompt [B, S]   How  many  red  balls  ?      read once for the G answers, forward and backward
    answers [B, G, T]                       two  <end>  <pad>
    features            of what stands before:  ?    two   <end>

They equal those of a pass over prompt and answer together, and so do their gradients; the prompt
costs 1 / G of it (PrefixGrouper, arXiv 2506.05433).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmrl_jax.models.language import Cursor, LanguageModel, causal_mask
from mmrl_jax.rl.token_log_probs import TokenLogProbs, token_log_probs
from mmrl_jax.rollouts.generate import Prompt, Variables, read_prompt


def answer_features(
    model: LanguageModel,
    variables: Variables,
    prompt: Prompt,
    tokens: jax.Array,
    present: jax.Array,
) -> jax.Array:
    """What predicts each token of the answers.

    Args:
      model: the language model.
      variables: its variables.
      prompt: of B samples.
      tokens: int32 [B, G, T].
      present: bool [B, G, T]; an answer begins at its first place and has no holes.

    Returns:
      float32 [B, G, T, D]; of token t, the features of the one before it, of the prompt's last
      one where t is 0.
    """
    batch, group, length = tokens.shape
    samples, slots = batch * group, length - 1  # What comes behind the last token is not asked.
    apply: Callable[..., Any] = model.apply
    read = read_prompt(model, variables, prompt, group=group, length=slots)
    width = read.features.shape[-1]
    first = jnp.broadcast_to(read.features[:, None, None], (batch, group, 1, width))
    if not slots:
        return first
    own = causal_mask(present.reshape(samples, length)[:, :slots])
    before = jnp.broadcast_to(read.present[:, None], (samples, slots, read.present.shape[1]))
    rest, _ = apply(
        {**variables, "prefix": read.prefix, "cache": read.cache(slots)},
        apply(variables, tokens.reshape(samples, length)[:, :slots], method="embed"),
        jnp.concatenate([before, own], axis=2),
        read.positions(jnp.zeros((), jnp.int32), slots),
        cursor=Cursor(jnp.zeros((), jnp.int32), read.place),
        method="decode",
        mutable=["cache"],
    )
    return jnp.concatenate([first, rest.reshape(batch, group, slots, -1)], axis=2)


def answer_log_probs(
    model: LanguageModel,
    variables: Variables,
    features: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    tile: int = 4096,
) -> TokenLogProbs:
    """Log-probs and entropies of tokens int32 [B, G, T] under features [B, G, T, D].

    Returns:
      float32 [B, G, T] each, of padding too; see `token_log_probs`.
    """
    params = variables["params"]
    table = params["table"] if model.tied else params["head"].T
    found = token_log_probs(
        features.reshape(-1, features.shape[-1]).astype(model.dtype),
        table,
        tokens.reshape(-1),
        temperature=temperature,
        softcap=model.softcap,
        tile=tile,
    )
    return jax.tree.map(lambda x: x.reshape(tokens.shape), found)
