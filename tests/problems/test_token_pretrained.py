"""Tests of token policies with a pretrained decoder: trained and frozen parameters, texts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.models import lora
from mmrl_jax.monitoring import metrics
from mmrl_jax.pretrained import bundled_weights, chat
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.tasks.prompts import ABSENT, Score, Texts
from mmrl_jax.training import loop
from tests import processors, tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return processors.save_decoder(tmp_path_factory.mktemp("llama"))


def make_config(directory, **changes):
    changes = {
        "last__num_minibatches": 1,
        "last__num_completions": 4,
        "last__optimizer__learning_rate": 1e-2,
    } | changes
    changes = {"model__checkpoint": str(directory)} | changes
    return tiny.token_config("smollm2_vqa_grpo", **changes)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dinov2")
    processors.save_dinov2(directory)
    return directory


def prefers_even_tokens(self, prompts, tokens, mask, *, penalty):
    """A reward that random completions can get, because a random decoder is never correct."""
    reward = (tokens[..., 0] % 2 == 0).astype(jnp.float32)
    return Score(reward, reward, 1 - reward)


@pytest.fixture(scope="module", autouse=True)
def even_tokens_are_rewarded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Texts, "score", prefers_even_tokens)
        yield


@pytest.fixture(scope="module")
def run(directory, tmp_path_factory):
    """Returns a run of both stages and its directory."""
    workdir = tmp_path_factory.mktemp("run")
    return mmrl_jax.train(make_config(directory), workdir), workdir


@pytest.fixture(scope="module")
def aligned(run):
    """Returns the variables after fine-tuning from its checkpoint."""
    loaded = mmrl_jax.load(run[1] / "sft")
    assert (loaded.stage, loaded.step) == ("sft", 4)
    return loaded.variables


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def bitwise_equal(a, b):
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_each_stage_moves_what_it_trains_and_nothing_else(run, aligned):
    trained, _ = run
    assert [result.updates for result in trained.results.values()] == [4, 4]
    before = by_path(trained.problem.initial_variables())
    aligned = by_path(trained.problem.partition(aligned, "sft")[0])
    tuned = by_path(trained.last.carry.learner.params)
    assert aligned.keys() == {path for path in before if path.startswith("params/vision/")}
    assert tuned.keys() == {path for path in before if path.startswith("lora/")}
    assert all(np.any(x != before[path]) for path, x in (aligned | tuned).items())


def test_frozen_are_the_aligned_eyes_and_the_language_model_on_disk(run, aligned, directory):
    trained, _ = run
    stage = trained.problem.stage("grpo", start=aligned)
    carry, shardings = loop.start(stage)
    carry, _ = loop.make_dispatch(stage.update, 1, shardings)(carry, stage.constants)
    assert carry.learner.steps == 1
    read = {"params": {"language": ours.load_language_model(directory).params["params"]}}
    learned = trained.problem.partition(aligned, "sft")[0]
    bitwise_equal(by_path(stage.constants.frozen), by_path(read) | by_path(learned))


def test_a_pretrained_tower_stays_frozen_and_its_projector_is_aligned(directory, tower, tmp_path):
    changes = {"model__vision_encoder": str(tower), "model__vision_size": 16}
    config = make_config(directory, model__frozen_dtype="bfloat16", **changes)
    config.task.height = config.task.width = 18  # No patch of our own encoder divides it.
    trained = mmrl_jax.train(config, tmp_path)
    problem = trained.problem
    assert problem.task.texts.prompt_tokens.shape[1] > 4
    image = problem.task.texts.tokenizer.image
    assert set(np.sum(problem.task.texts.prompt_tokens == image, axis=1)) == {4}
    before, after = by_path(problem.initial_variables()), by_path(trained.variables)
    read = ours.load_vision_tower(tower).params["params"]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), read)
    expected = by_path({"params": {"vision_encoder": {"tower": rounded}}})
    bitwise_equal(expected, {p: x for p, x in after.items() if p in expected})
    moved = {path.rpartition("/")[0] for path, x in after.items() if np.any(x != before[path])}
    assert {path for path in moved if path.startswith("params/")} == {
        "params/vision/projector/out",
        "params/vision/projector/project",
    }
    bitwise_equal(by_path(mmrl_jax.load(tmp_path).variables), after)
    # A run goes on only with the tower that it began with.
    processors.hub.save(
        transformers.Dinov2Model(transformers.Dinov2Config.from_pretrained(tower)), tower, seed=1
    )
    with pytest.raises(ValueError, match="vision_encoder: the tensors in the directory of model.v"):
        mmrl_jax.train(config, tmp_path)


def test_policy_and_reference_are_one_where_grpo_begins(run):
    _, workdir = run
    _, *rows = metrics.read_jsonl(workdir / metrics.JSONL_NAME)
    kl = [row["policy/reference_kl"] for row in rows]
    assert abs(kl[0]) < 1e-6 < 1e-4 < kl[-1]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_bitwise_the_same(run, directory, tmp_path):
    whole, _ = run
    half = mmrl_jax.train(make_config(directory, last__num_updates=2), tmp_path)
    assert half.last.updates == 2
    parts = mmrl_jax.train(make_config(directory), tmp_path)
    bitwise_equal(by_path(whole.last.carry), by_path(parts.last.carry))


def test_the_texts_are_those_of_the_chat_template(directory):
    image = 400
    said = chat.read_chat(directory, image)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    turn = [{"role": "user", "content": "<image><image>how many red circles ?"}]
    expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    mark = tokenizer.convert_tokens_to_ids("<image>")
    found = said.encode_prompt("how many red circles ?", images=2)
    assert found == [image if token == mark else token for token in expected]
    ended = tokenizer("two</s>", add_special_tokens=False)["input_ids"]
    assert said.encode_completion("two") == ended and len(ended) == 4


def test_an_answer_is_the_models_own_tokens_and_no_others(directory):
    texts = problems.make(make_config(directory)).task.texts
    tokens = texts.answer_tokens
    found = texts.parse(np.asarray(tokens), np.asarray(tokens != ABSENT))
    np.testing.assert_array_equal(found, np.arange(len(tokens)))
    tokens = np.where(tokens == tokens[:, :1], tokens + 1, tokens)
    assert np.all(texts.parse(tokens, np.asarray(tokens >= 0)) == ABSENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sft__trainable": "params/visionn/.*"},
            "sft.trainable='params/visionn/.*': 'params/visionn/.*' matches no leaf",
        ),
        ({"last__trainable": "lora"}, "grpo.trainable='lora': 'lora' matches no leaf"),
        ({"model__lora__pattern": None}, "grpo.trainable='lora/.*': 'lora/.*' matches no leaf"),
        ({"model__lora__pattern": "stack/.*"}, "model.lora.pattern: 'stack/.*' matches no Dense"),
        (
            {"model__checkpoint": "nowhere"},
            "model.checkpoint='nowhere': There is no directory 'nowhere'",
        ),
        (
            {"model__frozen_dtype": "int8", "sft__trainable": ".*"},
            "model.frozen_dtype='int8', but the stages train all pretrained parameters",
        ),
        ({"mesh__tensor": 3}, "mesh.tensor=3 does not divide the 2 attention heads"),
        ({"model__vision_size": 16}, "model.vision_size=16, but model.vision_encoder=None"),
        (
            {"model__vision_encoder": "nowhere"},
            "model.vision_encoder='nowhere': nowhere has no config.json",
        ),
    ],
)
def test_what_cannot_run_is_refused(changes, message, directory):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        problems.make(make_config(directory, **changes))


def test_a_model_that_was_not_trained_to_chat_is_refused(directory, tmp_path):
    processors.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat_template"):
        chat.read_chat(tmp_path, 400)


def test_without_its_packages_smollm2_says_what_to_install(monkeypatch, directory):
    def absent():
        raise ImportError("no weights")

    monkeypatch.setattr(bundled_weights, "smollm2", absent)
    with pytest.raises(ValueError, match="model.checkpoint='smollm2'"):
        problems.make(make_config("smollm2"))


@pytest.mark.slow
def test_the_real_smollm2_trains(tmp_path):
    config = make_config(
        "smollm2", last__num_completions=8, sft__num_updates=2, last__num_updates=1
    )
    config.task.kinds = ("count", "exists", "relation")
    trained = mmrl_jax.train(config, tmp_path)
    last = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert [result.updates for result in trained.results.values()] == [2, 1]
    assert last["optimizer/skipped_steps"] == 0 and abs(last["policy/reference_kl"]) < 1e-5
    assert lora.adapters(trained.last.carry.learner.params["lora"])


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_what_no_stage_trains_is_stored_in_few_bits(dtype, directory, tmp_path):
    plain = problems.make(make_config(directory))
    small = problems.make(make_config(directory, model__frozen_dtype=dtype))
    before, after = plain.initial_variables(), small.initial_variables()
    flat = by_path(after)
    kernels = {path for path in flat if re.search(r"language/stack/.*/kernel$", path)}
    # Both stages train our own encoder of patches or the adapters: these stay as they are.
    stays = {path for path in flat if not path.startswith("params/language/")}
    assert len(kernels) == 7 and len(stays) > 10
    for path, x in flat.items():
        wanted = "float32" if path in stays or path.endswith("_scale") else "bfloat16"
        assert str(x.dtype) == (dtype if path in kernels else wanted), path
    # bfloat16 keeps 8 bits of a number, and int8 is off by 1 / 254 of the largest of a column.
    largest = np.abs(by_path(before)["params/language/table"]).max()
    difference = flat["params/language/table"].astype(np.float32)
    difference = np.abs(difference - by_path(before)["params/language/table"]).max()
    assert 0 < difference <= largest / 2**8

    def log_probs(problem, variables):
        prompt = problem.task.sample(jax.random.key(0), 4, "train")
        tokens = jnp.full((4, 1, 2), 5, jnp.int32)
        found = problem.model.policy.log_probs(
            *lora.split(variables, ".*"), prompt, tokens, tokens > 0, temperature=1.0
        )
        return np.asarray(found.log_prob)

    difference = log_probs(small, after) - log_probs(plain, before)
    assert 0 < np.abs(difference).max() < 0.05

    trained = mmrl_jax.train(small.config, tmp_path)
    assert trained.last.updates == 4
    bitwise_equal(by_path(mmrl_jax.load(tmp_path).variables), by_path(trained.variables))
