"""Tests of mmrl_jax.models.transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.models.attention import attention
from mmrl_jax.models.masks import Mask
from mmrl_jax.models.transformer import (
    Block,
    BlockSpec,
    Context,
    Dense,
    Transformer,
    layer_norm,
)

# Compiled quickly: nothing here runs for long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

BATCH, LENGTH, WIDTH = 2, 5, 8


def tokens(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, WIDTH))


def some_mask():
    mask = np.random.default_rng(0).random((BATCH, LENGTH, LENGTH)) < 0.6
    return jnp.asarray(mask | np.eye(LENGTH, dtype=bool))


def context(mask):
    return Context(Mask(explicit=mask))


def stack(heads=2, **changes):
    return Transformer(**{"layers": 2, "block": BlockSpec(heads, 2 * WIDTH)} | changes)


def initialized(model, mask):
    return jit(model.init)(jax.random.key(0), tokens(), context(mask))


def test_dense_is_a_product_over_the_last_axis():
    layer = Dense(3, jnp.float32)
    x = jnp.arange(24.0).reshape(2, 3, 4)
    params = {"params": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.array([1.0, 0, -1])}}
    expected = np.arange(24.0).reshape(2, 3, 4) @ np.arange(12.0).reshape(4, 3) + [1, 0, -1]
    np.testing.assert_array_equal(layer.apply(params, x), expected)


def test_attention_by_hand():
    # One head of size 1, two keys. Scores 0 and log 3 weigh the values 1/4 and 3/4: 4 and 8 make 7.
    key, value = jnp.log(jnp.array([1.0, 3.0])), jnp.array([4.0, 8.0])
    query = jnp.ones((1, 1, 1, 1))
    key, value = key.reshape(1, 2, 1, 1), value.reshape(1, 2, 1, 1)
    out = attention(query, key, value, jnp.array([[[True, True]]]))
    np.testing.assert_allclose(out.ravel(), [7.0], rtol=1e-6)
    # With the second key masked, the first value; with both, their mean.
    out = attention(query, key, value, jnp.array([[[True, False]]]))
    np.testing.assert_array_equal(out.ravel(), [4.0])
    out = attention(query, key, value, jnp.array([[[False, False]]]))
    np.testing.assert_allclose(out.ravel(), [6.0], rtol=1e-6)


def test_attention_equals_jax():
    shape = (BATCH, LENGTH, 2, 4)
    query, key, value = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    expected = jax.nn.dot_product_attention(query, key, value, mask=some_mask()[:, None])
    np.testing.assert_allclose(
        attention(query, key, value, some_mask()), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("readouts", [1, 2, LENGTH])
@pytest.mark.parametrize("layers", [1, 3])
def test_readouts_are_the_last_tokens_of_the_whole_stack(readouts, layers):
    model = stack(layers=layers)
    params = initialized(model, some_mask())
    run = jit(model.apply, static_argnames="readouts")
    whole = run(params, tokens(), context(some_mask()))
    last = run(params, tokens(), context(some_mask()), readouts=readouts)
    assert last.shape == (BATCH, readouts, WIDTH)
    np.testing.assert_allclose(last, whole[:, -readouts:], rtol=1e-5, atol=1e-6)


def test_spans_one_after_the_other_are_the_whole_stack():
    mask = some_mask()
    model = stack(layers=3)
    params = initialized(model, mask)
    whole = jit(model.apply)(params, tokens(), context(mask))
    run = jit(model.apply, static_argnames="span")
    first = run(params, tokens(), context(mask), span=range(1))
    both = run(params, first, context(mask), span=range(1, 3))
    np.testing.assert_allclose(both, whole, rtol=1e-5, atol=1e-6)
    # No norm comes between: one block alone without a final norm is the same.
    alone = jit(stack(layers=3, final_norm=False).apply, static_argnames="span")
    np.testing.assert_array_equal(first, alone(params, tokens(), context(mask), span=range(1)))


def test_only_readouts_change_in_cross_attention():
    params, mask = initialized(stack(), some_mask()), some_mask()
    # Two blocks, written out: what is read stays as it was, whatever a block made of it.
    x = tokens()
    for i in range(2):
        block = Block(stack().block)
        y = block.apply({"params": params["params"][f"block_{i}"]}, x, context(mask), 2)
        x = jnp.concatenate([x[:, :-2], y], axis=1)
    ours = stack().apply(params, tokens(), context(mask), readouts=2, only_readouts=True)
    np.testing.assert_allclose(ours, layer_norm(x[:, -2:]), rtol=1e-5, atol=1e-5)
    joint = stack().apply(params, tokens(), context(mask), readouts=2)
    assert np.abs(ours - joint).max() > 0.01


@pytest.mark.parametrize("readouts", [None, 2])
def test_remat_changes_no_gradient(readouts):
    def gradients(remat):
        model = stack(remat=remat)
        params = initialized(stack(), some_mask())
        weight = jax.random.normal(jax.random.key(1), (WIDTH,))

        def loss(params):
            return jnp.sum(
                model.apply(params, tokens(), context(some_mask()), readouts=readouts) @ weight
            )

        return jit(jax.grad(loss))(params)

    plain, rematerialized = gradients(False), gradients(True)
    assert any(np.abs(g).max() > 0.01 for g in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, rematerialized
    )


def test_bfloat16_keeps_float32_parameters_and_is_near_float32():
    model = stack(dtype=jnp.bfloat16)
    params = initialized(model, some_mask())
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half = jit(model.apply)(params, tokens(), context(some_mask()))
    full = jit(stack().apply)(params, tokens(), context(some_mask()))
    assert half.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.004 relative; outputs of the last norm are of size 1.
    np.testing.assert_allclose(half, full, atol=0.06)
    assert np.abs(half - full).max() > 1e-6  # It did compute in bfloat16.
    total = jax.grad(
        lambda params: model.apply(params, tokens(), context(some_mask()))[..., 0].sum()
    )
    gradients = jax.eval_shape(total, params)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_a_token_depends_on_what_its_mask_allows_and_on_nothing_else():
    # Token q reads tokens up to q: what reaches it through two layers is the same set.
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None]
    model = stack()
    params = initialized(model, mask)
    weight = jax.random.normal(jax.random.key(1), (WIDTH,))
    jacobian = jit(jax.jacrev(lambda x: model.apply(params, x, context(mask))[0] @ weight))(
        tokens()
    )[:, 0]
    np.testing.assert_array_equal(np.abs(jacobian).max(-1) > 0, mask[0])


def test_rows_that_may_read_nothing_are_finite():
    model = stack()
    mask = jnp.zeros((BATCH, LENGTH, LENGTH), bool)
    params = initialized(model, mask)

    def loss(params, x):
        return jnp.sum(model.apply(params, x, context(mask)) ** 3)

    value, gradients = jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, tokens())
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width=8 is not divisible by heads=3"):
        initialized(stack(heads=3), some_mask())
