"""Sampling of one token from logits.

Training samples with a temperature alone, since a policy must learn from the distribution that its
completions are sampled from. The other ways are for the completions that a user asks for.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is sampled.

    Attributes:
      temperature: Number that logits are divided by, >= 0; 0 for greedy decoding.
      top_k: Number of most likely tokens that are sampled from, >= 1; None for all tokens.
      top_p: Total probability of the most likely tokens that are sampled from, in (0, 1] (Holtzman
        et al., 2020); 1 for all tokens.
      min_p: Smallest probability of a token that is sampled from, as a fraction of the largest one,
        in [0, 1]; 0 for all tokens.
      repetition_penalty: Factor, > 0, that positive logits of all tokens of the prompt and of the
        completion so far are divided by, and negative ones are multiplied by (Keskar et al., 2019);
        1 for no penalty. Image tokens count as other tokens do, padding does not.
      min_new_tokens: Number of tokens, >= 0, that a completion has at least before a stop token.

    Raises:
      ValueError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {requirement}.")


def log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    """Returns log-probs float32 [..., V] at a temperature; 0 is taken as 1."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / (temperature or 1.0), axis=-1)


def apply_top_k_top_p(log_probs: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets log-probs [..., V] to -inf for tokens that top-k, top-p or min-p exclude.

    The most likely token always remains, and so do ties with the k-th one.
    """
    if sampling.top_k is not None and sampling.top_k < log_probs.shape[-1]:
        kth = jax.lax.top_k(log_probs, sampling.top_k)[0][..., -1:]
        log_probs = jnp.where(log_probs < kth, -jnp.inf, log_probs)
    if sampling.top_p < 1:
        sorted_log_probs = jnp.sort(log_probs, axis=-1, descending=True)
        probs = jax.nn.softmax(sorted_log_probs, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.min(
            jnp.where(before < sampling.top_p, sorted_log_probs, jnp.inf), -1, keepdims=True
        )
        log_probs = jnp.where(log_probs < last, -jnp.inf, log_probs)
    if sampling.min_p > 0:
        least = jnp.max(log_probs, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        log_probs = jnp.where(log_probs < least, -jnp.inf, log_probs)
    return log_probs


def sample_token(
    logits: jax.Array, rng: jax.Array, sampling: Sampling, processed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Samples tokens.

    Args:
      logits: Logits of the model, [..., V].
      rng: PRNG key.
      sampling: How tokens are sampled.
      processed: Logits that tokens are sampled from, [..., V]; None for those of the model.

    Returns:
      Tokens, int32 [...], and their log-probs by the logits of the model, as in `Completions`.
    """
    log_probs = log_softmax(logits, sampling.temperature)
    sampled = log_probs if processed is None else log_softmax(processed, sampling.temperature)
    if sampling.temperature == 0:
        token = jnp.argmax(sampled, axis=-1)
    else:
        token = jax.random.categorical(rng, apply_top_k_top_p(sampled, sampling))
    log_prob = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
    return token.astype(jnp.int32), log_prob


def tokens_seen(tokens: jax.Array, mask: jax.Array, vocabulary: int) -> jax.Array:
    """Returns which token ids occur in sequences, bool [B, V].

    Ids without a row in the vocabulary, as image tokens of some models have, are left out.

    Args:
      tokens: Token ids, int32 [B, S].
      mask: False for padding, bool [B, S].
      vocabulary: Number V of token ids.
    """
    seen = jnp.zeros((len(tokens), vocabulary), bool)
    # Padding gets an index out of bounds, because its id may also be that of a token.
    indices = jnp.where(mask, tokens, vocabulary)
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(seen, indices)


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Divides positive logits of tokens that occurred by a penalty, and multiplies negative ones.

    This is the definition of Keskar et al. (2019) and of transformers.

    Args:
      logits: Logits before the temperature, float32 [..., V].
      seen: Which tokens occurred in the prompt or the completion, bool [..., V].
      penalty: Factor, > 0; above 1 it makes these tokens less likely.
    """
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def suppress_tokens(logits: jax.Array, tokens: tuple[int, ...], when: jax.Array) -> jax.Array:
    """Sets logits [..., V] of the given token ids to -inf where a condition bool [] is true."""
    ids = jnp.arange(logits.shape[-1])
    listed = functools.reduce(jnp.logical_or, [ids == token for token in tokens], ids < 0)
    return jnp.where(when & listed, -jnp.inf, logits)


def process_logits(
    logits: jax.Array,
    seen: jax.Array | None,
    step: jax.Array,
    *,
    sampling: Sampling,
    stop: tuple[int, ...],
) -> jax.Array | None:
    """Applies the repetition penalty and the minimum length, in the order of transformers.

    Args:
      logits: Logits of the model, [N, V].
      seen: Which tokens occurred in the prompt or the completion, bool [N, V]; None without a
        penalty.
      step: Number of tokens that the completions have, int32 [].
      sampling: How tokens are sampled.
      stop: Token ids any of which ends a completion.

    Returns:
      Logits that tokens are sampled from, float32 [N, V]; None if they are those of the model.
    """
    if seen is None and not sampling.min_new_tokens:
        return None
    logits = logits.astype(jnp.float32)
    if seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.min_new_tokens:
        logits = suppress_tokens(logits, stop, step < sampling.min_new_tokens)
    return logits
