"""Completions of a user's own prompts by a token policy, and choices among given completions."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import operator
import pathlib
import typing
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.data import images as image_files
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.chunks import in_chunks
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.models import lora
from mmrl_jax.problems.token_problem import TokenProblem
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks.prompts import Prompt, free_prompts, pad_left
from mmrl_jax.types import Params

# Prompts are padded to a multiple of this number of tokens, so that few programs are compiled.
PADDING = 32

GREEDY = Sampling(temperature=0.0)
Image = np.ndarray | bytes | str | pathlib.Path
Order = Literal["log_prob", "mean_log_prob"]


class Completion(NamedTuple):
    """One completion of a prompt.

    Attributes:
      text: Text of the completion, without its stop token or stop string.
      log_prob: Log-prob of the completion in nats, the sum over its tokens at the sampling
        temperature (1 for greedy decoding), before top-k, top-p, min-p, the repetition penalty and
        the minimum length. The stop token, or the tokens of the stop string, are included.
      finished: Whether it ended with a stop token or a stop string, rather than at the maximum
        number of tokens.
      num_tokens: Number of tokens that `log_prob` is the sum over.
    """

    text: str
    log_prob: float
    finished: bool
    num_tokens: int

    @property
    def mean_log_prob(self) -> float:
        """Mean log-prob of a token."""
        return self.log_prob / self.num_tokens


class Choice(NamedTuple):
    """A given completion of a prompt, with its probability.

    Attributes:
      text: Text of the completion.
      log_prob: Log-prob in nats of the text and of the stop token after it, at temperature 1.
      probability: Probability of the completion among the given ones, whose sum is 1.
    """

    text: str
    log_prob: float
    probability: float


def complete(
    problem: TokenProblem,
    variables: Params,
    prompts: Sequence[str],
    images: Sequence[Image],
    *,
    num_completions: int,
    sampling: Sampling,
    max_new_tokens: int | None,
    seed: int,
    stop_strings: Sequence[str] = (),
    sort_by: Order | None = None,
) -> list[list[Completion]]:
    """Completes prompts about images.

    Args:
      problem: Problem of the run, whose tokenizer, chat template and image size are used.
      variables: Variables of the policy.
      prompts: Texts of N prompts.
      images: Image of each prompt: pixels uint8 [H, W, 3] of any size, the bytes of an encoded
        image, or the path of a file. Images are resized as in the training of the run.
      num_completions: Number of completions G of each prompt.
      sampling: How tokens are sampled.
      max_new_tokens: Maximum number of tokens of a completion; None for that of the run.
      seed: Seed of the sampling.
      stop_strings: Texts any of which ends a completion, which is truncated before it.
      sort_by: Attribute of `Completion` by which those of a prompt are sorted, the largest first;
        None for the order in which they were sampled.

    Returns:
      The G completions of each of the N prompts.

    Raises:
      ValueError: If there is no prompt, the number of images is wrong, a prompt cannot be
        tokenized, an image cannot be read, or a stop string is empty.
    """
    if "" in stop_strings:
        raise ValueError(f"stop_strings={tuple(stop_strings)} has an empty text; remove it.")
    if sort_by not in (None, *typing.get_args(Order)):
        raise ValueError(f"sort_by={sort_by!r} must be one of {typing.get_args(Order)}, or None.")
    policy = problem.model.policy
    if max_new_tokens is not None:
        policy = dataclasses.replace(policy, max_new_tokens=max_new_tokens)
    batch = _encode(problem, prompts, images)

    rng = jax.random.key(seed)
    # The samples of a chunk depend on their index in it, so that each chunk has a key of its own.
    keys = (jax.random.fold_in(rng, i) for i in itertools.count())

    def generate(chunk: Prompt) -> Completions:
        return _generate(policy, num_completions, sampling, variables, chunk, next(keys))

    completions = _in_chunks(problem, generate, batch, num_completions)
    decode = problem.model.texts.tokenizer.decode
    decoded = [
        [
            _decode(decode, tokens[mask], log_probs[mask], bool(finished), stop_strings)
            for tokens, log_probs, mask, finished in zip(*sample, strict=True)
        ]
        for sample in zip(*completions, strict=True)
    ]
    if sort_by is None:
        return decoded
    return [sorted(row, key=operator.attrgetter(sort_by), reverse=True) for row in decoded]


def choose(
    problem: TokenProblem,
    variables: Params,
    prompts: Sequence[str],
    images: Sequence[Image],
    choices: Sequence[str],
) -> list[list[Choice]]:
    """Computes the exact probabilities of given completions of prompts about images.

    A completion is the text with the stop token after it, tokenized as the labels of training are,
    so that a choice which begins with another one is compared fairly.

    Args:
      problem: Problem of the run, see `complete`.
      variables: Variables of the policy.
      prompts: Texts of N prompts.
      images: Image of each prompt, see `complete`.
      choices: Texts of the completions, at least 2.

    Returns:
      The choices of each of the N prompts, the most likely one first.

    Raises:
      ValueError: If there are fewer than 2 choices, two of them have the same tokens, one cannot be
        tokenized, or a prompt or an image is invalid, see `complete`.
    """
    if len(choices) < 2:
        raise ValueError(f"choices={list(choices)}: give at least 2.")
    tokenizer = problem.model.texts.tokenizer
    rows = [tokenizer.encode_completion(text) for text in choices]
    for i, ids in enumerate(rows):
        if ids in rows[:i]:
            raise ValueError(
                f"The choices {choices[rows.index(ids)]!r} and {choices[i]!r} have the same "
                f"tokens {ids}; remove one."
            )
    lengths = np.array([len(ids) for ids in rows])
    mask = np.arange(max(lengths)) < lengths[:, None]
    tokens = np.full(mask.shape, tokenizer.pad, np.int32)
    tokens[mask] = np.concatenate(rows)
    score = functools.partial(_score, problem.model.policy, variables, tokens, mask)
    batch = _encode(problem, prompts, images)
    log_probs = _in_chunks(problem, score, batch, len(choices))
    probabilities = np.asarray(jax.nn.softmax(log_probs, axis=-1))
    return [
        sorted(
            map(Choice, choices, row.tolist(), shares.tolist()),
            key=operator.attrgetter("log_prob"),
            reverse=True,
        )
        for row, shares in zip(log_probs, probabilities, strict=True)
    ]


def _in_chunks(
    problem: TokenProblem, function: Callable[[Prompt], Any], batch: Prompt, num_completions: int
) -> Any:
    """Applies a function to prompts, as many at a time as an update of the run completes."""
    return in_chunks(
        lambda chunk: function(mesh_lib.put_batch(chunk, mesh=problem.mesh)),
        batch,
        max_size=max(problem.eval_batch_size() // num_completions, 1),
        devices=mesh_lib.batch_shards(problem.mesh),
    )


def _decode(
    decode: Callable[[Sequence[int]], str],
    tokens: np.ndarray,
    log_probs: np.ndarray,
    finished: bool,
    stop_strings: Sequence[str],
) -> Completion:
    """Decodes the tokens of a completion [n], and truncates it at the first stop string."""
    text = decode(tokens.tolist())
    for count in range(1, len(tokens) + 1) if any(s in text for s in stop_strings) else ():
        # The log-prob has the tokens up to the one that completes a stop string.
        read = decode(tokens[:count].tolist())
        if places := [read.index(s) for s in stop_strings if s in read]:
            log_prob = float(log_probs[:count].sum())
            return Completion(read[: min(places)], log_prob, True, count)
    return Completion(text, float(log_probs.sum()), finished, len(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    policy: TokenPolicy, variables: Params, tokens: jax.Array, mask: jax.Array, prompts: Prompt
) -> jax.Array:
    """Returns the log-probs of C completions [C, T] of each of B prompts, float32 [B, C]."""
    shape = len(prompts.tokens), *tokens.shape
    result = policy.log_probs(
        *lora.split(variables, ".*"),
        prompts,
        jnp.broadcast_to(tokens, shape),
        jnp.broadcast_to(mask, shape),
        temperature=1.0,
    )
    return jnp.sum(jnp.where(mask, result.log_prob, 0.0), axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    policy: TokenPolicy,
    num_completions: int,
    sampling: Sampling,
    variables: Params,
    prompts: Prompt,
    rng: jax.Array,
) -> Completions:
    """Samples completions; a second call with prompts of about the same length compiles nothing."""
    return policy.generate(
        *lora.split(variables, ".*"),
        prompts,
        rng,
        num_completions=num_completions,
        sampling=sampling,
    )


def _encode(problem: TokenProblem, prompts: Sequence[str], images: Sequence[Image]) -> Prompt:
    """Returns prompts as host arrays, padded on the left; raises ValueError as `complete`."""
    if not prompts:
        raise ValueError("There is no prompt to complete.")
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, but {len(images)} images; give one image for each prompt."
        )
    pixels = np.stack([_read(problem, image) for image in images])
    texts = problem.model.texts
    tokenizer = texts.tokenizer
    # All prompts of a run have equally many image tokens.
    image_tokens = int(np.sum(texts.prompt_tokens[0] == tokenizer.image))
    rows = [tokenizer.encode_prompt(text, images=image_tokens) for text in prompts]
    width = -(-max(map(len, rows)) // PADDING) * PADDING
    return free_prompts(*pad_left(rows, width, tokenizer.pad), pixels)


def _read(problem: TokenProblem, image: Image) -> np.ndarray:
    """Reads an image, and resizes it as in training."""
    name = "image"
    try:
        if isinstance(image, str | pathlib.Path):
            name = f"image {str(image)!r}"
            image = pathlib.Path(image).read_bytes()
        rgb, _ = image_files.read_rgb(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"The {name} cannot be read: {error}") from error
    resize = problem.config.get("dataset", {}).get("resize", image_files.LETTERBOX)
    return image_files.fit(rgb, problem.model.size, resize=resize)
