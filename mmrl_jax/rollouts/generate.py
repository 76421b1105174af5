"""Generation of completions in one compiled program: one prefill, then decoding token by token.

prompt      [B, S]     <pad> <pad>  How  many  red  balls  ?      cached once for G completions
completions [B, G, T]                                       two  <end> <pad>  ...
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.distributed.mesh import split_heads
from mmrl_jax.models.language import CachePosition, LanguageModel, next_position
from mmrl_jax.models.masks import Mask, causal_mask
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.rollouts.sampling import Sampling, process_logits, sample_token, tokens_seen

Variables = Mapping[str, Any]


class EmbeddedPrompt(NamedTuple):
    """Inputs of the language model for B prompts, from `text_prompt` or `image_prompt`.

    Attributes:
      tokens: Token ids, image tokens included, int32 [B, S].
      x: Embeddings, with image features at the image tokens, float [B, S, D].
      mask: False for padding, on either side, bool [B, S].
      positions: Positions of the tokens, int32 [B, S], or [B, A, S] on A axes.
      attention_mask: Attention mask of the prompts.
      added: Features that are added to the first layers' outputs, float [B, S, D] each, see
        `VisionFeatures.deep`.
    """

    tokens: jax.Array
    x: jax.Array
    mask: jax.Array
    positions: jax.Array
    attention_mask: Mask
    added: tuple[jax.Array, ...] = ()


class Completions(NamedTuple):
    """G completions of each of B prompts, of up to T tokens.

    Attributes:
      tokens: Token ids, with padding after the stop token, int32 [B, G, T].
      log_probs: Log-probs of the tokens at the sampling temperature (1 for greedy decoding), before
        top-k, top-p, min-p, the repetition penalty and the minimum length, float32 [B, G, T]; 0 for
        padding.
      mask: True for the tokens of completions, the stop token included, bool [B, G, T].
      finished: True where a completion ended with a stop token, False where it was truncated at T
        tokens, bool [B, G].
    """

    tokens: jax.Array
    log_probs: jax.Array
    mask: jax.Array
    finished: jax.Array


def text_prompt(
    model: LanguageModel, variables: Variables, tokens: jax.Array, mask: jax.Array
) -> EmbeddedPrompt:
    """Embeds prompts of token ids int32 [B, S], with a mask bool [B, S], False for padding."""
    apply: Callable[..., Any] = model.apply
    x = apply(variables, tokens, method="embed")
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return EmbeddedPrompt(tokens, x, mask, positions, causal_mask(mask, contiguous=True))


def image_prompt(
    model: VisionLanguageModel,
    variables: Variables,
    tokens: jax.Array,
    mask: jax.Array,
    images: Any,
    positions: jax.Array | None = None,
) -> EmbeddedPrompt:
    """Embeds prompts of token ids and images.

    Args:
      model: The vision-language model.
      variables: Variables of the model.
      tokens: Token ids, image tokens included, int32 [B, S].
      mask: False for padding, bool [B, S].
      images: Preprocessed images, as the vision model takes them.
      positions: Positions of the tokens, int32 [B, S], or [B, A, S] on A axes; by default the
        tokens that are not padding are counted.
    """
    attention_mask = model.mask(tokens, mask, mask, contiguous=positions is None)
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    apply: Callable[..., Any] = functools.partial(model.apply, variables)
    x, added = apply(tokens, apply(images, method="encode"), method="embed")
    return EmbeddedPrompt(tokens, x, mask, positions, attention_mask, added)


def language(
    model: VisionLanguageModel | LanguageModel, variables: Variables
) -> tuple[LanguageModel, Variables]:
    """Returns the language model inside a model, and its variables."""
    if isinstance(model, LanguageModel):
        return model, variables
    inner = {name: tree["language"] for name, tree in variables.items() if "language" in tree}
    return model.language, inner


class Prefill(NamedTuple):
    """The cached pass over B prompts, for G completions of each of up to T tokens.

    Attributes:
      features: Features of the last token of each prompt, float32 [B, D].
      prefix: Keys and values of all layers, shared by the completions of a prompt.
      prompt_mask: False for padding of the prompts, bool [B * G, S].
      key_positions: Positions of the tokens of prompts and completions, int32 [B * G, S + T].
      axes: Axes of the prompts' positions, () or (A,).
    """

    features: jax.Array
    prefix: Any
    prompt_mask: jax.Array
    key_positions: jax.Array
    axes: tuple[int, ...]

    def query_positions(self, slot: jax.Array, count: int) -> jax.Array:
        """Returns the positions of `count` tokens from a slot on, int32 [B * G, *axes, count]."""
        first = self.prompt_mask.shape[1] + slot
        positions = jax.lax.dynamic_slice_in_dim(self.key_positions, first, count, axis=1)
        return jnp.repeat(positions[:, None], self.axes[0], axis=1) if self.axes else positions

    def cache(self, slots: int) -> Any:
        """Returns an empty cache for the keys and values of completions of `slots` tokens."""
        samples = len(self.prompt_mask)

        def empty(x: jax.Array) -> jax.Array:
            *layers, _, heads, _, size = x.shape  # There are layers if the blocks are scanned.
            return split_heads(jnp.zeros((*layers, samples, heads, slots, size), x.dtype))

        return jax.tree.map(empty, self.prefix)


def prefill(
    model: LanguageModel,
    variables: Variables,
    prompt: EmbeddedPrompt,
    *,
    num_completions: int,
    max_new_tokens: int,
) -> Prefill:
    """Runs the model over B prompts, to be followed by completions.

    Args:
      model: The language model.
      variables: Variables of the model.
      prompt: Embedded prompts.
      num_completions: Number G of completions of each prompt.
      max_new_tokens: Largest number T of tokens of a completion.
    """
    apply: Callable[..., Any] = model.apply
    hidden, collections = apply(
        variables,
        prompt.x,
        prompt.attention_mask,
        prompt.positions,
        prompt.added,
        method="hidden_states",
        mutable=["prefix"],
    )
    last = prompt.mask.shape[1] - 1 - jnp.argmax(prompt.mask[:, ::-1], axis=1)
    features = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    axes = prompt.positions.shape[1:-1]
    key_positions = prompt.positions.max(axis=1) if axes else prompt.positions
    start = next_position(prompt.positions, prompt.mask)
    key_positions = jnp.concatenate(
        [key_positions, start[:, None] + jnp.arange(max_new_tokens)], axis=1
    )
    key_positions, prompt_mask = (
        jnp.repeat(x, num_completions, axis=0) for x in (key_positions, prompt.mask)
    )
    return Prefill(features, collections["prefix"], prompt_mask, key_positions, axes)


class _Written(NamedTuple):
    """Outputs so far, [N, T] each, with the fields of `Completions`."""

    tokens: jax.Array
    log_probs: jax.Array
    mask: jax.Array


class _State(NamedTuple):
    """State of the N completions that are computed, the same number g of each prompt: N = B * g."""

    step: jax.Array  # int32 [], number of tokens written.
    sample: jax.Array  # int32 [N], index of a completion among all B * G.
    token: jax.Array  # int32 [N], the last token, which the model has not read yet.
    running: jax.Array  # bool [N], False after a stop token.
    cache: Any
    out: _Written
    seen: jax.Array | None  # bool [N, V], tokens of prompts and completions; None without penalty.


def _empty_state(
    prefilled: Prefill, max_new_tokens: int, pad: int, seen: jax.Array | None
) -> _State:
    """Returns the state before the first token; for arguments see `generate` and `_State`."""
    samples = len(prefilled.prompt_mask)
    out = _Written(
        tokens=jnp.full((samples, max_new_tokens), pad, jnp.int32),
        log_probs=jnp.zeros((samples, max_new_tokens), jnp.float32),
        mask=jnp.zeros((samples, max_new_tokens), bool),
    )
    return _State(
        step=jnp.zeros((), jnp.int32),
        sample=jnp.arange(samples),
        token=jnp.zeros(samples, jnp.int32),
        running=jnp.ones(samples, bool),
        cache=prefilled.cache(max_new_tokens),
        out=out,
        seen=seen,
    )


def _has_running(state: _State, *, batch: int, most: int) -> jax.Array:
    """Returns whether a prompt has more than `most` running completions without T tokens yet."""
    running = jnp.sum(state.running.reshape(batch, -1), axis=1)
    return (state.step < state.out.mask.shape[1]) & jnp.any(running > most)


def _scatter_outputs(
    whole: tuple[_Written, jax.Array], state: _State
) -> tuple[_Written, jax.Array]:
    """Writes the outputs of completions, and whether they run, into those of all completions."""
    return jax.tree.map(
        lambda all_, x: all_.at[state.sample].set(x), whole, (state.out, state.running)
    )


def _compact(state: _State, prefilled: Prefill, batch: int) -> tuple[_State, Prefill]:
    """Keeps half of the completions of each of B prompts, among them all that have not ended.

    At most half of the completions of a prompt must be running.
    """
    running = state.running.reshape(batch, -1)
    kept = jnp.argsort(~running, axis=1, stable=True)[:, : running.shape[1] // 2]

    def rows(x: jax.Array, axis: int = 0) -> jax.Array:
        # A row stays with its prompt, so that none moves to another device.
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = x.reshape(*before, batch, -1, *after)
        index = kept.reshape(*[1] * axis, *kept.shape, *[1] * len(after))
        x = jnp.take_along_axis(x, index, axis=axis + 1)
        return x.reshape(*before, -1, *after)

    # A cache is [N, K, T, H], after an axis of layers if the blocks are scanned.
    cache = jax.tree.map(lambda x: rows(x, x.ndim - 4), state.cache)
    others = jax.tree.map(rows, state._replace(step=state.sample, cache=()))
    prefilled = prefilled._replace(
        prompt_mask=rows(prefilled.prompt_mask), key_positions=rows(prefilled.key_positions)
    )
    return others._replace(step=state.step, cache=cache), prefilled


def generate(
    model: LanguageModel,
    variables: Variables,
    prompt: EmbeddedPrompt,
    rng: jax.Array,
    *,
    num_completions: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    pad: int = 0,
    compactions: int = 0,
) -> Completions:
    """Generates completions, until all have ended or have T tokens.

    The function is meant to be jitted, with all arguments but `variables`, `prompt` and `rng`
    static.

    Args:
      model: The language model; keys and values are cached in its dtype.
      variables: Variables of the model.
      prompt: Embedded prompts, B of them.
      rng: PRNG key.
      num_completions: Number G of completions of each prompt; they share one pass over the prompt.
      max_new_tokens: Largest number T of tokens of a completion.
      sampling: How tokens are sampled.
      stop: Token ids any of which ends a completion.
      pad: Token id of padding after the end of a completion.
      compactions: How many times the number of completions that are computed is halved: as soon as
        at most half of those of every prompt have not ended, the others are left out. The result is
        the same, and the program has one loop more for each.

    Raises:
      ValueError: 2 ** compactions does not divide the number of completions, or a completion cannot
        have the minimum number of tokens.
    """
    if num_completions % 2**compactions:
        raise ValueError(
            f"num_completions={num_completions} is not divisible by 2**compactions="
            f"{2**compactions}."
        )
    if sampling.min_new_tokens > max_new_tokens:
        raise ValueError(
            f"min_new_tokens={sampling.min_new_tokens} is above max_new_tokens={max_new_tokens}."
        )
    batch = len(prompt.mask)
    apply: Callable[..., Any] = model.apply
    prefilled = prefill(
        model, variables, prompt, num_completions=num_completions, max_new_tokens=max_new_tokens
    )
    logits = apply(variables, prefilled.features, method="logits")
    write = functools.partial(_write_token, rng=rng, sampling=sampling, stop=stop, pad=pad)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = tokens_seen(prompt.tokens, prompt.mask, logits.shape[-1])
        seen = jnp.repeat(seen, num_completions, axis=0)
    state = write(
        _empty_state(prefilled, max_new_tokens, pad, seen),
        jnp.repeat(logits, num_completions, axis=0),
    )
    sizes = [num_completions >> i for i in range(compactions + 1)]
    whole = state.out, state.running
    for most in (*sizes[1:], 0):
        decode = functools.partial(_decode_step, model, variables, prefilled, write)
        state = jax.lax.while_loop(
            functools.partial(_has_running, batch=batch, most=most), decode, state
        )
        # Completions that are kept are written again after the next loop.
        whole = _scatter_outputs(whole, state) if compactions else (state.out, state.running)
        if most:
            state, prefilled = _compact(state, prefilled, batch)
    out, running = whole
    shape = batch, num_completions
    tokens, log_probs, mask = (x.reshape(*shape, max_new_tokens) for x in out)
    return Completions(tokens, log_probs, mask, ~running.reshape(shape))


def _write_token(
    state: _State,
    logits: jax.Array,
    *,
    rng: jax.Array,
    sampling: Sampling,
    stop: tuple[int, ...],
    pad: int,
) -> _State:
    """Samples the next tokens and writes them into the outputs."""
    # Keys are derived from the index of a sample, so that samples do not depend on the mesh.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(rng, state.step), state.sample
    )
    processed = process_logits(logits, state.seen, state.step, sampling=sampling, stop=stop)
    sample = jax.vmap(functools.partial(sample_token, sampling=sampling))
    token, log_prob = sample(logits, keys, processed=processed)
    running = state.running
    token = jnp.where(running, token, pad)
    new = _Written(token, jnp.where(running, log_prob, 0.0), running)
    out = jax.tree.map(lambda all_, x: all_.at[:, state.step].set(x), state.out, new)
    ends = functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(running))
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return state._replace(
        step=state.step + 1, token=token, running=running & ~ends, out=out, seen=seen
    )


def _decode_step(
    model: LanguageModel,
    variables: Variables,
    prefilled: Prefill,
    write: Callable[[_State, jax.Array], _State],
    state: _State,
) -> _State:
    """Runs the model on the last tokens and samples the next ones."""
    apply: Callable[..., Any] = model.apply
    slot, written = state.step - 1, state.out.mask.shape
    own = jnp.broadcast_to(jnp.arange(written[1]) <= slot, written)
    hidden, changed = apply(
        {**variables, "prefix": prefilled.prefix, "cache": state.cache},
        apply(variables, state.token[:, None], method="embed"),
        Mask(valid=jnp.concatenate([prefilled.prompt_mask, own], axis=1)),
        prefilled.query_positions(slot, 1),
        cache_position=CachePosition(slot, prefilled.key_positions),
        method="hidden_states",
        mutable=["cache"],
    )
    logits = apply(variables, hidden[:, 0], method="logits")
    return write(state._replace(cache=changed["cache"]), logits)
