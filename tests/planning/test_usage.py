"""Tests of mmrl_jax.planning.program, .kernels, .splits and .usage."""

import math

import jax
import jax.numpy as jnp
import pytest

from mmrl_jax.models import attention
from mmrl_jax.models.masks import Mask
from mmrl_jax.planning import chips, program
from mmrl_jax.planning.program import Value
from mmrl_jax.planning.usage import Analyzer, padded

V5E, CPU = chips.CHIPS["v5e"], chips.cpu()
F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def analyze(function, *arguments, chip=CPU, splits=(), mesh=None, donated=0):
    closed = program.simplified(jax.make_jaxpr(function)(*arguments))
    splits = [*splits, *[None] * (len(closed.jaxpr.invars) - len(splits))]
    ins = [Value(v.aval, split=s) for v, s in zip(closed.jaxpr.invars, splits, strict=True)]
    return Analyzer(chip, mesh or {}).program(closed, ins, donated).whole


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


# -- FLOPs -----------------------------------------------------------------------------------------


def test_a_product_has_two_flops_for_each_pair():
    usage = analyze(lambda x, y: x @ y, shape(2, 3), shape(3, 5))
    assert usage.flops == usage.model_flops == 2 * 2 * 3 * 5


def test_a_loop_multiplies_the_flops_of_its_body():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    def counted(x, w):
        start = jnp.zeros((), jnp.int32) + 1  # As in generation: the first step is before the loop.
        return jax.lax.while_loop(
            lambda c: (c[0] < 5) & jnp.any(c[1] > 0), lambda c: (c[0] + 1, c[1] @ w), (start, x)
        )[1]

    assert analyze(scanned, shape(4, 4), shape(4, 4)).flops == 7 * 2 * 4**3
    assert analyze(counted, shape(4, 4), shape(4, 4)).flops == 4 * 2 * 4**3


def test_a_loop_of_unknown_length_is_one_step_and_is_listed():
    def solve(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ w, x)

    usage = analyze(solve, shape(4, 4), shape(4, 4))
    assert usage.flops == 2 * 4**3 and len(usage.unknown) == 1


def network(w, x):
    for layer in w:
        x = jnp.tanh(x @ layer)
    return jnp.sum(x)


def test_flops_of_a_gradient_are_those_of_xla():
    w = [shape(256, 256)] * 3
    gradient = jax.grad(network)
    usage = analyze(gradient, w, shape(512, 256))
    # Three products forwards; backwards three for the layers and two for their inputs.
    assert usage.flops == 8 * 2 * 512 * 256 * 256
    theirs = compiled(gradient, w, shape(512, 256)).cost_analysis()["flops"]
    assert usage.flops == pytest.approx(theirs, rel=0.05)


def test_recomputation_counts_as_work_and_not_as_the_models():
    layer = jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]))

    def loss(w, x):
        return jnp.sum(layer(w, layer(w, x)))

    w, x = [shape(64, 64)] * 2, shape(32, 64)
    plain = analyze(jax.value_and_grad(lambda w, x: network([*w, *w], x)), w, x)
    for chip in (CPU, V5E):
        recomputed = analyze(jax.value_and_grad(loss), w, x, chip=chip)
        assert recomputed.model_flops == plain.flops
        # The backward pass repeats the four products of the forward pass.
        assert recomputed.flops == plain.flops + 4 * 2 * 32 * 64 * 64


# -- Memory ----------------------------------------------------------------------------------------

MB = 1 << 20  # Bytes of an array of 512 x 512 in float32.
SQUARE = shape(512, 512)


def test_products_are_stored_while_they_are_read():
    # x @ w is read by the second product and dead after it; the result takes a third place.
    usage = analyze(lambda x, w: (x @ w) @ w, SQUARE, SQUARE)
    assert usage.peak == 2 * MB


def test_operations_on_elements_are_fused_into_their_reader():
    # The chain before the product is stored once, and the one after it takes the product's place.
    usage = analyze(lambda x, w: jnp.tanh(jnp.exp(x * 2) + 1) @ w + 1, SQUARE, SQUARE)
    assert usage.peak == 2 * MB


def test_a_value_that_two_kernels_read_is_stored():
    def normalized(x):
        y = jnp.exp(x)
        return y / jnp.sum(y, axis=1, keepdims=True)  # The sum is one kernel, the ratio another.

    assert analyze(normalized, SQUARE).peak == pytest.approx(MB, rel=0.01)


def test_a_donated_argument_gives_its_place_to_the_result():
    def step(x, w):
        return x + w

    assert analyze(step, SQUARE, SQUARE).peak == MB
    assert analyze(step, SQUARE, SQUARE, donated=1).peak == 0


def test_the_carry_of_a_loop_has_one_place_and_its_results_are_stacked():
    def loop(x, w):
        def step(x, _):
            y = x @ w
            return jnp.tanh(y), y[0]

        return jax.lax.scan(step, x, None, length=4)

    # The carry, and in a step the product, which the next carry replaces; rows of 2 KB each.
    assert analyze(loop, SQUARE, SQUARE).peak == pytest.approx(2 * MB + 4 * 2048, abs=4096)
    # The carry takes the place of its start, which is not read again.
    late = analyze(lambda x, w: loop(x @ w, w), SQUARE, SQUARE)
    assert late.peak == pytest.approx(2 * MB + 4 * 2048, abs=4096)


@pytest.mark.parametrize("chip", [CPU, V5E], ids=["cpu", "tpu"])
def test_residuals_of_a_gradient_are_stored_unless_they_are_recomputed(chip):
    width, layers = 512, 6
    w, x = [shape(width, width)] * layers, shape(4096, width)
    activation = 4096 * width * 4

    def loss(w, x, layer):
        for kernel in w:
            x = layer(kernel, x)
        return jnp.sum(x)

    def layer(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    plain = analyze(jax.grad(lambda w, x: loss(w, x, layer)), w, x, chip=chip).peak
    saved = analyze(jax.grad(lambda w, x: loss(w, x, jax.checkpoint(layer))), w, x, chip=chip).peak
    assert plain > 2 * layers * activation
    # XLA's CPU compiler repeats the forward pass at once, which saves nothing.
    assert saved < 0.7 * plain if chip is V5E else saved == plain


def test_bfloat16_is_computed_in_float32_on_a_cpu():
    x = shape(512, 512, dtype=jnp.bfloat16)
    assert analyze(lambda x, w: (x @ w) @ w, x, x).peak == 2 * MB
    assert analyze(lambda x, w: (x @ w) @ w, x, x, chip=V5E).peak == MB


def test_tpus_store_arrays_in_tiles():
    assert padded((100, 3), 4) == (128, 8)  # In tiles of 8 x 128, with the longer dimension last.
    assert padded((7, 1000, 200), 4) == (7, 1024, 200)  # 24 more and none, not 56 and none.
    assert math.prod(padded((4, 4), 2)) == 16 * 128  # Two rows of bfloat16 share a word.
    assert padded((), 4) == (1,)


@pytest.mark.parametrize("batch", [256, 1024])
def test_the_peak_of_a_gradient_is_that_of_xla(batch):
    def loss(w, x):
        for a, b in w:
            y = x - jnp.mean(x, axis=1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=1, keepdims=True) + 1e-6)
            x = x + jax.nn.gelu(y @ a) @ b
        return jnp.mean(x**2)

    w = [(shape(128, 256), shape(256, 128))] * 3
    arguments = (w, shape(batch, 128))
    memory = compiled(jax.grad(loss), *arguments).memory_analysis()
    usage = analyze(jax.grad(loss), *arguments)
    results = 3 * 2 * 128 * 256 * 4  # The plan counts results, the compiler apart.
    theirs = memory.temp_size_in_bytes + results
    assert usage.peak == pytest.approx(theirs, rel=0.15)


# -- Splits ----------------------------------------------------------------------------------------

TENSOR, FSDP = {"fsdp": 1, "tensor": 4}, {"fsdp": 4, "tensor": 1}


def mlp(x, a, b):
    return jax.nn.relu(x @ a) @ b


def test_a_split_over_tensor_divides_the_hidden_layer_and_sums_its_output():
    arguments = shape(64, 128), shape(128, 512), shape(512, 128)
    whole = analyze(mlp, *arguments, chip=V5E)
    splits = [None, ((), ("tensor",)), (("tensor",), ())]
    part = analyze(mlp, *arguments, chip=V5E, splits=splits, mesh=TENSOR)
    assert part.flops == whole.flops / 4
    assert part.peak < whole.peak
    # A ring of 4 devices sends 2 * 3 / 4 of the output of 64 x 128.
    assert dict(part.exchanged) == {"all-reduce": 2 * 64 * 128 * 4 * 3 / 4}


def test_a_split_over_fsdp_gathers_a_matrix_for_its_product():
    arguments = shape(64, 128), shape(128, 512), shape(512, 128)
    splits = [None, (("fsdp",), ()), (("fsdp",), ())]
    part = analyze(mlp, *arguments, chip=V5E, splits=splits, mesh=FSDP)
    assert part.flops == analyze(mlp, *arguments, chip=V5E).flops
    assert dict(part.exchanged) == {"all-gather": 2 * 128 * 512 * 4 * 3 / 4}


def test_a_gradient_has_the_split_of_its_parameter():
    def step(w, x):
        gradient = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)
        return w - 0.1 * gradient

    arguments = shape(512, 512), shape(8, 512)
    splits = [(("fsdp",), ())]
    part = analyze(step, *arguments, chip=V5E, splits=splits, mesh=FSDP, donated=1)
    # A device sends three quarters of the whole gradient to get its quarter of the sum.
    assert part.exchanged["reduce-scatter"] == MB / 4 * 3
    # The gathered matrix of the forward pass, and then the quarter of the gradient.
    assert part.peak < 1.3 * MB


def test_heads_keep_the_split_of_the_matrix_that_computes_them():
    def heads(x, w):
        y = (x @ w).reshape(8, 16, 4, 32)  # [B, S, N, H]
        y = jnp.swapaxes(y, 1, 2)
        return jnp.sum(y @ jnp.swapaxes(y, 2, 3))

    arguments = shape(8 * 16, 64), shape(64, 128)
    split = analyze(heads, *arguments, splits=[None, ((), ("tensor",))], mesh=TENSOR)
    assert split.flops == analyze(heads, *arguments).flops / 4


# -- Platforms -------------------------------------------------------------------------------------


def test_attention_is_that_of_the_platform():
    batch, length, heads, size = 2, 1024, 4, 64
    x = shape(batch, length, heads, size, dtype=jnp.bfloat16)

    def attend(q, k, v):
        return attention.attend(q, k, v, Mask(causal=True))

    logits = batch * heads * length * length * 4
    cpu, tpu = (analyze(attend, x, x, x, chip=chip) for chip in (CPU, V5E))
    assert cpu.peak > logits
    assert tpu.peak < 0.3 * logits  # The kernel stores no logits.
    # Two products over all pairs of tokens; the kernel may leave out what the mask leaves out.
    flops = 2 * 2 * batch * heads * length * length * size
    assert cpu.flops == flops
    assert 0.5 * flops <= tpu.flops <= flops


def test_a_tpu_copies_images_from_which_it_gathers():
    images, index = shape(1000, 32, 32, 3, dtype=jnp.uint8), shape(8, dtype=jnp.int32)
    # Of 32 x 32 x 3 levels, one dimension of 32 is padded to 128 lanes.
    tiles = 1000 * 3 * 32 * 128
    gathered = 8 * 3 * 32 * 128
    usage = analyze(lambda x, i: x[i], images, index, chip=V5E)
    assert usage.peak == pytest.approx(tiles, abs=2 * gathered)
    assert analyze(lambda x, i: x[i], images, index).peak == 8 * 32 * 32 * 3
