"""Runs of token policies: configs, resuming, what is refused, and what is logged."""

import json

import jax
import numpy as np
import pytest

from experiments import train as train_script
from experiments.train import train
from mmrl_jax.training import metrics, token_factory
from tests import tiny


def bitwise_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("name", tiny.TOKENS)
def test_every_config_trains(name, tmp_path):
    config = tiny.token_config(name)
    trained = train(config, tmp_path)
    assert [result.updates for result in trained.results] == [4] * len(trained.results)
    assert len(trained.results) == (2 if config.algorithm == "grpo" else 1)
    last = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert np.isfinite(last["loss/total"]) and 0 <= last["eval/train/accuracy"] <= 1
    assert last["eval/train/accuracy_lo"] <= last["eval/train/accuracy_hi"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final/train/accuracy"] == last["eval/train/accuracy"]
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    if config.algorithm == "grpo":
        assert 1 <= last["answer/length"] <= 2 and -0.5 <= last["answer/reward"] <= 1


def test_a_stopped_run_goes_on_to_bitwise_the_same(tmp_path):
    whole = train(tiny.token_config(), tmp_path / "whole")
    train(tiny.token_config(run__updates=2), tmp_path / "parts")
    parts = train(tiny.token_config(), tmp_path / "parts")
    assert parts.tuned.updates == 4
    bitwise_equal(whole.tuned.carry, parts.tuned.carry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "ppo"}, "'algorithm' is 'ppo'"),
        ({"grpo__preset": "grop"}, "'grpo.preset' is 'grop'"),
        ({"grpo__questions": 6, "grpo__minibatches": 4}, "does not divide grpo.questions=6"),
        ({"grpo__group": 1}, "'grpo.group' is 1"),
        ({"model__patch": 7}, "model.patch=7"),
        ({"model__heads": 16}, "model.heads=16"),
        ({"sft__counts": (1, 5)}, r"sft.counts=\(1, 5\)"),
        ({"sft__counts": (1,)}, r"sft.counts=\(1,\)"),
        ({"task__kinds": ("counts",)}, "kinds has 'counts'"),
        ({"task__rows": 4}, "do not divide into 4x4 cells"),
        ({"task__distractors": 9}, "rows=2 has 4 places"),
        ({"devices": 99}, "devices=99"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        token_factory.check(tiny.token_config(**changes))


def test_grpo_from_scratch_has_a_reference_too(tmp_path):
    trained = train(tiny.token_config(sft__updates=0, run__updates=1), tmp_path)
    assert trained.warm_start is None and trained.tuned.updates == 1
    assert "policy/reference_kl" in metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]


def test_sft_alone_needs_updates():
    with pytest.raises(ValueError, match="sft.updates=0, but algorithm='sft'"):
        token_factory.check(tiny.token_config("count_sft", sft__updates=0))


def test_both_kinds_of_policies_are_told_apart():
    assert train_script.answers_questions(tiny.token_config())
    assert not train_script.answers_questions(tiny.config())


def test_pictures_are_swapped_when_asked_for():
    config = tiny.token_config()
    evaluator = token_factory.make_evaluator(config, jax.random.key(0), questions=8)
    made_of = token_factory.halves(token_factory.make_variables(config), config, "grpo")
    seen = []

    def answer(_, question, rng):
        seen.append(question.images)
        return np.zeros((8, 1, 2), np.int32), np.zeros((8, 1, 2), bool)

    evaluator._answer, evaluator._run = answer, evaluator._evaluate
    evaluator(made_of, "train"), evaluator(made_of, "train", swapped=True)
    np.testing.assert_array_equal(seen[1], np.roll(seen[0], 1, axis=0))
    assert np.abs(seen[0].astype(int) - seen[1]).max() > 0
