"""Tests that blocks in a loop compute what unrolled blocks compute, and of their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.models import lora, stacked
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.masks import Mask
from mmrl_jax.models.transformer import BlockSpec, Context, Transformer
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts import log_probs as lp

UNROLLED = LanguageModel(
    vocabulary=31,
    width=24,
    layers=3,
    block=BlockSpec(heads=4, hidden=40, kv_heads=2, norm="rms", gated=True),
    ropes=(Rope(100.0, 6), Rope(1000.0, 6)),
    pattern=(0, 1, 0),  # Two kinds of layers, of which one has a window.
    windows=(None, 3),
    remat=True,
)
SCANNED = stacked.with_scan(UNROLLED, True)
LAYERS = [lora.LoraGroup(r".*/(query|mlp_out)", 2, 4.0)]


def make_variables(groups=LAYERS):
    tokens = jnp.ones((1, 2), jnp.int32)
    params = UNROLLED.init(jax.random.key(0), tokens, tokens > 0)["params"]
    drawn = {"params": params, "lora": lora.init(jax.random.key(1), params, groups)}
    leaves, structure = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def prompts():
    tokens = np.random.default_rng(0).integers(1, 31, (3, 7))
    mask = np.arange(7) >= np.array([0, 2, 4])[:, None]
    return jnp.asarray(np.where(mask, tokens, 0)), jnp.asarray(mask)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


def test_completions_and_gradients_are_those_of_unrolled_blocks():
    variables = make_variables()
    copy = jax.tree.map(jnp.copy, variables)
    stack = stacked.stack(copy, SCANNED)
    assert stack["params"]["stack"]["blocks"]["mlp_in"]["kernel"].shape == (3, 24, 40)
    tokens, mask = prompts()
    rng = np.random.default_rng(1)
    completion = jnp.asarray(rng.integers(1, 31, (3, 4, 5)))
    # Features that the first two blocks add, as with deepstack.
    added = tuple(jnp.asarray(rng.normal(size=(3, 7, 24)), jnp.float32) for _ in range(2))

    def run(variables, model):
        prompt = gen.text_prompt(model, variables, tokens, mask)._replace(added=added)
        return gen.generate(
            model,
            variables,
            prompt,
            jax.random.key(3),
            num_completions=2,
            max_new_tokens=5,
            sampling=gen.Sampling(),
        )

    def loss(variables, model):
        prompt = gen.text_prompt(model, variables, tokens, mask)._replace(added=added)
        per_token = lambda x, y: lp.log_probs_from_features(model, variables, x, y)  # noqa: E731
        out = lp.completion_log_probs(
            model, variables, prompt, completion, completion > 0, per_token, pack_rows=3
        )
        return jnp.mean(out.log_prob)

    run, grad = (jax.jit(f, static_argnums=1) for f in (run, jax.value_and_grad(loss)))
    same(run(variables, UNROLLED), run(stack, SCANNED))
    value, gradient = grad(variables, UNROLLED)
    found, in_loop = grad(stack, SCANNED)
    same(value, found)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient["lora"])) > 1e-3
    same(gradient, stacked.unstack(in_loop, SCANNED))


def test_the_program_does_not_grow_with_the_layers():
    def operations(layers, scan):
        model = stacked.with_scan(UNROLLED.clone(layers=layers, pattern=(0,) * layers), scan)
        tokens = jnp.ones((1, 2), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens > 0)
        # The compiled program, because blocks of equal shape are lowered once and called.
        lowered = jax.jit(model.apply).lower(shapes, tokens, tokens > 0)
        return lowered.compile().as_text().count("dot")

    assert operations(9, True) == operations(2, True)
    assert operations(9, False) > 4 * operations(2, False)


def test_stacking_is_undone_and_deletes_the_layers():
    variables = make_variables()
    expected = jax.tree.map(np.asarray, variables)
    stack = stacked.stack(variables, SCANNED)
    assert variables["params"]["stack"]["block_1"]["mlp_in"]["kernel"].is_deleted()
    found = stacked.unstack(stack, SCANNED)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_layers_that_differ_cannot_be_stacked():
    variables = make_variables([lora.LoraGroup(r".*block_[01]/.*/query", 2, 4.0)])
    with pytest.raises(ValueError, match=r"scan_layers=True.*block_2 differ from those of block_0"):
        stacked.stack(variables, SCANNED)


def test_a_pattern_trains_all_layers_of_a_stack_or_none():
    variables = stacked.stack(make_variables(), SCANNED)
    trained, _ = lora.split(variables, r"params/stack/block_\d+/mlp_in/kernel")
    assert [x.shape for x in jax.tree.leaves(trained)] == [(3, 24, 40)]
    with pytest.raises(ValueError, match=r"block_1/mlp_in.*not.*block_0/mlp_in.*scan_layers"):
        lora.split(variables, r"params/stack/block_1/mlp_in/kernel")


def test_some_blocks_or_tokens_cannot_be_asked_of_a_loop():
    stack = Transformer(3, UNROLLED.block, scan=True)
    with pytest.raises(ValueError, match=r"scan=True.*readouts=1"):
        jax.eval_shape(
            lambda: stack.init(jax.random.key(0), jnp.zeros((1, 2, 24)), Context(Mask()), 1)
        )
