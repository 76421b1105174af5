"""Tests of mmrl_jax.models.flash and of the masks that its kernels apply."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.models import flash
from mmrl_jax.models.attention import attention
from mmrl_jax.models.masks import Mask, causal_mask

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 3, 200, 4, 2, 16  # Of two tiles, the second part-filled.
# Padding on the left, on the right, and on both sides.
VALID = np.stack([np.arange(LENGTH) >= 30, np.arange(LENGTH) < 150, np.arange(LENGTH) % 190 > 9])
SEGMENTS = np.stack([np.arange(LENGTH) // 60, np.arange(LENGTH) % 3, np.zeros(LENGTH, int)])
COUNTED = np.maximum(np.cumsum(VALID, axis=1) - 1, 0)
# The first 40 tokens after padding, which is marked too.
PREFIX = COUNTED < 40


def masks():
    valid, segments = jnp.asarray(VALID), jnp.asarray(SEGMENTS, jnp.int32)
    prefix, counted = jnp.asarray(PREFIX), jnp.asarray(COUNTED)
    causal = causal_mask(valid, counted=True)
    return {
        "full": Mask(),
        "causal": Mask(causal=True),
        "valid": Mask(valid=valid),
        "causal_valid": causal,
        "segments": Mask(segments=segments),
        "packed": causal.replace(segments=segments),
        "window": causal.within(50, counted, counted),
        "prefix": causal.replace(prefix=prefix),
        "prefix_window": causal.replace(prefix=prefix).within(30, counted, counted),
        "readouts": causal.replace(readouts=3),
    }


KINDS = tuple(jax.eval_shape(masks))
FEWER = ("causal", "causal_valid", "packed", "prefix", "readouts")  # Also with fewer queries.


def inputs(queries=LENGTH, dtype=jnp.float32):
    shapes = (queries, HEADS), (LENGTH, KEY_HEADS), (LENGTH, KEY_HEADS)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (BATCH, *s, SIZE), dtype) for k, s in zip(keys, shapes)]


def outputs(attend, mask, queries=LENGTH):
    """The attention output of valid queries, 0 elsewhere, and its gradients."""
    reads = VALID[:, LENGTH - queries :] if mask.valid is not None else np.ones((BATCH, queries))
    reads = jnp.asarray(reads, bool)[..., None, None]
    weight = jax.random.normal(jax.random.key(1), (BATCH, queries, HEADS, SIZE))

    def loss(query, key, value):
        out = attend(query, key, value, mask)
        return jnp.sum(jnp.where(reads, out, 0) * weight), jnp.where(reads, out, 0)

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs(queries))
    return out, gradients


def expected(mask, queries=LENGTH, softcap=None):
    def attend(query, key, value, mask):
        allowed = mask.allowed(queries, LENGTH)
        return attention(query, key, value, allowed, scale=0.3, softcap=softcap)

    return outputs(attend, mask, queries)


def equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


SPLASH = functools.partial(flash.splash, scale=0.3, interpret=True)


@pytest.mark.parametrize("kind", KINDS)
def test_splash_attention_equals_ours(kind):
    equal(outputs(SPLASH, masks()[kind]), expected(masks()[kind]))


@pytest.mark.parametrize("kind", FEWER)
def test_splash_attention_of_the_last_tokens_equals_ours(kind):
    equal(outputs(SPLASH, masks()[kind], 70), expected(masks()[kind], 70))


def test_splash_attention_with_a_softcap_equals_ours():
    mask = masks()["causal_valid"]
    found = outputs(functools.partial(SPLASH, softcap=2.0), mask)
    equal(found, expected(mask, softcap=2.0))
    assert np.abs(found[0] - expected(mask)[0]).max() > 1e-2
