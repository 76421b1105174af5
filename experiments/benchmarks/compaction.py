"""Sampling that leaves out completions that have ended, compared with sampling all of them.

The model is a random decoder with 4.8M parameters in float32. Some of its 512 token ids end a
completion, so that lengths have a geometric distribution, whose tail is long. Both sides sample the
same tokens, which is checked before they are timed.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import packing
from experiments.benchmarks.harness import Row, compare, seconds
from mmrl_jax.rollouts.generate import Completions, Sampling, generate, text_prompt

PROMPTS, COMPLETIONS, TOKENS, VOCABULARY = 4, 8, 128, 512
MODEL = packing.MODEL.clone(vocabulary=VOCABULARY)
# Mean lengths. Logits of a new model are nearly uniform, so that a token ends a completion with
# probability 1 / mean if as many of the token ids do.
MEANS = (16, 32)


def rows(runs: int) -> Iterator[Row]:
    """Measures the time of sampling with two compactions and without any, for two mean lengths."""
    for mean in MEANS:
        yield row_of(mean, runs)


def row_of(mean: int, runs: int) -> Row:
    """Measures completions of a mean length in tokens."""
    tokens = jax.random.randint(jax.random.key(0), (PROMPTS, packing.PROMPT), 0, VOCABULARY)
    mask = jnp.ones(tokens.shape, bool)
    variables = jax.jit(MODEL.init)(jax.random.key(1), tokens, mask)

    def program(compactions: int) -> jax.stages.Compiled:
        def sample(variables: dict, rng: jax.Array) -> Completions:
            return generate(
                MODEL,
                variables,
                text_prompt(MODEL, variables, tokens, mask),
                rng,
                num_completions=COMPLETIONS,
                max_new_tokens=TOKENS,
                sampling=Sampling(),
                stop=tuple(range(VOCABULARY // mean)),
                compactions=compactions,
            )

        return jax.jit(sample).lower(variables, jax.random.key(2)).compile()

    ours, peer = program(2), program(0)
    key = jax.random.key(2)
    first, second = ours(variables, key), peer(variables, key)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    lengths = np.sum(first.mask, axis=-1)
    text = f"lengths {lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}: two / none"
    return compare(
        text,
        lambda: seconds(ours, variables, key),
        lambda: seconds(peer, variables, key),
        unit="s",
        runs=runs,
    )
