"""RL on questions from a folder by a user's reward functions: runs, resuming, what fails."""

import itertools
import json
import types

import jax
import numpy as np
import pytest

from experiments import evaluate
from experiments import train as train_script
from experiments.train import train
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.rl import group_advantages
from mmrl_jax.tasks import folder as folder_lib
from mmrl_jax.tasks.rewards import NoRewards
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import dispatch, folder_factory, loop, metrics, token_models, token_stages
from tests import processors
from tests.test_folder import colour, folder

LENGTH, HALF, NEVER = (
    f"tests.reward_functions:{name}" for name in ("length", "at_odd_levels", "never")
)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """The public config at a size that trains in seconds, with changes as group__field=value."""
    model = processors.save_decoder(tmp_path_factory.mktemp("llama"))
    pictures = folder(tmp_path_factory.mktemp("pictures"), count=8)

    def make(**changes):
        config = config_lib.load_config("configs/folder_grpo.py")
        config.folder.update(
            directory=str(pictures),
            height=16,
            width=16,
            resize="stretch",
            prompt_tokens=64,
            answer_tokens=4,
        )
        config.rewards.update(functions=(LENGTH,), weights=(0.5,), workers=1, timeout_s=60.0)
        config.model.update(
            pretrained=str(model), width=16, heads=2, patch_hidden=16, vision_layers=0,
            dtype="float32", remat=False,
        )  # fmt: skip
        config.rl.update(
            questions=4, group=4, minibatches=1, accumulate=1, schedule="constant",
            learning_rate=1e-2,
        )  # fmt: skip
        config.run.update(updates=4, eval_interval=2, eval_episodes=2, checkpoint_interval=1)
        config.update_from_flattened_dict({k.replace("__", "."): x for k, x in changes.items()})
        return config

    return make


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    """A run, and its folder."""
    workdir = tmp_path_factory.mktemp("run")
    return train(make_config(), workdir), workdir


def open_split(config):
    return folder_factory.open_records(config, folder_factory.make_parts(config))


def rows(workdir):
    return metrics.read_jsonl(workdir / metrics.JSONL_NAME)


def bitwise_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def fresh(config):
    return token_models.make_variables(config, folder_factory.make_parts(config).model)


def largest_change(a, b):
    """Of the tokens' table."""
    a, b = (np.asarray(x["params"]["language"]["table"]) for x in (a, b))
    return np.abs(a - b).max()


def test_a_run_trains_on_what_the_function_returns(run, make_config):
    trained, workdir = run
    assert trained.warm_start is None and trained.tuned.updates == 4
    assert train_script.factory_of(make_config()) is folder_factory
    logged = rows(workdir)
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for row in logged:
        assert np.isfinite(row["loss/total"]) and row["update/skipped"] == 0
        assert row["answer/unscored"] == 0
        # The reward is half the number of letters, of which a token holds one at most or so.
        assert 0 < row["answer/reward"] <= 4 and 1 <= row["answer/length"] <= 4
    # Of the functions' results, one for each record, their weights make the return.
    for row in logged[1::2]:
        part = row[f"eval/heldout/reward/{LENGTH}"]
        assert 0 < part <= 8 and row["eval/heldout/return"] == pytest.approx(0.5 * part)
    assert "eval/heldout/return" in logged[1] and "eval/heldout/return" not in logged[0]
    assert logged[-1]["eval/heldout/return_lo"] <= logged[-1]["eval/heldout/return_hi"]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["final/heldout/return"] == logged[-1]["eval/heldout/return"]


def test_a_stopped_run_goes_on_to_bitwise_the_same(run, make_config, tmp_path):
    whole, workdir = run
    half = train(make_config(run__updates=2), tmp_path)
    assert half.tuned.updates == 2
    # Three updates a dispatch, of which two are left.
    parts = train(make_config(run__updates_per_dispatch=3), tmp_path)
    bitwise_equal(whole.tuned.carry, parts.tuned.carry)
    assert differ(half.tuned.carry.learner.params, parts.tuned.carry.learner.params)
    mean = np.mean([row["answer/reward"] for row in rows(workdir)[2:]])
    assert rows(tmp_path)[-1]["answer/reward"] == pytest.approx(mean)


@pytest.mark.parametrize("algorithm", ["dpo", "token_ppo"])
def test_other_algorithms_train(algorithm, run, make_config, tmp_path):
    config = make_config(algorithm=algorithm, run__updates=1)
    trained = train(config, tmp_path)
    (row,) = rows(tmp_path)
    assert trained.tuned.updates == 1 and np.isfinite(row["loss/total"])
    # The first answers are those of GRPO: by then only the learners differ.
    assert row["answer/reward"] == rows(run[1])[0]["answer/reward"]


def test_fine_tuning_learns_the_records_own_answers_before_rl(make_config, tmp_path, monkeypatch):
    given = []

    def spy(config, mesh, model, labels, sft_stage=token_stages.sft_stage, **kwargs):
        given.append(labels)
        return sft_stage(config, mesh, model, labels, **kwargs)

    monkeypatch.setattr(token_stages, "sft_stage", spy)
    config = make_config(sft__updates=30, sft__updates_per_dispatch=30, sft__batch_size=8,
                         sft__learning_rate=1e-2, sft__trained=".*", rl__trained=".*",
                         run__updates=1)  # fmt: skip
    trained = train(config, tmp_path)
    assert trained.warm_start.updates == 30 and trained.tuned.updates == 1
    ((asked, tokens, present),) = given
    chat, train_records = folder_factory.make_parts(config).chat, open_split(config).train
    assert len(tokens) == len(train_records) == 6
    for row, name in enumerate(train_records.names):
        i = int(name.split(":")[1]) - 1  # Record i is line i + 1.
        question = chat.prompt(f"which of {i} ?", images=4)
        np.testing.assert_array_equal(asked.tokens[row][asked.present[row]], question)
        np.testing.assert_array_equal(tokens[row][present[row]], chat.answer(str(i)))
        np.testing.assert_array_equal(asked.images[row, 0, 0], colour(i))
    # Random guesses among 400 tokens cost 6 nats; a digit and the stop token are soon learned.
    (row,) = rows(tmp_path / "sft")
    assert row["loss/answer"] < 4
    # RL begins with what was learned, and both can be evaluated from what was stored.
    before, after = trained.warm_start.carry.learner.params, trained.tuned.carry.learner.params
    assert 0 < largest_change(before, after) < 0.05 and largest_change(before, fresh(config)) > 0.05
    page = (tmp_path / "samples.html").read_text()
    assert page.count("<img") == 2 and "of 2 answers are the right one" in page
    for place in (tmp_path, tmp_path / "sft"):
        _, made_of, _ = evaluate.restore_tokens(place, "latest", trust_modules=True)
        found = evaluate.evaluate(
            place, which="latest", split="all", episodes=2, trust_modules=True
        )
        shown = folder_factory.answered_samples(config, made_of, 24)
        assert found["heldout/return"] == np.mean([sample.reward for sample in shown])
        assert [2 * sample.reward for sample in shown] == [len(sample.answer) for sample in shown]
        held_out = open_split(config).heldout.batch(0)
        assert tuple(sample.question for sample in shown) == held_out.prompts
        assert tuple(sample.right for sample in shown) == held_out.answers


def test_answers_without_a_reward_are_left_out_and_counted(make_config, tmp_path, capfd):
    seen = []

    def spy(reward, scored):
        jax.debug.callback(lambda *x: seen.append(x), reward, scored)
        return group_advantages.standardised(reward, scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(group_advantages.ESTIMATORS, "standardised", spy)
        config = make_config(
            rewards__functions=(LENGTH, HALF),
            rewards__weights=(1.0, 1.0),
            run__updates=2,
            run__eval_episodes=3,
        )
        trained = train(config, tmp_path)
    assert trained.tuned.updates == 2 and len(seen) == 2
    split = open_split(config)
    for update, (reward, scored) in enumerate(seen):
        batch = split.train.batch(update)
        level = np.array([columns["level"] for columns in batch.columns])
        np.testing.assert_array_equal(scored, np.repeat(level[:, None], 4, axis=1))
        assert np.all(np.asarray(reward)[level == 0] == 0)
        row = rows(tmp_path)[update]
        assert row["answer/unscored"] == np.mean(level == 0) and row["update/skipped"] == 0
    assert {0 < row["answer/unscored"] < 1 for row in rows(tmp_path)} == {True}
    # One line for one reason, with who and why; once more when held-out samples are written.
    line, *_ = lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("No reward")]
    assert len(lines) <= 2
    assert "answer to metadata.jsonl:" in line and "KeyError: 'no such level'" in line
    assert HALF in line


def test_functions_that_always_fail_stop_the_run(run, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "RETRY_AFTER_S", (0.0,))
    config = make_config(rewards__functions=(NEVER,))
    message = r"None of 16 samples(.|\n)*never\(\).*ZeroDivisionError"
    with pytest.raises(loop.HostFailed, match=message) as caught:
        train(config, tmp_path)
    assert isinstance(caught.value.__cause__, NoRewards)
    assert rows(tmp_path) == [] and loop.HostFailed in train_script.FAILURES


def test_compilation_is_no_time_of_the_updates(make_config, tmp_path, monkeypatch):
    answer, advantage, traced, made = TokenPolicy.answer, group_advantages.standardised, [], []
    # A clock of which tracing takes 100 s, and everything else next to nothing.
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: 100 * len(traced) + 1e-3 * next(ticks))
    monkeypatch.setattr(loop, "time", clock)

    def slow_answer(self, *args, **kwargs):
        if kwargs["group"] > 1:  # Evaluations ask once.
            traced.append("answer")
        return answer(self, *args, **kwargs)

    def slow_advantage(*args):
        traced.append("learn")
        return advantage(*args)

    def spy(*args):
        made.append(loop.HostUpdate(*args))
        return made[-1]

    monkeypatch.setattr(TokenPolicy, "answer", slow_answer)
    monkeypatch.setitem(group_advantages.ESTIMATORS, "standardised", slow_advantage)
    monkeypatch.setattr(folder_factory, "HostUpdate", spy)
    # The second dispatch is of another size, and shares the programs.
    config = make_config(run__updates=3, run__updates_per_dispatch=2)
    counters = train(config, tmp_path).tuned.counters
    assert traced == ["answer", "learn"] and len(made) == 1
    assert 0 < counters.wall_s < 1 and 200 < counters.compile_s < 201
    first = rows(tmp_path)[0]
    assert first["time/wall_s"] < 1 and first["time/compile_s"] > 200
    assert first["time/samples_per_s"] == pytest.approx(2 * 16 / first["time/wall_s"])


def test_a_run_reads_its_folder_once(make_config, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        folder_lib,
        "_inspected",
        lambda reader, inspected=folder_lib._inspected: read.append(1) or inspected(reader),
    )
    pictures = folder(tmp_path / "d", count=8)
    config = make_config(folder__directory=str(pictures), run__updates=1)
    # As the command line does it: checked, then trained.
    train_script.prepare(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert len(read) == 8
    # Another config, or another table, is another opening.
    config = make_config(folder__directory=str(pictures), run__eval_episodes=3)
    assert len(open_split(config).train) == 5 and len(read) == 16
    metadata = pictures / "metadata.jsonl"
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[:7]))
    assert len(open_split(config).train) == 4 and len(read) == 23


def test_held_out_records_are_never_learned_from(make_config):
    config = make_config()
    split = open_split(config)
    asked = {prompt for update in range(6) for prompt in split.train.batch(update).prompts}
    held_out = set(split.heldout.batch(0).prompts)
    assert len(asked) == 6 and len(held_out) == 2 and not asked & held_out


def test_prompts_that_are_too_long_are_set_aside(make_config, tmp_path):
    good = folder(tmp_path / "d", count=8)
    lines = (good / "metadata.jsonl").read_text()
    long = {"file_name": "a/0.png", "prompt": "x" * 60, "answer": "y"}
    taken = {"file_name": "a/0.png", "prompt": "p", "answer": "y", "completion": "z"}
    text = "\n".join(map(json.dumps, (long, taken))) + "\n" + lines
    (good / "metadata.jsonl").write_text(text)
    config = make_config(folder__directory=str(good), folder__max_rejected=0.2)
    split = open_split(config)
    first, second = split.train.rejected
    assert first.name == "metadata.jsonl:1" and "folder.prompt_tokens=64; raise it" in first.reason
    assert second.name == "metadata.jsonl:2" and "columns ['completion']" in second.reason
    config.folder.max_rejected = 0.1
    with pytest.raises(ValueError, match="2 of 10 records cannot be used"):
        folder_factory.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "sft"}, "sft.updates=0, but algorithm='sft'"),
        ({"algorithm": "bc"}, "'algorithm' is 'bc'"),
        (
            {"sft__updates": 1, "folder__answer_tokens": 1},
            "answer '0' has 2 tokens, more than fold",
        ),
        ({"sft__updates": 1, "sft__trained": "lora"}, "sft.trained: 'lora' matches no leaf"),
        ({"folder__directory": ""}, "'folder.directory' is ''"),
        ({"folder__directory": "nowhere"}, r"nowhere/metadata.jsonl is not there"),
        ({"folder__prompt_tokens": 8}, "folder.prompt_tokens=8"),
        ({"model__pretrained": None}, "model.pretrained=None"),
        ({"rewards__functions": ()}, r"rewards.functions=\(\)"),
        ({"rewards__functions": (LENGTH, LENGTH)}, "each once"),
        ({"rewards__functions": ("tests.reward_functions",)}, "'tests.reward_functions', which"),
        ({"rewards__functions": ("no_such_module:f",)}, "'no_such_module:f', which cannot be imp"),
        ({"rewards__functions": (f"{LENGTH}s",)}, "has no attribute 'lengths'"),
        ({"rewards__weights": (1.0, 1.0)}, r"rewards.weights=\(1.0, 1.0\)"),
        ({"rewards__workers": 0}, "'rewards.workers' is 0"),
        ({"rl__group": 1}, "rl.group=1, but algorithm='grpo'"),
        ({"rl__trained": "lora"}, "rl.trained: 'lora' matches no leaf"),
        ({"run__eval_episodes": 8}, "run.eval_episodes=8: 8 of 8 records"),
    ],
)
def test_what_cannot_run_is_refused(changes, message, make_config):
    with pytest.raises(ValueError, match=message):
        folder_factory.check(make_config(**changes))
