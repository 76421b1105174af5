"""Log-probs of given answers behind a shared prompt, against passes over prompt and answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts.log_probs import completion_log_probs, log_probs_from_features
from tests.rollouts.test_generate import MODEL, VOCABULARY, full_log_probs, prompts, run, variables

UNTIED = MODEL.clone(tied=False)


def shared(model, variables, prompt, prompt_mask, tokens, mask, pack_rows=None):
    prompt = gen.text_prompt(model, variables, prompt, prompt_mask)
    score = functools.partial(log_probs_from_features, model, variables, tile=8)
    return completion_log_probs(model, variables, prompt, tokens, mask, score, pack_rows=pack_rows)


def unshared(model, variables, prompt, present, tokens, there):
    """Computes every completion after its own copy of the prompt, with padding in between."""
    group, length = tokens.shape[1:]
    row = jnp.concatenate([jnp.repeat(prompt, group, 0), tokens.reshape(-1, length)], axis=1)
    mask = jnp.concatenate([jnp.repeat(present, group, 0), there.reshape(-1, length)], axis=1)
    log_probs = jax.nn.log_softmax(model.apply(variables, row, mask))
    # The token before the answer's first is the prompt's last one that is there.
    last = prompt.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
    before = prompt.shape[1] - 1 + jnp.arange(length)
    before = jnp.where(jnp.arange(length) == 0, jnp.repeat(last, group)[:, None], before)
    log_probs = jnp.take_along_axis(log_probs, before[..., None], axis=1)
    taken = jnp.take_along_axis(log_probs, tokens.reshape(-1, length)[..., None], axis=2)
    return taken[..., 0].reshape(tokens.shape)


def completions(group=3, length=5):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(1, VOCABULARY, (3, group, length)))
    lengths = rng.integers(1, length + 1, (3, group))
    return tokens, jnp.asarray(np.arange(length) < lengths[..., None])


@pytest.mark.parametrize("left", [True, False], ids=["padded left", "padded right"])
def test_generated_answers_have_the_log_probs_they_were_drawn_with(left):
    drawn = run(gen.Sampling(), num_completions=2, left=left)
    found = jax.jit(functools.partial(shared, MODEL))(
        variables(), *prompts(left), drawn.tokens, drawn.mask
    )
    np.testing.assert_allclose(found.log_prob, drawn.log_probs, atol=2e-5)
    np.testing.assert_allclose(found.log_prob, full_log_probs(drawn, left=left), atol=2e-5)


@pytest.mark.parametrize("left", [True, False], ids=["padded left", "padded right"])
def test_gradients_equal_those_of_prompts_that_are_not_shared(left):
    prompt, prompt_mask = prompts(left)
    tokens, mask = completions()
    weight = jax.random.normal(jax.random.key(2), tokens.shape) * mask

    def gradient(log_probs):
        def loss(variables):
            found = log_probs(MODEL, variables, prompt, prompt_mask, tokens, mask)
            return jnp.sum(weight * found)

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss))(variables())

    ours = gradient(lambda *x: shared(*x).log_prob)
    full = gradient(unshared)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(full), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_what_is_not_there_changes_nothing():
    prompt, prompt_mask = prompts()
    tokens, mask = completions()
    log_probs = jax.jit(functools.partial(shared, MODEL))
    one = log_probs(variables(), prompt, prompt_mask, tokens, mask).log_prob
    other = log_probs(
        variables(),
        jnp.where(prompt_mask, prompt, 5),
        prompt_mask,
        jnp.where(mask, tokens, 7),
        mask,
    ).log_prob
    np.testing.assert_array_equal(jnp.where(mask, one, 0), jnp.where(mask, other, 0))


def test_an_output_layer_of_its_own():
    prompt, prompt_mask = prompts()
    tokens, mask = completions()
    drawn = UNTIED.init(jax.random.key(0), prompt, prompt_mask)
    ours = jax.jit(functools.partial(shared, UNTIED))(drawn, prompt, prompt_mask, tokens, mask)
    full = unshared(UNTIED, drawn, prompt, prompt_mask, tokens, mask)
    np.testing.assert_allclose(
        jnp.where(mask, ours.log_prob, 0), jnp.where(mask, full, 0), atol=2e-5
    )
