"""Runs of token policies: configs, resuming, what is refused, and what is logged."""

import json

import jax
import numpy as np
import pytest

from experiments import study
from experiments import train as train_script
from experiments.evaluate import evaluate
from experiments.train import train
from mmrl_jax.training import agent_factory, factory, metrics, question_factory, token_models
from tests import live_arrays, tiny


def bitwise_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in tiny.TOKENS),
        # The other learners are trained on folders too, in less time.
        *(
            pytest.param("count_grpo", changes, marks=pytest.mark.slow)
            for changes in (
                {"algorithm": "dpo", "rl__reference_decay": 0.9},
                {"algorithm": "token_ppo", "rl__group": 1},
                {
                    "grpo__pass_at_k": 2,
                    "rl__oversample": 2,
                    "rl__max_correction": 2.0,
                    "rl__pack_rows": 1,
                },
            )
        ),
    ],
)
def test_every_config_trains(name, changes, tmp_path):
    config = tiny.token_config(name, **changes)
    trained = train(config, tmp_path)
    assert [result.updates for result in trained.results] == [4] * len(trained.results)
    assert len(trained.results) == (1 if config.algorithm == "sft" else 2)
    last = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert np.isfinite(last["loss/total"]) and 0 <= last["eval/train/accuracy"] <= 1
    assert last["eval/train/accuracy_lo"] <= last["eval/train/accuracy_hi"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final/train/accuracy"] == last["eval/train/accuracy"]
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    page = (tmp_path / "samples.html").read_text()
    assert page.count("<img ") == 24 and page.count("how many") + page.count("count the") == 24
    if config.algorithm != "sft":
        assert 1 <= last["completion/length"] <= 2 and -0.5 <= last["completion/reward"] <= 1


def test_a_stopped_run_goes_on_to_bitwise_the_same(tmp_path):
    whole = train(tiny.token_config(), tmp_path / "whole")
    with live_arrays.shares_of_runs() as shares:
        train(tiny.token_config(run__updates=2), tmp_path / "parts")
        parts = train(tiny.token_config(), tmp_path / "parts")
    # Parameters, Adam's two moments and the reference, on each stage and on resume: no dead copy.
    assert {name for name, _ in shares} == {"sft", "dapo"}
    assert max(share for _, share in shares) <= 1.1, shares
    assert parts.tuned.updates == 4
    bitwise_equal(whole.tuned.carry, parts.tuned.carry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "ppo"}, "'algorithm' is 'ppo'"),
        ({"grpo__preset": "grop"}, "'grpo.preset' is 'grop'"),
        ({"rl__questions": 6, "rl__minibatches": 4}, "does not divide rl.questions=6"),
        ({"rl__group": 1}, "rl.group=1, but algorithm='grpo'"),
        ({"rl__group": 2, "grpo__pass_at_k": 3}, "grpo.pass_at_k=3 is above rl.group=2"),
        ({"rl__group": 4, "rl__pack_rows": 4}, "rl.pack_rows=4.*'grpo' learns from 4 answers"),
        ({"algorithm": "token_ppo", "rl__pack_rows": 2}, "'token_ppo' learns from 2 answers"),
        ({"rl__reference_decay": 1.5}, "'rl.reference_decay' is 1.5"),
        ({"model__patch": 7}, "model.patch=7"),
        ({"model__heads": 16}, "model.heads=16"),
        ({"sft__counts": (1, 5)}, r"sft.counts=\(1, 5\)"),
        ({"sft__counts": (1,)}, r"sft.counts=\(1,\)"),
        (
            {"sft__counts": (1, 1), "task__kinds": ("compare",), "task__distractors": 0},
            r"sft.counts=\(1, 1\) cannot be: .* a single count",
        ),
        ({"task__kinds": ("counts",)}, "kinds has 'counts'"),
        ({"task__rows": 4}, "must be at least 24 with rows=4"),
        ({"task__levels": ("hard", "harder")}, "levels has 'harder', which is none of"),
        ({"task__levels": ()}, r"levels=\(\) must be some of"),
        ({"task__distractors": 9}, "rows=2 has 4 places"),
        ({"algorithm": "token_ppo", "rl__group": 4, "devices": 8}, "divide rl.questions = 4"),
        ({"devices": 99}, "devices=99"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        question_factory.check(tiny.token_config(**changes))


def test_grpo_from_scratch_has_a_reference_too(tmp_path):
    trained = train(tiny.token_config(sft__updates=0, run__updates=1), tmp_path)
    assert trained.warm_start is None and trained.tuned.updates == 1
    assert "policy/reference_kl" in metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]


def test_sft_alone_needs_updates():
    with pytest.raises(ValueError, match="sft.updates=0, but algorithm='sft'"):
        question_factory.check(tiny.token_config("count_sft", sft__updates=0))


def test_kinds_of_policies_are_told_apart():
    assert train_script.factory_of(tiny.token_config()) is question_factory
    assert train_script.factory_of(tiny.token_config(algorithm="token_ppo")) is question_factory
    assert train_script.factory_of(tiny.agent_config()) is agent_factory
    assert train_script.factory_of(tiny.config()) is factory


@pytest.mark.parametrize("name", tiny.AGENTS)
def test_an_agent_trains_and_goes_on_where_it_was_stopped(name, tmp_path):
    whole = train(tiny.agent_config(name), tmp_path / "whole")
    assert [result.updates for result in whole.results] == [4, 4]
    last = metrics.read_jsonl(tmp_path / "whole" / metrics.JSONL_NAME)[-1]
    assert np.isfinite(last["loss/total"]) and 0 <= last["completion/invalid_fraction"] <= 1
    assert 0 <= last["eval/train/success"] <= 1
    assert "final/train/success" in json.loads((tmp_path / "whole/summary.json").read_text())
    with live_arrays.shares_of_runs() as shares:
        train(tiny.agent_config(name, run__updates=2), tmp_path / "parts")
        parts = train(tiny.agent_config(name), tmp_path / "parts")
    assert len({stage for stage, _ in shares}) == 2
    assert max(share for _, share in shares) <= 1.1, shares
    bitwise_equal(whole.tuned.carry, parts.tuned.carry)


def test_a_study_measures_agents_on_every_split(tmp_path):
    config = tiny.agent_config(algorithm="sft")
    found = study.run_one(config, 1, tmp_path)
    splits = ("train", "heldout_pair", "heldout_layout")
    assert {f"final/{split}/success" for split in splits} <= found.keys()
    table = evaluate(tmp_path, which="latest", split="all", episodes=4)
    for split in splits:
        assert table[f"{split}/success"] == found[f"final/{split}/success"]


def test_a_stage_is_evaluated_from_its_checkpoint(tmp_path):
    config = tiny.token_config(run__eval_episodes=16, task__levels=("easy", "hard"))
    trained = train(config, tmp_path)
    logged = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert {"eval/train/easy/accuracy", "eval/train/hard/accuracy_lo"} <= logged.keys()
    # Beside RL no copy of what fine-tuning learned is kept: alone it learns the same.
    config.algorithm = "sft"
    alone = train(config, tmp_path / "alone")
    measure = question_factory.make_measure(config, episodes=16)
    for place, which in ((tmp_path, trained), (tmp_path / "sft", alone)):
        table = evaluate(place, which="latest", split="train", episodes=16)
        expected = measure((which.results[-1].carry.learner.params, which.frozen), "train")
        assert table["train/accuracy"] == expected["accuracy"]
        assert table["train/blind_accuracy"] == expected["blind_accuracy"]
        assert table["train/hard/accuracy"] == expected["hard/accuracy"]
        assert not {"medium/accuracy", "train/medium/accuracy"} & (expected.keys() | table.keys())


def test_no_pair_is_held_out_of_questions_that_name_none():
    config = tiny.token_config(task__kinds=("colour", "shape"))
    assert question_factory.splits(config) == ("train", "heldout_layout", "heldout_template")
    assert "heldout_pair" in question_factory.splits(tiny.token_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "ppo"}, "'algorithm' is 'ppo'"),
        ({"algorithm": "sft", "sft__updates": 0}, "sft.updates=0, but algorithm='sft'"),
        ({"env__name": "recall", "env__height": 32}, "'recall' has no actions as text"),
        ({"env__name": "grid"}, "name='grid' is no environment"),
        ({"env__history": 2}, "env.history=2"),
        ({"env__height": 0, "env__width": 0}, "env.height=0, env.width=0: an agent"),
        ({"model__patch": 7}, "model.patch=7"),
        ({"rl__minibatches": 5}, "does not divide rl.num_envs"),
        ({"sft__trained": "value/.*"}, "sft.trained"),
        ({"devices": 99}, "devices=99"),
    ],
)
def test_an_agent_that_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        agent_factory.check(tiny.agent_config(**changes))


def test_demonstrations_are_the_experts_words():
    config = tiny.agent_config(sft__episodes=4)
    question, tokens, present = agent_factory.record_demonstrations(config)
    interface = agent_factory.make_parts(config).interface
    moves, malformed = interface.read(tokens, present)
    assert len(moves) == len(question.images) > 4 and not malformed.any()
    assert len(np.unique(moves)) > 2
    again = agent_factory.record_demonstrations(config)
    bitwise_equal((question, tokens, present), again)


def test_pictures_are_swapped_when_asked_for():
    config = tiny.token_config()
    evaluator = question_factory.make_evaluator(config, jax.random.key(0), questions=8)
    model = question_factory.make_parts(config).model
    variables = token_models.partition_trainable(
        token_models.make_variables(config, model), config, "rl"
    )
    seen = []

    def answer(_, question, rng):
        seen.append(np.asarray(question.images))
        return np.zeros((4, 1, 2), np.int32), np.zeros((4, 1, 2), bool)

    evaluator._answer = answer
    evaluator(variables, "train"), evaluator(variables, "train", swapped=True)
    shown, swapped = np.concatenate(seen[:2]), np.concatenate(seen[2:])
    np.testing.assert_array_equal(swapped, np.roll(shown, 1, axis=0))
    assert np.abs(shown.astype(int) - swapped).max() > 0
