"""Tests of runs of token policies: configs, resuming, rejected values, and metrics."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import study
import mmrl_jax
from mmrl_jax import probes, problems
from mmrl_jax.commands.evaluate import evaluate
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import control, task, text_agent
from mmrl_jax.workdir import saved_steps
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
                {"stages": ("sft", "dpo"), "last__reference_ema_decay": 0.9},
                {"stages": ("sft", "ppo"), "last__num_completions": 1},
                {
                    "last__pass_at_k": 2,
                    "last__oversample": 2,
                    "last__importance_weight_cap": 2.0,
                    "last__pack_rows": 1,
                },
            )
        ),
    ],
)
def test_every_config_trains(name, changes, tmp_path):
    config = tiny.token_config(name, **changes)
    trained = mmrl_jax.train(config, tmp_path)
    assert [result.updates for result in trained.results.values()] == [4] * len(config.stages)
    assert tuple(trained.results) == config.stages
    assert len(config.stages) == (1 if name == "count_sft" else 2)
    last = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert np.isfinite(last["loss/total"]) and 0 <= last["eval/train/accuracy"] <= 1
    assert last["eval/train/accuracy_lo"] <= last["eval/train/accuracy_hi"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final/train/accuracy"] == last["eval/train/accuracy"]
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    page = (tmp_path / "samples.html").read_text()
    assert page.count("<img ") == 24 and page.count("how many") + page.count("count the") == 24
    if config.stages != ("sft",):
        assert 1 <= last["completion/length"] <= 2 and -0.5 <= last["completion/reward"] <= 1


def test_a_stopped_run_goes_on_to_bitwise_the_same(tmp_path):
    whole = mmrl_jax.train(tiny.token_config(), tmp_path / "whole")
    with live_arrays.shares_of_runs() as shares:
        mmrl_jax.train(tiny.token_config(last__num_updates=2), tmp_path / "parts")
        parts = mmrl_jax.train(tiny.token_config(), tmp_path / "parts")
    # Parameters, Adam's two moments and the reference, on each stage and on resume: no dead copy.
    assert {name for name, _ in shares} == {"sft", "grpo"}
    assert max(share for _, share in shares) <= 1.1, shares
    assert parts.last.updates == 4
    bitwise_equal(whole.last.carry, parts.last.carry)


def test_samples_of_updates_that_are_done_again_are_written_once(tmp_path):
    config = tiny.token_config(
        stages=("grpo",),
        run__probes=("samples",),
        run__probe_interval=1,
        last__checkpoint_interval=1,
    )
    mmrl_jax.train(config, tmp_path)
    path, newest = tmp_path / metrics.SAMPLES_NAME, saved_steps(tmp_path)[-1]
    before = path.read_text()
    shutil.rmtree(tmp_path / "checkpoints" / str(newest))
    assert mmrl_jax.train(config, tmp_path).last.updates == newest == 4
    updates = [json.loads(line)["update"] for line in before.splitlines()]
    assert updates == [n for n in (1, 2, 3, 4) for _ in range(probes.SAMPLES)]
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("bc", "grpo")}, r"'stages' is \('bc', 'grpo'\)"),
        ({"grpo__preset": "grop"}, "'grpo.preset' is 'grop'"),
        (
            {"last__prompts_per_update": 6, "last__num_minibatches": 4},
            "does not divide grpo.prompts_per_update=6",
        ),
        ({"last__num_completions": 1}, "grpo.num_completions=1, but the stage 'grpo'"),
        (
            {"last__num_completions": 2, "grpo__pass_at_k": 3},
            "grpo.pass_at_k=3 is above grpo.num_completions=2",
        ),
        (
            {"last__num_completions": 4, "last__pack_rows": 4},
            "grpo.pack_rows=4.*'grpo' learns from 4 completions",
        ),
        ({"stages": ("sft", "ppo"), "last__pack_rows": 2}, "'ppo' learns from 2 completions"),
        ({"last__top_entropy_fraction": 0.0}, r"must be in \(0, 1\]"),
        (
            {"last__kl_cov_fraction": 0.1, "last__num_epochs": 1, "last__num_minibatches": 1},
            "grpo.kl_cov_fraction=0.1, but with a single optimizer step",
        ),
        ({"last__reference_ema_decay": 1.5}, "'grpo.reference_ema_decay' is 1.5"),
        ({"model__patch": 7}, "model.patch=7"),
        ({"model__heads": 16}, "model.heads=16"),
        ({"sft__counts": (1, 5)}, r"sft.counts=\(1, 5\)"),
        ({"sft__counts": (1,)}, r"sft.counts=\(1,\)"),
        (
            {"sft__counts": (1, 1), "task__kinds": ("compare",), "task__distractors": 0},
            r"sft.counts=\(1, 1\) is invalid: .* a single count",
        ),
        ({"task__kinds": ("counts",)}, "kinds has 'counts'"),
        ({"task__rows": 4}, "must be at least 24 with rows=4"),
        ({"task__levels": ("hard", "harder")}, "levels has 'harder', which is not one of"),
        ({"task__levels": ()}, r"levels=\(\) must be a non-empty subset of"),
        ({"task__distractors": 9}, "rows=2 gives 4 cells"),
        (
            {"stages": ("sft", "ppo"), "last__num_completions": 4, "mesh__data": 8},
            "divide ppo.prompts_per_update = 4",
        ),
        ({"mesh__data": 99}, "mesh.data=99"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.make(tiny.token_config(**changes))


def test_grpo_from_scratch_has_a_reference_too(tmp_path):
    trained = mmrl_jax.train(tiny.token_config(stages=("grpo",), last__num_updates=1), tmp_path)
    assert [(name, x.updates) for name, x in trained.results.items()] == [("grpo", 1)]
    assert "policy/reference_kl" in metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]


def test_sft_alone_needs_updates():
    with pytest.raises(ValueError, match="'sft.num_updates' is 0"):
        problems.make(tiny.token_config("count_sft", sft__num_updates=0))


def test_kinds_of_policies_are_told_apart():
    with_value = tiny.token_config(stages=("sft", "ppo"))
    assert isinstance(problems.make(tiny.token_config()), task.TaskProblem)
    assert isinstance(problems.make(with_value), task.TaskProblem)
    assert isinstance(problems.make(tiny.agent_config()), text_agent.TextAgent)
    assert isinstance(problems.make(tiny.config()), control.Control)


@pytest.mark.parametrize("name", tiny.AGENTS)
def test_an_agent_trains_and_goes_on_where_it_was_stopped(name, tmp_path):
    whole = mmrl_jax.train(tiny.agent_config(name), tmp_path / "whole")
    assert [result.updates for result in whole.results.values()] == [4, 4]
    last = metrics.read_jsonl(tmp_path / "whole" / metrics.JSONL_NAME)[-1]
    assert np.isfinite(last["loss/total"]) and 0 <= last["completion/invalid_fraction"] <= 1
    assert 0 <= last["eval/train/success"] <= 1
    assert "final/train/success" in json.loads((tmp_path / "whole/summary.json").read_text())
    with live_arrays.shares_of_runs() as shares:
        mmrl_jax.train(tiny.agent_config(name, last__num_updates=2), tmp_path / "parts")
        parts = mmrl_jax.train(tiny.agent_config(name), tmp_path / "parts")
    assert len({stage for stage, _ in shares}) == 2
    assert max(share for _, share in shares) <= 1.1, shares
    bitwise_equal(whole.last.carry, parts.last.carry)


def test_a_study_measures_agents_on_every_split(tmp_path):
    config = tiny.agent_config(stages=("sft",))
    found = study.run_one(config, 1, tmp_path)
    splits = ("train", "heldout_pair", "heldout_layout")
    assert {f"final/{split}/success" for split in splits} <= found.keys()
    table = evaluate(tmp_path, which="latest", split="all", episodes=4)
    for split in splits:
        assert table[f"{split}/success"] == found[f"final/{split}/success"]


@pytest.mark.slow
def test_a_stage_is_evaluated_from_its_checkpoint(tmp_path):
    config = tiny.token_config(run__eval_episodes=16, task__levels=("easy", "hard"))
    trained = mmrl_jax.train(config, tmp_path)
    logged = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)[-1]
    assert {"eval/train/easy/accuracy", "eval/train/hard/accuracy_lo"} <= logged.keys()
    # Beside RL no copy of what fine-tuning learned is kept: alone it learns the same.
    alone = mmrl_jax.train(
        problems.complete(config.to_dict(), {"stages": ("sft",)}), tmp_path / "alone"
    )
    measure = trained.problem.measure(episodes=16)
    for place, which in ((tmp_path, trained), (tmp_path / "sft", alone)):
        table = evaluate(place, which="latest", split="train", episodes=16)
        expected = measure(which.variables, "train")
        assert table["train/accuracy"] == expected["accuracy"]
        assert table["train/shuffled_image/accuracy"] == expected["shuffled_image/accuracy"]
        assert table["train/hard/accuracy"] == expected["hard/accuracy"]
        assert not {"medium/accuracy", "train/medium/accuracy"} & (expected.keys() | table.keys())


def test_no_pair_is_held_out_of_questions_that_name_none():
    config = tiny.token_config(task__kinds=("colour", "shape"))
    assert tuple(problems.make(config).splits) == ("train", "heldout_layout", "heldout_template")
    assert "heldout_pair" in problems.make(tiny.token_config()).splits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("bc", "ppo")}, r"'stages' is \('bc', 'ppo'\)"),
        ({"stages": ("sft", "grpo")}, r"'stages' is \('sft', 'grpo'\)"),
        ({"stages": ("sft",), "sft__num_updates": 0}, "'sft.num_updates' is 0"),
        ({"env__name": "recall", "env__height": 32}, "'recall' does not define actions as text"),
        ({"env__name": "grid"}, "name='grid' is no environment"),
        ({"env__history": 2}, "env.history=2"),
        ({"env__height": 0, "env__width": 0}, "env.height=0, env.width=0: a text agent"),
        ({"model__patch": 7}, "model.patch=7"),
        ({"last__num_minibatches": 5}, "does not divide ppo.num_envs"),
        ({"sft__trainable": "value/.*"}, "sft.trainable"),
        ({"mesh__data": 99}, "mesh.data=99"),
    ],
)
def test_an_agent_that_cannot_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.make(tiny.agent_config(**changes))


def test_demonstrations_are_the_experts_words():
    config = tiny.agent_config(sft__episodes=4)
    agent = problems.make(config)
    labels = agent.source("sft").data
    tokens, mask = labels.completions.tokens[0, :, 0], labels.completions.mask[0, :, 0]
    moves, invalid = agent.interface.decode_actions(tokens, mask)
    assert len(moves) == len(labels.prompt.images[0]) > 4 and not invalid.any()
    assert len(np.unique(moves)) > 2
    bitwise_equal(labels, problems.make(config).source("sft").data)


def test_images_are_shuffled_when_asked_for():
    counting = problems.make(tiny.token_config())
    evaluator = counting.evaluator(jax.random.key(0), prompts=8)
    variables = counting.initial_variables()
    seen = []

    def generate(_, prompts, rng):
        seen.append(np.asarray(prompts.images))
        return np.zeros((4, 1, 2), np.int32), np.zeros((4, 1, 2), bool)

    evaluator._generate = generate
    evaluator(variables, "train"), evaluator(variables, "train", shuffle_images=True)
    shown, shuffled = np.concatenate(seen[:2]), np.concatenate(seen[2:])
    np.testing.assert_array_equal(shuffled, np.roll(shown, 1, axis=0))
    assert np.abs(shown.astype(int) - shuffled).max() > 0


def test_wrong_labels_are_those_of_other_prompts_of_the_kind():
    kinds = ("count", "colour", "shape")
    config = tiny.token_config(task__kinds=kinds, sft__examples=400, sft__label_noise=1.0)
    noisy = problems.make(config)
    clean = problems.make(problems.complete(config, {"sft": {"label_noise": 0.0}}))
    labels = [jax.device_get(p.source("sft").data) for p in (noisy, clean)]
    kind = labels[0].prompt.kind[0]
    assert set(kind) == {0, 1, 2}
    tokens = [x.completions.tokens[0, :, 0] for x in labels]
    for number in range(3):
        # The same answers, but in another order.
        one, other = (sorted(map(tuple, x[kind == number])) for x in tokens)
        assert one == other
        same = np.all(tokens[0][kind == number] == tokens[1][kind == number], axis=-1)
        assert same.mean() < 0.6
