"""Tests of mmrl_jax.models.attention: when a kernel computes attention, and that models agree."""

import functools
import re

import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.distributed import partition
from mmrl_jax.models import flash, stacked
from mmrl_jax.models.attention import attend, attention, attention_by
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.masks import Mask, causal_mask
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts.log_probs import completion_log_probs, log_probs_from_features

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 256, 4, 2, 8
VALID = jnp.asarray(np.arange(LENGTH) >= np.array([[0], [3], [60], [100]]))
COUNTED = jnp.maximum(jnp.cumsum(VALID, axis=1) - 1, 0)
MASK = causal_mask(VALID, contiguous=True)


def inputs(dtype=jnp.bfloat16, length=LENGTH, size=SIZE):
    shapes = (length, HEADS, size), (length, KEY_HEADS, size), (length, KEY_HEADS, size)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (BATCH, *s), dtype) for k, s in zip(keys, shapes, strict=True)]


def lowered(platform, arrays, mask, mesh=None, **options):
    """The program of the attention's gradient for a platform."""

    def loss(*arrays):
        with meshes.on_mesh(mesh):
            return jnp.sum(attend(*arrays, mask, **options).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


TPU, CUDNN, CUDNN_BIAS = "tpu_custom_call", "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"
LOGITS = re.compile(r"x256x256x(f32|bf16)>")  # Of queries and keys.


@pytest.fixture
def cudnn(monkeypatch):
    """Lets JAX lower for cuDNN where it is not installed."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def test_programs_for_a_tpu_call_splash_attention():
    text = lowered("tpu", inputs(), MASK)
    # The output, the gradient of the queries, and the one of the keys and values.
    assert text.count(TPU) == 3 and not LOGITS.search(text)
    assert TPU not in lowered("cpu", inputs(), MASK)
    assert TPU in lowered("tpu", inputs(), MASK, softcap=5.0)
    assert TPU in lowered("tpu", inputs(), MASK.within(9, COUNTED, COUNTED))


def test_programs_for_a_gpu_call_cudnn(cudnn):
    for mask, name in (
        (MASK, CUDNN),
        (Mask(), CUDNN),
        (MASK.within(9, COUNTED, COUNTED), CUDNN),
        (Mask(segments=COUNTED // 9), CUDNN_BIAS),
        (MASK.replace(prefix=COUNTED < 9), CUDNN_BIAS),
    ):
        text = lowered("cuda", inputs(), mask)
        assert f"@{name}(" in text and f"@{name}Backward(" in text
        assert bool(LOGITS.search(text)) == (name == CUDNN_BIAS)
    assert "cudnn" not in lowered("cuda", inputs(), MASK, softcap=5.0)
    assert "cudnn" not in lowered("cuda", inputs(size=12), MASK)  # No multiple of 8.
    assert "cudnn" not in lowered("cpu", inputs(), MASK)


def test_programs_for_a_gpu_have_no_kernel_where_cudnn_is_not_installed(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    text = lowered("cuda", inputs(), MASK)
    assert "cudnn" not in text and LOGITS.search(text)


def test_on_a_mesh_each_device_has_its_kernel(cudnn):
    mesh = meshes.make_mesh(8, dict(zip(meshes.AXES, (2, 2, 2), strict=True)))
    # A device has one of the four samples, and two of the four heads.
    for platform, name, queries in (
        ("tpu", TPU, "<2x256x8xbf16>"),
        ("cuda", f"@{CUDNN}(", "<1x256x2x8xbf16>"),
    ):
        text = lowered(platform, inputs(), MASK, mesh)
        assert queries in next(line for line in text.splitlines() if name in line)
    odd = [x[:3] for x in inputs()]  # Samples that the devices cannot share.
    assert TPU not in lowered("tpu", odd, causal_mask(VALID[:3]), mesh)


@pytest.mark.parametrize(
    ("arrays", "mask", "options"),
    [
        (inputs(jnp.float32), MASK, {}),
        (inputs(length=64), Mask(), {}),
        (inputs(), MASK, {"initializing": True}),
    ],
    ids=["float32", "few tokens", "initialization"],
)
def test_no_kernel_serves(arrays, mask, options, cudnn):
    assert TPU not in lowered("tpu", arrays, mask, **options)
    assert "cudnn" not in lowered("cuda", arrays, mask, **options)


def test_splash_attention_does_not_serve_what_depends_on_positions_or_arrays():
    assert TPU not in lowered("tpu", inputs(), causal_mask(VALID).within(9, COUNTED, COUNTED))
    assert TPU not in lowered("tpu", inputs(), Mask(explicit=MASK.allowed(LENGTH, LENGTH)))


def test_kernels_can_be_switched_off(cudnn):
    with attention_by("xla"):
        assert TPU not in lowered("tpu", inputs(), MASK)
        assert "cudnn" not in lowered("cuda", inputs(), MASK)
    assert TPU in lowered("tpu", inputs(), MASK)


def test_on_a_cpu_ours_computes_attention():
    def gradients(function):
        def loss(*arrays):
            return jnp.sum(function(*arrays).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs())

    def ours(*arrays):
        return attention(*arrays, MASK.allowed(LENGTH, LENGTH))

    def chosen(*arrays):
        return attend(*arrays, MASK)

    np.testing.assert_array_equal(jax.jit(chosen)(*inputs()), jax.jit(ours)(*inputs()))
    for a, b in zip(gradients(chosen), gradients(ours), strict=True):
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, b)), rtol=0.02, atol=0.02)


PROMPT, TOKENS, GROUP = 100, 40, 2


def language_model(**changes):
    block = BlockSpec(heads=HEADS, hidden=32, kv_heads=KEY_HEADS, norm="rms", gated=True, biases=())
    settings = {"vocabulary": 31, "width": HEADS * SIZE, "layers": 2, "block": block}
    return LanguageModel(**settings | {"ropes": (Rope(100.0, SIZE),)} | changes)


def log_probs_and_gradients(model, mesh=None, pack_rows=None):
    """Log-probs of completions of left-padded prompts, and their gradient."""
    tokens = jax.random.randint(jax.random.key(1), (BATCH, PROMPT), 0, 31)
    valid = jnp.arange(PROMPT) >= jnp.array([[0], [3], [60], [99]])
    completions = jax.random.randint(jax.random.key(2), (BATCH, GROUP, TOKENS), 0, 31)
    mask = jnp.arange(TOKENS) < jnp.array([TOKENS, 7])[:, None]
    mask = jnp.broadcast_to(mask, completions.shape)

    def loss(variables):
        per_token = functools.partial(log_probs_from_features, model, variables)
        with meshes.on_mesh(mesh):
            prompt = gen.text_prompt(model, variables, tokens, valid)
            found = completion_log_probs(
                model, variables, prompt, completions, mask, per_token, pack_rows=pack_rows
            )
        log_probs = jnp.where(mask, found.log_prob, 0)
        return jnp.sum(jnp.sin(log_probs)), log_probs

    variables = language_model().init(jax.random.key(0), tokens, valid)
    variables = stacked.stack(variables, model)
    if mesh is not None:
        variables = jax.device_put(variables, partition.shardings(variables, mesh))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)


@pytest.fixture
def interpreted(monkeypatch):
    """Attention of models by the interpreted kernel, on CPU and in float32; its masks are kept."""
    served = []

    def kernels(query, key, mask, *, scale, softcap):
        if mask.explicit is not None or (mask.window and query.shape[1] != key.shape[1]):
            return {}
        served.append((query.shape[1], key.shape[1], mask))
        kernel = functools.partial(flash.splash, scale=scale, softcap=softcap, interpret=True)
        return {"cpu": functools.partial(flash._on_each_device, kernel)}

    def start():
        monkeypatch.setattr(flash, "kernels", kernels)
        return served

    return start


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_log_probs_of_completions_are_the_same_with_kernels(shape, interpreted):
    mesh = (
        None if shape is None else meshes.make_mesh(8, dict(zip(meshes.AXES, shape, strict=True)))
    )
    expected = log_probs_and_gradients(language_model())
    served = interpreted()
    found = log_probs_and_gradients(language_model(), mesh)
    # The prompts, and the completions with their prompts before them: their last token is not read.
    assert {x[:2] for x in served} == {(PROMPT, PROMPT), (TOKENS - 1, PROMPT + TOKENS - 1)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_windows_of_prompts_are_the_same_with_kernels(scan, interpreted):
    changes = {"windows": (20, None), "ropes": (Rope(100.0, SIZE),) * 2, "pattern": (0, 1)}
    changes |= {"scan": scan, "remat": scan}
    expected = log_probs_and_gradients(language_model(**changes))
    served = interpreted()
    found = log_probs_and_gradients(language_model(**changes))
    assert any(mask.window == 20 and mask.contiguous for _, _, mask in served)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_packed_completions_are_the_same_with_kernels(interpreted):
    expected = log_probs_and_gradients(language_model())
    served = interpreted()
    found = log_probs_and_gradients(language_model(), pack_rows=1)
    assert {x[:2] for x in served} == {(PROMPT, PROMPT)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
