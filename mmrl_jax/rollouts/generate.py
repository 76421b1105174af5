"""Generation of tokens, in one compiled program: one pass over the prompts, then token by token.

prefix [B, S]     <pad> <pad>  How  many  red  balls  ?        kept once for the G answers
answers [B, G, T]                                        two  <end> <pad>  ...
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.models.language import CachePosition, LanguageModel, causal_mask, next_position
from mmrl_jax.models.vlm import VisionLanguageModel

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: only the k most likely tokens; None: all.
      top_p: only the most likely tokens that hold this probability together (Holtzman et al.,
        2020); 1: all.
      min_p: only tokens with at least this fraction of the most likely one's probability; 0: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {requirement}.")


class EmbeddedPrompt(NamedTuple):
    """What a language model reads before it answers, see `text_prompt` and `image_prompt`.

    Attributes:
      x: float [B, S, D], embeddings with image features in place.
      mask: bool [B, S], False for padding, on either side.
      positions: int32 [B, S], or [B, A, S].
      attention_mask: bool [B, S, S], who reads whom.
      added: float [B, S, D] each, see `VisionFeatures.deep`.
      ahead: bool [B, S, S], see `VisionLanguageModel.ahead`; or None.
    """

    x: jax.Array
    mask: jax.Array
    positions: jax.Array
    attention_mask: jax.Array
    added: tuple[jax.Array, ...] = ()
    ahead: jax.Array | None = None


class Completions(NamedTuple):
    """G answers to each of B prompts, of up to T tokens.

    Attributes:
      tokens: int32 [B, G, T]; behind a stop token, which is the last of an answer, there is `pad`.
      log_probs: float32 [B, G, T], of these tokens at the sampling's temperature (1 where that is
        0), before top-k, top-p and min-p; 0 where there is none.
      mask: bool [B, G, T], the tokens of the answers, a stop token among them.
      finished: bool [B, G], whether an answer ended with a stop token; one that has not was
        truncated at T tokens.
    """

    tokens: jax.Array
    log_probs: jax.Array
    mask: jax.Array
    finished: jax.Array


def text_prompt(
    model: LanguageModel, variables: Variables, tokens: jax.Array, mask: jax.Array
) -> EmbeddedPrompt:
    """The prompt of token ids int32 [B, S], of which bool [B, S] tells padding."""
    apply: Callable[..., Any] = model.apply
    x = apply(variables, tokens, method="embed")
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return EmbeddedPrompt(x, mask, positions, causal_mask(mask))


def image_prompt(
    model: VisionLanguageModel,
    variables: Variables,
    tokens: jax.Array,
    mask: jax.Array,
    images: Any,
    positions: jax.Array | None = None,
) -> EmbeddedPrompt:
    """The prompt of token ids and images, as `VisionLanguageModel` takes them."""
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    apply: Callable[..., Any] = functools.partial(model.apply, variables)
    x, added = apply(tokens, apply(images, method="encode"), method="embed")
    attention_mask, ahead = (apply(tokens, mask, method=name) for name in ("mask", "ahead"))
    return EmbeddedPrompt(x, mask, positions, attention_mask, added, ahead)


def language(
    model: VisionLanguageModel | LanguageModel, variables: Variables
) -> tuple[LanguageModel, Variables]:
    """The language model within, and its variables; a language model is its own."""
    if isinstance(model, LanguageModel):
        return model, variables
    within = {name: tree["language"] for name, tree in variables.items() if "language" in tree}
    return model.language, within


def log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    """Log-probs float32 [..., V] at a temperature; 0 counts as 1."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / (temperature or 1.0), axis=-1)


def apply_top_k_top_p(log_probs: jax.Array, sampling: Sampling) -> jax.Array:
    """`log_probs` [..., V], -inf for tokens that top-k, top-p or min-p leave out.

    The most likely token stays in all cases. Ties at the edge of top-k stay too.
    """
    if sampling.top_k is not None and sampling.top_k < log_probs.shape[-1]:
        kth = jax.lax.top_k(log_probs, sampling.top_k)[0][..., -1:]
        log_probs = jnp.where(log_probs < kth, -jnp.inf, log_probs)
    if sampling.top_p < 1:
        falling = jnp.sort(log_probs, axis=-1, descending=True)
        probs = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.min(jnp.where(before < sampling.top_p, falling, jnp.inf), -1, keepdims=True)
        log_probs = jnp.where(log_probs < last, -jnp.inf, log_probs)
    if sampling.min_p > 0:
        least = jnp.max(log_probs, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        log_probs = jnp.where(log_probs < least, -jnp.inf, log_probs)
    return log_probs


def sample_token(
    logits: jax.Array, rng: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [...] drawn from logits [..., V], and their log-probs, see `Completions`."""
    log_probs = log_softmax(logits, sampling.temperature)
    if sampling.temperature == 0:
        token = jnp.argmax(log_probs, axis=-1)
    else:
        token = jax.random.categorical(rng, apply_top_k_top_p(log_probs, sampling))
    taken = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
    return token.astype(jnp.int32), taken


class Prefill(NamedTuple):
    """What is kept of a prompt's pass, for G answers of up to T tokens to each of B prompts.

    Attributes:
      features: float32 [B, D], of the last token that is present.
      prefix: keys and values of all layers, shared by the answers.
      prompt_mask: bool [B * G, S], of the prompt.
      key_positions: int32 [B * G, S + T], positions of the prompt and of what follows it.
      axes: () or (A,), those of the prompt's positions.
    """

    features: jax.Array
    prefix: Any
    prompt_mask: jax.Array
    key_positions: jax.Array
    axes: tuple[int, ...]

    def query_positions(self, slot: jax.Array, count: int) -> jax.Array:
        """Of the `count` tokens from a slot of the answers on, [B * G, count] or with axes."""
        first = self.prompt_mask.shape[1] + slot
        positions = jax.lax.dynamic_slice_in_dim(self.key_positions, first, count, axis=1)
        return jnp.repeat(positions[:, None], self.axes[0], axis=1) if self.axes else positions

    def cache(self, slots: int) -> Any:
        """An empty one, for the answers' own keys and values."""
        samples = len(self.prompt_mask)
        return jax.tree.map(
            lambda x: jnp.zeros((samples, x.shape[1], slots, x.shape[3]), x.dtype), self.prefix
        )


def prefill(
    model: LanguageModel,
    variables: Variables,
    prompt: EmbeddedPrompt,
    *,
    num_completions: int,
    max_new_tokens: int,
) -> Prefill:
    """Runs the model over prompts, for G completions of up to `max_new_tokens` tokens each."""
    apply: Callable[..., Any] = model.apply
    hidden, collections = apply(
        variables,
        prompt.x,
        prompt.attention_mask,
        prompt.positions,
        prompt.added,
        prompt.ahead,
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
    tokens: jax.Array  # [B * G, T], see `Completions`, as those below.
    log_probs: jax.Array
    mask: jax.Array


class _State(NamedTuple):
    step: jax.Array
    token: jax.Array  # int32 [B * G], the last one, not yet read.
    running: jax.Array  # bool [B * G]
    cache: Any
    out: _Written


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
) -> Completions:
    """Answers prompts; to be jitted, with everything but `variables`, `prompt`, `rng` static.

    Stops early when every answer has ended.

    Args:
      model: the language model.
      variables: its variables; keys and values are kept in its dtype.
      prompt: of B samples.
      rng: PRNG key.
      num_completions: G, completions of each prompt, which share the pass over it.
      max_new_tokens: T, the most tokens of an answer.
      sampling: how tokens are chosen.
      stop: token ids that end an answer.
      pad: what stands behind the end.
    """
    batch = len(prompt.mask)
    samples = batch * num_completions
    apply: Callable[..., Any] = model.apply
    read = prefill(
        model, variables, prompt, num_completions=num_completions, max_new_tokens=max_new_tokens
    )
    logits = jnp.repeat(apply(variables, read.features, method="logits"), num_completions, axis=0)

    def write_token(state: _State, logits: jax.Array) -> _State:
        """Chooses the tokens of a step and writes them down."""
        # One key for every sample by its number, so that no mesh changes what is drawn.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(rng, state.step), jnp.arange(samples)
        )
        token, log_prob = jax.vmap(functools.partial(sample_token, sampling=sampling))(logits, keys)
        running = state.running
        token = jnp.where(running, token, pad)
        new = _Written(token, jnp.where(running, log_prob, 0.0), running)
        out = jax.tree.map(lambda all_, x: all_.at[:, state.step].set(x), state.out, new)
        ends = functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(running))
        return _State(state.step + 1, token, running & ~ends, state.cache, out)

    def decode_step(state: _State) -> _State:
        """Reads the last tokens and chooses the next ones."""
        slot = state.step - 1
        own = jnp.broadcast_to(jnp.arange(max_new_tokens) <= slot, (samples, max_new_tokens))
        hidden, changed = apply(
            {**variables, "prefix": read.prefix, "cache": state.cache},
            apply(variables, state.token[:, None], method="embed"),
            jnp.concatenate([read.prompt_mask, own], axis=1)[:, None],
            read.query_positions(slot, 1),
            cache_position=CachePosition(slot, read.key_positions),
            method="hidden_states",
            mutable=["cache"],
        )
        logits = apply(variables, hidden[:, 0], method="logits")
        return write_token(state._replace(cache=changed["cache"]), logits)

    out = _Written(
        tokens=jnp.full((samples, max_new_tokens), pad, jnp.int32),
        log_probs=jnp.zeros((samples, max_new_tokens), jnp.float32),
        mask=jnp.zeros((samples, max_new_tokens), bool),
    )
    state = _State(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(samples, jnp.int32),
        running=jnp.ones(samples, bool),
        cache=read.cache(max_new_tokens),
        out=out,
    )
    state = jax.lax.while_loop(
        lambda s: (s.step < max_new_tokens) & jnp.any(s.running),
        decode_step,
        write_token(state, logits),
    )
    tokens, log_probs, mask = (x.reshape(batch, num_completions, max_new_tokens) for x in state.out)
    return Completions(tokens, log_probs, mask, ~state.running.reshape(batch, num_completions))
