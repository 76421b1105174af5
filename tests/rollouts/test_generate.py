"""Tests of generation: cache, groups, prompts of different lengths, sampling, stopping."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts.sampling import Sampling, apply_top_k_top_p, sample_token

VOCABULARY = 31
GREEDY = Sampling(temperature=0.0)
MODEL = LanguageModel(
    vocabulary=VOCABULARY,
    width=24,
    layers=3,
    block=BlockSpec(heads=4, hidden=40, kv_heads=2, norm="rms", gated=True, softcap=20.0),
    ropes=(Rope(100.0, 6), Rope(1000.0, 6)),
    pattern=(0, 1, 0),
    windows=(None, 5),
)


@functools.cache
def variables():
    drawn = MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    leaves, structure = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def prompts(left=True):
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (3, 7))
    mask = np.ones((3, 7), bool)
    for row, absent in enumerate((0, 2, 5)):
        mask[row, :absent] = False
    if not left:
        mask = mask[:, ::-1].copy()
    return jnp.asarray(np.where(mask, tokens, 0)), jnp.asarray(mask)


def run(sampling=GREEDY, *, num_completions=1, max_new_tokens=9, left=True, seed=0, **options):
    tokens, mask = prompts(left)

    @jax.jit
    def program(variables, tokens, mask, rng):
        prompt = gen.text_prompt(MODEL, variables, tokens, mask)
        return gen.generate(
            MODEL,
            variables,
            prompt,
            rng,
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            **options,
        )

    return program(variables(), tokens, mask, jax.random.key(seed))


@jax.jit
def full_logits(row, count):
    """Returns the logits of a sequence [16] with `count` tokens, by a full pass."""
    return MODEL.apply(variables(), row[None], (jnp.arange(16) < count)[None])[0]


def next_logits(tokens):
    """Returns the logits after every token, float32 [len(tokens), V]."""
    row = np.pad(tokens, (0, 16 - len(tokens)))
    return np.asarray(full_logits(jnp.asarray(row), len(tokens)))[: len(tokens)]


def full_log_probs(generated, temperature=1.0, left=True):
    """Of the generated tokens, by a full pass over prompt and answer without padding between."""
    tokens, mask = (np.asarray(x) for x in prompts(left))
    result = np.zeros(generated.tokens.shape)
    for b, g in np.ndindex(generated.tokens.shape[:2]):
        prompt = tokens[b][mask[b]]
        row = np.concatenate([prompt, generated.tokens[b, g]])
        log_probs = np.asarray(jax.nn.log_softmax(next_logits(row) / temperature))
        at = np.arange(len(prompt) - 1, len(row) - 1)
        result[b, g] = log_probs[at, row[at + 1]]
    return result


@pytest.mark.parametrize("left", [True, False], ids=["padded left", "padded right"])
def test_prefill_and_decode_equal_the_full_pass(left):
    generated = run(num_completions=2, left=left)
    np.testing.assert_allclose(generated.log_probs, full_log_probs(generated, left=left), atol=2e-5)


def test_a_shared_prefix_equals_one_of_its_own():
    sampling = Sampling(temperature=0.7)
    shared = run(sampling, num_completions=3)
    tokens, mask = (jnp.repeat(x, 3, axis=0) for x in prompts())
    prompt = gen.text_prompt(MODEL, variables(), tokens, mask)
    alone = gen.generate(
        MODEL,
        variables(),
        prompt,
        jax.random.key(0),
        num_completions=1,
        max_new_tokens=9,
        sampling=sampling,
    )
    np.testing.assert_array_equal(shared.tokens.reshape(9, 9), alone.tokens.reshape(9, 9))
    np.testing.assert_allclose(
        shared.log_probs.reshape(9, 9), alone.log_probs.reshape(9, 9), atol=2e-5
    )
    assert len({tuple(row) for row in np.asarray(shared.tokens[0])}) == 3


def test_greedy_takes_the_most_likely_token():
    generated = run(max_new_tokens=4)
    tokens, mask = (np.asarray(x) for x in prompts())
    for b in range(3):
        row = tokens[b][mask[b]]
        for t in range(4):
            assert np.argmax(next_logits(row)[-1]) == generated.tokens[b, 0, t]
            row = np.append(row, generated.tokens[b, 0, t])


def test_log_probs_are_those_of_the_tempered_distribution():
    generated = run(Sampling(temperature=0.5, top_k=3), num_completions=2)
    np.testing.assert_allclose(
        generated.log_probs, full_log_probs(generated, temperature=0.5), atol=5e-5
    )


def test_a_stop_token_ends_its_answer_alone():
    free = run(Sampling(), num_completions=4, max_new_tokens=12)
    stop = int(free.tokens[0, 0, 3])
    stopped = run(Sampling(), num_completions=4, max_new_tokens=12, stop=(stop,))
    tokens, mask = np.asarray(stopped.tokens), np.asarray(stopped.mask)
    lengths = mask.sum(axis=-1)
    for b, g in np.ndindex(tokens.shape[:2]):
        n = lengths[b, g]
        np.testing.assert_array_equal(tokens[b, g, :n], free.tokens[b, g, :n])
        assert not np.any(tokens[b, g, : n - 1] == stop)
        assert n == 12 or tokens[b, g, n - 1] == stop
        assert np.all(tokens[b, g, n:] == 0) and np.all(stopped.log_probs[b, g, n:] == 0)
        assert np.all(mask[b, g, :n])
    assert 4 >= lengths[0, 0] and lengths.max() > lengths[0, 0]
    last = np.take_along_axis(tokens, lengths[..., None] - 1, axis=-1)[..., 0]
    np.testing.assert_array_equal(stopped.finished, last == stop)
    assert stopped.finished.any() and not stopped.finished.all() and not free.finished.any()


@pytest.mark.parametrize("stop", [(), tuple(range(2, 12))], ids=["none ends", "most end early"])
def test_leaving_out_what_has_ended_changes_nothing(stop):
    """Of eight completions, four and then two are computed once the others have ended."""
    options = {"num_completions": 8, "max_new_tokens": 12, "stop": stop}
    expected, found = (run(Sampling(), **options, compactions=n) for n in (0, 2))
    lengths = np.sum(expected.mask, axis=-1)
    assert np.all(lengths == 12) if not stop else len(np.unique(lengths)) > 3
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(expected, name), getattr(found, name), name)
    np.testing.assert_allclose(expected.log_probs, found.log_probs, atol=2e-5)


def test_the_number_of_completions_must_halve():
    with pytest.raises(ValueError, match=r"=6 is not divisible by 2\*\*compactions=4"):
        run(num_completions=6, compactions=2)


def test_each_of_several_stop_tokens_ends_an_answer():
    free = run(Sampling(), num_completions=4, max_new_tokens=12)
    stops = tuple(int(free.tokens[0, g, 3]) for g in (0, 1))
    stopped = run(Sampling(), num_completions=4, max_new_tokens=12, stop=stops)
    is_stop = np.isin(free.tokens, stops)
    lengths = np.where(is_stop.any(-1), is_stop.argmax(-1) + 1, 12)
    np.testing.assert_array_equal(np.asarray(stopped.mask).sum(-1), lengths)
    np.testing.assert_array_equal(stopped.finished, is_stop.any(-1))
    assert stops[0] != stops[1] and stopped.finished[0, 0] and stopped.finished[0, 1]


def test_generation_ends_when_all_answers_have():
    # All steps would take a minute.
    program = functools.partial(run, max_new_tokens=20_000, stop=tuple(range(VOCABULARY)))
    program()
    begin = time.perf_counter()
    assert np.asarray(program().mask).sum() == 3
    assert time.perf_counter() - begin < 5


LOG_PROBS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), 5),
        (Sampling(top_k=2), 2),
        (Sampling(top_k=9), 5),
        (Sampling(top_p=0.69), 2),  # 0.4 + 0.3 >= 0.69
        (Sampling(top_p=0.71), 3),
        (Sampling(top_p=1e-6), 1),
        (Sampling(min_p=0.3), 3),  # At least 0.12.
        (Sampling(min_p=1.0), 1),
        (Sampling(top_k=4, min_p=0.3), 3),
    ],
)
def test_which_tokens_are_kept(sampling, kept):
    order = np.array([3, 0, 4, 1, 2])
    likely = np.asarray(apply_top_k_top_p(jnp.asarray(LOG_PROBS[order]), sampling))
    np.testing.assert_array_equal(np.isfinite(likely), order < kept)
    np.testing.assert_array_equal(likely[order < kept], LOG_PROBS[order][order < kept])


def test_tokens_are_drawn_with_their_probabilities():
    keys = jax.random.split(jax.random.key(0), 20_000)
    sampling = Sampling(temperature=2.0, top_k=3)
    tokens, log_probs = jax.vmap(lambda k: sample_token(jnp.asarray(LOG_PROBS), k, sampling))(keys)
    tempered = np.sqrt(np.exp(LOG_PROBS))
    np.testing.assert_allclose(log_probs, np.log(tempered / tempered.sum())[tokens], rtol=1e-5)
    wanted = tempered[:3] / tempered[:3].sum()
    seen = np.bincount(tokens, minlength=5) / len(tokens)
    np.testing.assert_allclose(seen, [*wanted, 0, 0], atol=0.015)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}]
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be"):
        Sampling(**wrong)
