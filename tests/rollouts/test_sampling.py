"""Tests of the repetition penalty and of the minimum length, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

from mmrl_jax.pretrained import hub as ours
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts.sampling import (
    Sampling,
    penalize_repetition,
    process_logits,
    sample_token,
    suppress_tokens,
    tokens_seen,
)
from tests import hub, processors

VOCABULARY, PROMPT, NEW = 13, 6, 5


def logits(seed=0):
    return np.random.default_rng(seed).normal(0, 2, (3, VOCABULARY)).astype(np.float32)


def sequences():
    return np.random.default_rng(1).integers(0, VOCABULARY, (3, PROMPT))


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = theirs(torch.tensor(sequences()), torch.tensor(logits()))
    seen = tokens_seen(jnp.asarray(sequences()), jnp.ones((3, PROMPT), bool), VOCABULARY)
    found = penalize_repetition(jnp.asarray(logits()), seen, penalty)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.any(found != logits()) and np.any(found == logits())


def test_padding_and_ids_without_a_row_are_not_seen():
    tokens = jnp.array([[0, 0, 4, VOCABULARY], [0, 7, 7, 1]])
    mask = jnp.array([[False, False, True, True], [True] * 4])
    seen = np.asarray(tokens_seen(tokens, mask, VOCABULARY))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[4], [0, 1, 7]]


@pytest.mark.parametrize("step", [0, 2, 3, 4])
def test_the_minimum_length_is_that_of_transformers(step):
    stop = (2, 5)
    theirs = logits_process.MinNewTokensLengthLogitsProcessor(PROMPT, 3, list(stop), device="cpu")
    ids = torch.zeros((3, PROMPT + step), dtype=torch.long)
    expected = theirs(ids, torch.tensor(logits()))
    found = suppress_tokens(jnp.asarray(logits()), stop, jnp.asarray(step) < 3)
    np.testing.assert_array_equal(found, expected)
    assert np.any(np.isinf(found)) == (step < 3)


def test_both_processors_have_the_order_of_transformers():
    """A penalty changes the logits before the temperature, and log-probs are the model's."""
    sampling = Sampling(temperature=0.5, repetition_penalty=1.7, min_new_tokens=2)
    seen = tokens_seen(jnp.asarray(sequences()), jnp.ones((3, PROMPT), bool), VOCABULARY)
    processed = process_logits(
        jnp.asarray(logits()), seen, jnp.asarray(1), sampling=sampling, stop=(4,)
    )
    theirs = logits_process.LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.7),
            logits_process.MinNewTokensLengthLogitsProcessor(PROMPT - 1, 2, 4, device="cpu"),
            logits_process.TemperatureLogitsWarper(0.5),
        ]
    )
    expected = torch.softmax(theirs(torch.tensor(sequences()), torch.tensor(logits())), -1)
    np.testing.assert_allclose(jax.nn.softmax(processed / 0.5, -1), expected, rtol=1e-5)
    later = process_logits(
        jnp.asarray(logits()), seen, jnp.asarray(2), sampling=sampling, stop=(4,)
    )
    np.testing.assert_array_equal(processed[:, 4], [-np.inf] * 3)
    assert np.all(np.isfinite(later))
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens, log_probs = jax.vmap(
        lambda key: sample_token(jnp.asarray(logits()[0]), key, sampling, processed[0])
    )(keys)
    frequency = np.bincount(tokens, minlength=VOCABULARY) / len(keys)
    np.testing.assert_allclose(frequency, expected[0], atol=0.015)
    np.testing.assert_allclose(
        log_probs, jax.nn.log_softmax(jnp.asarray(logits()[0]) / 0.5)[tokens], rtol=1e-5
    )


def test_without_them_the_logits_are_those_of_the_model():
    options = {"sampling": Sampling(), "stop": (1,)}
    assert process_logits(jnp.asarray(logits()), None, jnp.asarray(0), **options) is None


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(**processors.TEXT | {"vocab_size": 24})
    theirs = hub.save(transformers.LlamaForCausalLM(config), directory)
    return theirs, *ours.load_language_model(directory)[:2]


def complete(llama, sampling, *, stop=(), count=1, compactions=0):
    _, model, variables = llama
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 24, (2, 7)))

    @jax.jit
    def program(variables, tokens, key):
        prompt = gen.text_prompt(model, variables, tokens, jnp.ones((2, 7), bool))
        return gen.generate(
            model,
            variables,
            prompt,
            key,
            num_completions=count,
            max_new_tokens=12,
            sampling=sampling,
            stop=stop,
            compactions=compactions,
        )

    with jax.default_matmul_precision("highest"):
        return tokens, program(variables, tokens, jax.random.key(0))


def their_tokens(theirs, tokens, **options):
    with torch.inference_mode():
        return theirs.generate(
            torch.tensor(np.asarray(tokens)),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            **options,
        )[:, 7:].numpy()


def test_greedy_completions_with_a_penalty_are_those_of_transformers(llama):
    tokens, penalized = complete(llama, Sampling(0.0, repetition_penalty=1.5))
    expected = their_tokens(llama[0], tokens, repetition_penalty=1.5, eos_token_id=None)
    np.testing.assert_array_equal(penalized.tokens[:, 0], expected)
    _, plain = complete(llama, Sampling(0.0))
    assert np.any(plain.tokens != penalized.tokens)


def test_greedy_completions_of_a_minimum_length_are_those_of_transformers(llama):
    _, free = complete(llama, Sampling(0.0))
    stop = int(free.tokens[0, 0, 0])  # Without a minimum, a completion has this token alone.
    tokens, longer = complete(llama, Sampling(0.0, min_new_tokens=4), stop=(stop,))
    expected = their_tokens(llama[0], tokens, min_new_tokens=4, eos_token_id=stop)
    found = np.where(longer.mask[:, 0], longer.tokens[:, 0], 0)
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert np.all(np.sum(longer.mask, -1) > 4)
    with pytest.raises(ValueError, match="min_new_tokens=13 is above max_new_tokens=12"):
        complete(llama, Sampling(min_new_tokens=13))


def test_tokens_stay_seen_when_completions_that_ended_are_left_out(llama):
    sampling = Sampling(2.0, repetition_penalty=5.0)
    (_, expected), (_, found) = (
        complete(llama, sampling, stop=tuple(range(2, 8)), count=4, compactions=n) for n in (0, 2)
    )
    np.testing.assert_array_equal(expected.tokens, found.tokens)
    assert len(np.unique(np.sum(expected.mask, -1))) > 2


@pytest.mark.parametrize(
    "wrong",
    [{"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")}, {"min_new_tokens": -1}],
)
def test_processors_that_are_impossible_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be"):
        Sampling(**wrong)
