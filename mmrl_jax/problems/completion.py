"""Completions of a user's own prompts by a token policy."""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
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


class Completion(NamedTuple):
    """One completion of a prompt.

    Attributes:
      text: Text of the completion, without its stop token.
      log_prob: Log-prob of the completion in nats, the sum over its tokens at the sampling
        temperature (1 for greedy decoding), before top-k, top-p and min-p.
      finished: Whether it ended with a stop token, rather than at the maximum number of tokens.
    """

    text: str
    log_prob: float
    finished: bool


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

    Returns:
      The G completions of each of the N prompts.

    Raises:
      ValueError: If there is no prompt, the number of images is wrong, a prompt cannot be
        tokenized, or an image cannot be read.
    """
    if not prompts:
        raise ValueError("There is no prompt to complete.")
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, but {len(images)} images; give one image for each prompt."
        )
    policy = problem.model.policy
    if max_new_tokens is not None:
        policy = dataclasses.replace(policy, max_new_tokens=max_new_tokens)
    batch = _encode(problem, prompts, [_read(problem, image) for image in images])

    rng = jax.random.key(seed)
    # The samples of a chunk depend on their index in it, so that each chunk has a key of its own.
    keys = (jax.random.fold_in(rng, i) for i in itertools.count())

    def generate(chunk: Prompt) -> Completions:
        chunk = mesh_lib.put_batch(chunk, mesh=problem.mesh)
        return _generate(policy, num_completions, sampling, variables, chunk, next(keys))

    completions = in_chunks(
        generate,
        batch,
        max_size=max(problem.eval_batch_size() // num_completions, 1),
        devices=mesh_lib.batch_shards(problem.mesh),
    )
    decode = problem.model.texts.tokenizer.decode
    return [
        [
            Completion(decode(tokens[mask].tolist()), float(log_probs.sum()), bool(finished))
            for tokens, log_probs, mask, finished in zip(*sample, strict=True)
        ]
        for sample in zip(*completions, strict=True)
    ]


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


def _encode(problem: TokenProblem, prompts: Sequence[str], images: Sequence[np.ndarray]) -> Prompt:
    """Returns prompts as host arrays, padded on the left."""
    texts = problem.model.texts
    tokenizer = texts.tokenizer
    # All prompts of a run have equally many image tokens.
    image_tokens = int(np.sum(texts.prompt_tokens[0] == tokenizer.image))
    rows = [tokenizer.encode_prompt(text, images=image_tokens) for text in prompts]
    width = -(-max(map(len, rows)) // PADDING) * PADDING
    return free_prompts(*pad_left(rows, width, tokenizer.pad), np.stack(images))


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
