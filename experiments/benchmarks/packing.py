"""Gradients of the log-probs of packed completions, compared with padded completions.

The model is a decoder with 17M parameters, of which 12.6M are in its tied output layer, in float32.
Both sides use the same parameters, prompts and completions. Their gradients are compared before
they are timed.
"""

from collections.abc import Iterator
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.harness import Row, alternate, row
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.rollouts import packing
from mmrl_jax.rollouts.generate import text_prompt
from mmrl_jax.rollouts.log_probs import completion_log_probs, log_probs_from_features
from mmrl_jax.types import Params

VOCABULARY, WIDTH = 49_152, 256
NUM_PROMPTS, GROUP, LENGTH, PROMPT = 4, 8, 64, 24

MODEL = LanguageModel(
    VOCABULARY,
    WIDTH,
    layers=6,
    block=BlockSpec(heads=8, hidden=688, norm="rms", activation="silu", gated=True, biases=()),
    ropes=(Rope(10_000.0, WIDTH // 8),),
)


def rows(runs: int) -> Iterator[Row]:
    """Measures completions of any length, with enough and too few rows, and mostly short ones."""
    rng = np.random.default_rng(0)
    any_length = rng.integers(8, LENGTH + 1, (NUM_PROMPTS, GROUP))
    short = rng.integers(8, 25, (NUM_PROMPTS, GROUP))
    short[:, 0] = LENGTH
    for name, lengths, missing in (
        ("completions of 8 to 64", any_length, 0),
        ("the same", any_length, 1),
        ("7 of 8 to 24 and 1 of 64", short, 0),
    ):
        mask = jnp.asarray(np.arange(LENGTH) < lengths[..., None])
        count = int(packing.rows_used(mask)) - missing
        rows_text = f"{count} of {GROUP} rows" + missing * ", too few"
        yield from rows_of(f"{name}, {rows_text} / padded", mask, count, runs)


def rows_of(name: str, mask: jax.Array, count: int, runs: int) -> Iterator[Row]:
    """Measures wall time, processor time and memory."""
    variables, ours, peer = programs(mask, count)

    def timed(program: jax.stages.Compiled) -> tuple[float, float]:
        processors, start = time.process_time(), time.perf_counter()
        jax.block_until_ready(program(variables, mask))
        return time.perf_counter() - start, time.process_time() - processors

    durations = alternate([functools.partial(timed, side) for side in (ours, peer)], runs)
    for i, clock in enumerate(("time", "processor time")):
        yield row(f"{name}: {clock}", *([x[i] for x in side] for side in durations), unit="s")
    memory = ([side.memory_analysis().temp_size_in_bytes / 1e6] for side in (ours, peer))
    yield row(f"{name}: memory", *memory, unit="MB")


def programs(
    mask: jax.Array, count: int
) -> tuple[Params, jax.stages.Compiled, jax.stages.Compiled]:
    """Returns parameters, and the compiled gradients with packed and with padded completions.

    Args:
      mask: Mask of the completion tokens, bool [B, G, T].
      count: Number of rows into which the completions of a prompt are packed.

    Raises:
      AssertionError: If the gradients differ.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    prompt = jax.random.randint(keys[0], (NUM_PROMPTS, PROMPT), 0, VOCABULARY)
    tokens = jax.random.randint(keys[1], mask.shape, 0, VOCABULARY)
    prompt_mask = jnp.ones(prompt.shape, bool)
    variables = jax.jit(MODEL.init)(keys[2], prompt, prompt_mask)

    def compiled(pack_rows: int | None) -> jax.stages.Compiled:
        def loss(variables: Params, mask: jax.Array) -> jax.Array:
            log_probs = completion_log_probs(
                MODEL,
                variables,
                text_prompt(MODEL, variables, prompt, prompt_mask),
                tokens,
                mask,
                functools.partial(log_probs_from_features, MODEL, variables),
                pack_rows=pack_rows,
            )
            return -jnp.sum(jnp.where(mask, log_probs.log_prob, 0.0)) / jnp.sum(mask)

        return jax.jit(jax.grad(loss)).lower(variables, mask).compile()

    ours, peer = compiled(count), compiled(None)
    jax.tree.map(_check, ours(variables, mask), peer(variables, mask))
    return variables, ours, peer


def _check(ours: jax.Array, peer: jax.Array) -> None:
    np.testing.assert_allclose(ours, peer, atol=1e-5 * float(jnp.abs(peer).max()))
