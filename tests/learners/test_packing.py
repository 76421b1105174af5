"""Tests of packed completions: their layout, and equal results to padded completions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import problems
from mmrl_jax.learners import registry, token_learner
from mmrl_jax.models.lora import split
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts import packing
from mmrl_jax.rollouts.log_probs import completion_log_probs, log_probs_from_features
from tests import tiny
from tests.learners.test_token_learners import MODEL as SEEING
from tests.learners.test_token_learners import POLICY, jit, prompt_batch
from tests.rollouts.test_generate import MODEL, VOCABULARY, prompts, variables
from tests.rollouts.test_log_probs import UNTIED, shared

LENGTH = 9
# With windows of 5, which longer answers reach past; in 2 rows, and one that needs 3.
FITS = [[9, 4, 0, 4], [7, 2, 3, 6], [1, 1, 1, 1]]
OVERFLOWS = [[9, 4, 0, 4], [7, 6, 5, 4], [1, 1, 1, 1]]


def completion_mask(lengths, length=LENGTH):
    return jnp.asarray(np.arange(length) < np.asarray(lengths)[..., None])


def completions(length=LENGTH, shape=(3, 4), vocabulary=VOCABULARY):
    return jnp.asarray(np.random.default_rng(1).integers(1, vocabulary, (*shape, length)))


def test_first_fit_by_hand():
    # Falling lengths: 3 opens row 0, both 2s fill row 1, and 1 fits behind the 3.
    mask = completion_mask([[1, 2, 3, 2], [4, 0, 4, 4]], 4)
    tokens = 10 * (1 + jnp.arange(4))[:, None] + jnp.arange(4) + jnp.zeros((2, 1, 1), jnp.int32)
    rows, slots = packing.pack(tokens, mask)
    np.testing.assert_array_equal(
        rows.tokens,
        [
            [[30, 31, 32, 10], [20, 21, 40, 41], [0] * 4, [0] * 4],
            [[10, 11, 12, 13], [30, 31, 32, 33], [40, 41, 42, 43], [0] * 4],
        ],
    )
    np.testing.assert_array_equal(
        rows.segment_ids[0], [[2, 2, 2, 0], [1, 1, 3, 3], [-1] * 4, [-1] * 4]
    )
    np.testing.assert_array_equal(rows.positions[0, :2], [[0, 1, 2, 0], [0, 1, 0, 1]])
    np.testing.assert_array_equal(
        slots[0], [[3, -1, -1, -1], [4, 5, -1, -1], [0, 1, 2, -1], [6, 7, -1, -1]]
    )
    assert [int(packing.rows_used(x[None])) for x in mask] == [2, 3]
    assert int(packing.rows_used(mask)) == 3 and int(packing.rows_used(mask & False)) == 0


@functools.cache
def scored(pack_rows):
    """Returns log-probs of a model with windowed attention, and gradients of a weighted sum."""
    weight = jax.random.normal(jax.random.key(2), (2, 3, 4, LENGTH))

    def loss(variables, mask):
        found = shared(MODEL, variables, *prompts(), completions(), mask, pack_rows)
        found = jax.tree.map(lambda x: jnp.where(mask, x, 0), found)
        return jnp.sum(weight[0] * found.log_prob + weight[1] * found.entropy), found

    with jax.default_matmul_precision("highest"):
        gradient = jit(jax.grad(loss, has_aux=True))
        return gradient.lower(variables(), completion_mask(FITS)).compile()


@pytest.mark.parametrize("lengths", [FITS, OVERFLOWS], ids=["fit", "do not fit"])
def test_packed_equals_padded(lengths):
    mask = completion_mask(lengths)
    assert int(packing.rows_used(mask)) == (2 if lengths is FITS else 3)
    ours, full = (scored(rows)(variables(), mask) for rows in (2, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours[1], full[1])
    assert float(jnp.abs(ours[1].log_prob[0, 1, :4]).min()) > 0

    def near(a, b):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

    jax.tree.map(near, ours[0], full[0])


def test_values_and_pictures():
    asked = prompt_batch()
    drawn = SEEING.init(jax.random.key(1), asked.tokens, asked.mask, asked.images)
    drawn = token_learner.with_value_head(jax.random.key(2), drawn, SEEING.language.width)
    # The head is drawn near 0.
    drawn["value"] = jax.tree.map(
        lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), drawn["value"]
    )
    params, frozen = split(drawn, ".*")
    tokens = completions(3, (4, 3), SEEING.language.vocabulary)
    mask = completion_mask([[3, 2, 1], [1, 1, 1], [2, 0, 1], [0, 0, 3]], 3)

    def both(params, pack_rows):
        policy = dataclasses.replace(POLICY, pack_rows=pack_rows)
        found, value = policy.log_probs_and_values(
            params, frozen, asked, tokens, mask, temperature=0.7
        )
        return jnp.where(mask, found.log_prob, 0), jnp.where(mask, value, 0)

    def gradient(pack_rows):
        def loss(params):
            log_prob, value = both(params, pack_rows)
            return jnp.sum(log_prob * value), (log_prob, value)

        return jit(jax.grad(loss, has_aux=True))(params)

    ours, full = gradient(2), gradient(None)

    def close(a, b):
        # Some gradients are in the hundreds, where neighbors in float32 are 3e-5 apart.
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-5, 1e-6 * float(jnp.abs(b).max())))

    jax.tree.map(close, ours, full)
    assert all(float(jnp.abs(x).max()) > 0.01 for x in jax.tree.leaves(full))


def test_no_answer_reads_another_one():
    """The check uses gradients of the token embeddings, of which each completion has its own."""
    prompt = jnp.arange(1, 4)[None]
    tokens = 4 + jnp.arange(15).reshape(1, 3, 5)
    mask = completion_mask([[5, 3, 2]], 5)
    drawn = UNTIED.init(jax.random.key(0), prompt, prompt > 0)

    @jit
    def gradient(drawn, which):
        def log_prob(drawn):
            found = shared(UNTIED, drawn, prompt, prompt > 0, tokens, mask, 2)
            return jnp.sum(jnp.where(mask, found.log_prob, 0)[0, which])

        return jnp.abs(jax.grad(log_prob)(drawn)["params"]["table"]).sum(axis=1)

    # The last two share row 1. An answer's last token is not read.
    read = [[4, 5, 6, 7], [9, 10], [14]]
    for which, own in enumerate(read):
        found = np.flatnonzero(gradient(drawn, which))
        np.testing.assert_array_equal(found, [1, 2, 3, *own])


def test_the_second_pass_is_left_out_where_all_fit():
    passes = []

    @jit
    def log_probs(mask):
        prompt = gen.text_prompt(MODEL, variables(), *prompts())

        def score(features, tokens):
            jax.debug.callback(lambda: passes.append(tokens.shape[1]))
            return log_probs_from_features(MODEL, variables(), features, tokens).log_prob

        return completion_log_probs(
            MODEL, variables(), prompt, completions(), mask, score, pack_rows=2
        )

    for lengths, passed in ((FITS, 1), (OVERFLOWS, 2)):
        passes.clear()
        jax.block_until_ready(log_probs(completion_mask(lengths)))
        jax.effects_barrier()
        assert passes == [2] * passed  # Rows of each.


def test_what_learns_packs_as_the_config_says(monkeypatch):
    seen = []

    def update(state, *_, policy, **__):
        seen.append(policy.pack_rows)
        return state, {}

    monkeypatch.setitem(registry.TOKEN, "grpo", registry.TOKEN["grpo"]._replace(update=update))
    config = tiny.token_config(stages=("grpo",), last__num_completions=3, last__pack_rows=2)
    stage = problems.make(config).stage("grpo")
    jax.eval_shape(stage.update, stage.init(), stage.constants)
    assert seen == [2]
