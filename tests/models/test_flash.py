"""Tests of mmrl_jax.models.flash: kernels equal the attention that XLA computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.models import flash
from mmrl_jax.models.attention import attention
from mmrl_jax.models.masks import Mask, causal_mask

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 200, 4, 2, 16  # Two tiles, the second part-filled.
SCALE = 0.3
ORDER = np.arange(LENGTH)
# Padding on the left, on the right and on both sides, and no other token.
VALID = np.stack([ORDER >= 30, ORDER < 150, (ORDER > 9) & (ORDER < 190), ORDER < 0])
SEGMENTS = np.stack([ORDER // 60, ORDER % 3, 0 * ORDER, -(ORDER // 99)])
COUNTED = np.maximum(np.cumsum(VALID, axis=1) - 1, 0)
PREFIX = COUNTED < 40  # The first 40 tokens, and the padding before them.


def masks():
    valid, segments, prefix, counted = map(jnp.asarray, (VALID, SEGMENTS, PREFIX, COUNTED))
    causal = causal_mask(valid, contiguous=True)
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


def inputs(queries=LENGTH):
    shapes = (queries, HEADS), (LENGTH, KEY_HEADS), (LENGTH, KEY_HEADS)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (BATCH, *s, SIZE)) for k, s in zip(keys, shapes, strict=True)]


def outputs(attend, mask, queries=LENGTH):
    """The attention output, 0 at padding, and the gradients of queries, keys and values."""
    valid = np.ones((BATCH, queries), bool) if mask.valid is None else VALID[:, LENGTH - queries :]
    valid = jnp.asarray(valid)[..., None, None]
    weight = jax.random.normal(jax.random.key(1), (BATCH, queries, HEADS, SIZE))

    def loss(query, key, value):
        out = jnp.where(valid, attend(query, key, value, mask), 0)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs(queries))
    return out, gradients


def by_xla(query, key, value, mask, softcap=None):
    allowed = mask.allowed(query.shape[1], key.shape[1])
    return attention(query, key, value, allowed, scale=SCALE, softcap=softcap)


def equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


splash = functools.partial(flash.splash, scale=SCALE, interpret=True)


@pytest.mark.parametrize("kind", KINDS)
def test_splash_attention_equals_ours(kind):
    equal(outputs(splash, masks()[kind]), outputs(by_xla, masks()[kind]))


@pytest.mark.parametrize("kind", FEWER)
def test_splash_attention_of_the_last_tokens_equals_ours(kind):
    equal(outputs(splash, masks()[kind], 70), outputs(by_xla, masks()[kind], 70))


def test_splash_attention_with_a_softcap_equals_ours():
    found, expected = (
        outputs(functools.partial(attend, softcap=2.0), masks()["causal_valid"])
        for attend in (splash, by_xla)
    )
    equal(found, expected)
    without = outputs(by_xla, masks()["causal_valid"])
    assert np.abs(found[0] - without[0]).max() > 1e-2


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])  # 4 does not divide the 2 key heads.
def test_each_device_attends_with_its_samples_and_heads(shape):
    mesh = meshes.make_mesh(8, dict(zip(meshes.AXES, shape, strict=True)))
    locally = []

    def kernel(query, key, value, mask):
        locally.append((query.shape, key.shape, mask.valid.shape))
        return by_xla(query, key, value, mask)

    @jax.jit
    def run(mask):
        with meshes.on_mesh(mesh):
            return outputs(functools.partial(flash._on_each_device, kernel), mask)

    mask = meshes.put_batch(masks()["packed"], mesh=mesh)
    equal(run(mask), outputs(by_xla, masks()["packed"]))
    samples, heads = BATCH // (shape[0] * shape[1]), 2 if shape[2] == 2 else 1
    assert locally[0] == (
        (samples, LENGTH, HEADS // heads, SIZE),
        (samples, LENGTH, KEY_HEADS // heads, SIZE),
        (samples, LENGTH),
    )


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """What cuDNN is asked for, computed by JAX's reference implementation."""
    theirs, asked = jax.nn.dot_product_attention, []

    def reference(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        asked.append((query.shape, key.shape, options))
        return theirs(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", reference)
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_what_cudnn_is_asked_for_equals_ours(kind, cudnn_by_xla):
    found = outputs(functools.partial(flash.cudnn, scale=SCALE), masks()[kind])
    equal(found, outputs(by_xla, masks()[kind]))
    _, _, options = cudnn_by_xla[0]
    # What cuDNN knows by itself takes no array of queries and keys.
    known = kind in ("full", "causal", "valid", "causal_valid", "window")
    assert ("mask" in options) != known


@pytest.mark.parametrize("kind", FEWER)
def test_what_cudnn_is_asked_for_of_the_last_tokens_equals_ours(kind, cudnn_by_xla):
    found = outputs(functools.partial(flash.cudnn, scale=SCALE), masks()[kind], 71)
    equal(found, outputs(by_xla, masks()[kind], 71))
    # Gradients with a mask need even lengths.
    assert cudnn_by_xla[0][0][1] == 72 and cudnn_by_xla[0][1][1] == LENGTH
