"""Parts of the memory of a run that follow from the sizes of its model and its batches."""

import math
from typing import Any

import jax.numpy as jnp

from mmrl_jax.distributed.mesh import TENSOR
from mmrl_jax.models.language import LanguageModel
from mmrl_jax.planning.usage import Analyzer
from mmrl_jax.problems import Problem
from mmrl_jax.problems.sources import LEARNING, ROLLOUT
from mmrl_jax.training.stage import Carry

SCOPES = (ROLLOUT, LEARNING)


def moments(problem: Problem, name: str, carry: Carry, analyzer: Analyzer) -> dict[str, float]:
    """Returns the bytes of parts of an update on one device that do not exist all the time.

    Args:
      problem: Problem of one device.
      name: Name of the stage.
      carry: Shapes of the carry of the stage.
      analyzer: Analyzer of the device.

    Returns:
      'KV cache', the keys and values of prompts and completions; 'logits', those of one token of
      each completion; and 'images', those of the prompts or transitions of an update.
    """
    g = problem.config[name]
    found: dict[str, float] = {}
    pixels = _pixels(carry.env_state)
    if pixels is not None:
        steps = g.get("unroll_length", 1)
        found["images"] = float(steps * math.prod(pixels.shape) * pixels.dtype.itemsize)
    model = getattr(problem, "model", None)
    if model is None or not hasattr(model, "texts"):
        return found
    policy = model.policy
    language = policy.model if isinstance(policy.model, LanguageModel) else policy.model.language
    prompts = g.get("num_envs") or g.get("prompts_per_update", 0) * g.get("oversample", 1)
    samples = prompts * g.get("num_completions", 1)
    if not prompts:
        height, width = model.size
        return found | {"images": float(g.batch_size * height * width * 3)}
    if pixels is None:
        found["images"] = float(prompts * math.prod(model.size) * 3)
    length = model.texts.prompt_tokens.shape[1]
    tokens = prompts * length + samples * policy.max_new_tokens
    found["KV cache"] = kv_bytes(language, tokens, analyzer.mesh.get(TENSOR, 1))
    found["logits"] = float(samples * language.vocabulary * 4)
    return found


def kv_bytes(language: LanguageModel, tokens: int, tensor: int = 1) -> float:
    """Returns the bytes of the keys and values of some tokens in all layers.

    Args:
      language: Language model.
      tokens: Number of tokens.
      tensor: Number of devices over which heads are split, if it divides their number.
    """
    block = language.block
    heads = block.kv_heads or block.heads
    size = block.head_size or language.width // block.heads
    ways = tensor if heads % tensor == 0 else 1
    return float(
        2 * language.layers * tokens * heads * size * jnp.dtype(language.dtype).itemsize / ways
    )


def _pixels(env_state: Any) -> Any:
    """Returns the shape of the images that environments show; None without images."""
    observation = getattr(env_state, "obs", None)
    return observation.get("pixels") if isinstance(observation, dict) else None
