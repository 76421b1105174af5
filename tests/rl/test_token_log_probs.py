"""Compares log-probs by tiles of the vocabulary with a full softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.rl.token_log_probs import TokenLogProbs, token_log_probs


def plain(hidden, table, tokens, *, temperature=1.0, softcap=None):
    logits = hidden.astype(jnp.float32) @ table.T.astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_probs = jax.nn.log_softmax(logits / temperature)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return TokenLogProbs(jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0], entropy)


def draw(count=13, vocabulary=50, width=8):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (count, width))
    table = jax.random.normal(keys[1], (vocabulary, width))
    tokens = jax.random.randint(keys[2], (count,), 0, vocabulary)
    # The first and the last id, and one in the overlap of the last two tiles of 16.
    tokens = tokens.at[:3].set(jnp.array([0, vocabulary - 1, 40]))
    return hidden, table, tokens, jax.random.normal(keys[3], (2, count))


HOW = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"temperature": 1.3, "softcap": 2.0},
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("tile", [1, 16, 25, 50, 1000])
def test_tiles_give_the_plain_log_probs_and_gradients(tile, how):
    hidden, table, tokens, weights = draw()

    def loss(function, hidden, table):
        found = function(hidden, table, tokens)
        return jnp.sum(weights[0] * found.log_prob) + jnp.sum(weights[1] * found.entropy), found

    def tiled(*arguments):
        return token_log_probs(*arguments, tile=tile, **how)

    def reference(*arguments):
        return plain(*arguments, **how)

    with jax.default_matmul_precision("highest"):
        results = [
            jax.grad(loss, argnums=(1, 2), has_aux=True)(f, hidden, table)
            for f in (tiled, reference)
        ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), *results)


def test_the_sum_over_the_vocabulary_is_one():
    hidden, table, _, _ = draw()
    log_probs = [
        token_log_probs(hidden, table, jnp.full(13, j), tile=16).log_prob for j in range(50)
    ]
    np.testing.assert_allclose(jnp.exp(jnp.stack(log_probs)).sum(axis=0), np.ones(13), rtol=1e-5)


def test_large_logits_stay_finite():
    hidden, table, tokens, _ = draw()
    found = token_log_probs(1e4 * hidden, table, tokens, tile=16)
    gradient = jax.grad(lambda h: token_log_probs(h, table, tokens, tile=16)[0].sum())(1e4 * hidden)
    assert np.isfinite(found.log_prob).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(found.entropy, np.zeros(13), atol=1e-2)


def temporary_bytes(function, vocabulary):
    hidden = jax.ShapeDtypeStruct((256, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((vocabulary, 16), jnp.float32)
    tokens = jax.ShapeDtypeStruct((256,), jnp.int32)

    def loss(hidden, table, tokens):
        return jnp.sum(function(hidden, table, tokens).log_prob)

    compiled = jax.jit(jax.grad(loss)).lower(hidden, table, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_vocabulary():
    def tiled(*arguments):
        return token_log_probs(*arguments, tile=1024)

    def growth(function):
        return temporary_bytes(function, 65_536) / temporary_bytes(function, 8192)

    assert growth(plain) > 6
    assert growth(tiled) < 1.5


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"tile": 0}])
def test_what_is_not_positive_is_refused(wrong):
    hidden, table, tokens, _ = draw()
    with pytest.raises(ValueError, match="must be positive"):
        token_log_probs(hidden, table, tokens, **wrong)
