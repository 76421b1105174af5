"""Time and memory of token log-probs by tiles of the vocabulary, compared with a full softmax.

The gradient is with respect to the features and the output layer. The memory is that of the
temporaries of the compiled program, without inputs and outputs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.harness import Row, compare, seconds
from mmrl_jax.rl.token_log_probs import token_log_probs

TOKENS, WIDTH = 1024, 576
VOCABULARIES = (16_384, 49_152, 147_456)


def rows(runs: int) -> Iterator[Row]:
    """Measures one vocabulary after another."""
    for vocabulary in VOCABULARIES:
        keys = jax.random.split(jax.random.key(0), 3)
        inputs = (
            jax.random.normal(keys[0], (TOKENS, WIDTH)),
            0.05 * jax.random.normal(keys[1], (vocabulary, WIDTH)),
            jax.random.randint(keys[2], (TOKENS,), 0, vocabulary),
        )
        tiled = gradient(lambda *x: token_log_probs(*x).log_prob, inputs)
        peer = gradient(plain, inputs)
        name = f"vocabulary {vocabulary:,} / plain"
        yield compare(
            f"{name}: time",
            lambda tiled=tiled, inputs=inputs: seconds(tiled, *inputs),
            lambda peer=peer, inputs=inputs: seconds(peer, *inputs),
            unit="s",
            runs=runs,
        )
        yield compare(
            f"{name}: memory",
            lambda tiled=tiled: megabytes(tiled),
            lambda peer=peer: megabytes(peer),
            unit="MB",
            runs=1,
        )


def plain(hidden: jax.Array, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns log-probs float32 [N] from the logits of the whole vocabulary."""
    log_probs = jax.nn.log_softmax(hidden @ table.T)
    return jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]


def gradient(log_probs: Callable[..., jax.Array], inputs: tuple[Any, ...]) -> jax.stages.Compiled:
    """Returns the compiled gradient of the mean log-prob."""

    def loss(hidden: jax.Array, table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.mean(log_probs(hidden, table, tokens))

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs).compile()


def megabytes(program: jax.stages.Compiled) -> float:
    """Returns the size of the temporaries of a program in MB."""
    return program.memory_analysis().temp_size_in_bytes / 1e6
