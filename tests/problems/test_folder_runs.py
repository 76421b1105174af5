"""Tests of RL with prompts from a folder and reward functions: runs, resuming, failures."""

import itertools
import json
import shutil
import types

import jax
import numpy as np
import pytest

from mmrl_jax import problems, restoring, runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands import common
from mmrl_jax.commands.evaluate import evaluate
from mmrl_jax.data import weights as weights_lib
from mmrl_jax.data.records import InvalidData
from mmrl_jax.data.weights import SampleWeight
from mmrl_jax.evaluation.rewards import describe
from mmrl_jax.evaluation.statistics import rate_interval
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenPolicy
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import dataset as dataset_lib
from mmrl_jax.problems import dataset_options, host_rewards, host_update, token_problem
from mmrl_jax.problems.host_rewards import Scorer
from mmrl_jax.rl import group_advantages
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks import folder as folder_lib
from mmrl_jax.tasks import tables
from mmrl_jax.tasks.rewards import Failure, NoRewards, Rewards
from mmrl_jax.training import loop
from tests import processors, tiny
from tests.tasks import test_layouts as layouts
from tests.tasks.test_folder import color, folder

LENGTH, HALF, NEVER = (
    f"tests.reward_functions:{name}" for name in ("length", "at_odd_levels", "never")
)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """Returns the public config at a tiny size, with changes as group__field=value."""
    model = processors.save_decoder(tmp_path_factory.mktemp("llama"))
    images = folder(tmp_path_factory.mktemp("pictures"), count=10)

    def make(stages=("grpo",), **changes):
        return tiny.folder_config(model, images, stages, **changes)

    return make


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    """Returns a run and its directory."""
    workdir = tmp_path_factory.mktemp("run")
    return runs.train(make_config(), workdir), workdir


def open_split(config):
    return problems.make(config).records


def rows(workdir):
    """Returns the rows of the updates, without that of the initial evaluation."""
    return [row for row in metrics.read_jsonl(workdir / metrics.JSONL_NAME) if row["step"]]


def bitwise_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def largest_change(a, b):
    """Returns the largest change of the token embeddings."""
    a, b = (np.asarray(x["params"]["language"]["table"]) for x in (a, b))
    return np.abs(a - b).max()


def test_a_run_trains_on_what_the_function_returns(run, make_config):
    trained, workdir = run
    assert [(name, x.updates) for name, x in trained.results.items()] == [("grpo", 4)]
    assert isinstance(trained.problem, dataset_lib.Dataset)
    logged = rows(workdir)
    longest = max(map(len, trained.problem.chat.tokenizer.get_vocab()))
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for row in logged:
        assert np.isfinite(row["loss/total"]) and row["optimizer/skipped_steps"] == 0
        assert row["completion/unscored"] == 0 and 0 <= row["completion/truncated_fraction"] <= 1
        # The reward is half the number of letters; of an answer's four tokens each may be special,
        # and is then shown as it is written.
        assert (
            0 < row["completion/reward"] <= 4 * longest / 2 and 1 <= row["completion/length"] <= 4
        )
    # Of the functions' results, one for each record, their weights make the return.
    for row in logged[1::2]:
        part = row[f"eval/validation/reward/{LENGTH}"]
        assert 0 < part <= 4 * longest and row["eval/validation/return"] == pytest.approx(
            0.5 * part
        )
        assert row["eval/validation/failed_fraction"] == 0
    assert "eval/validation/return" in logged[1] and "eval/validation/return" not in logged[0]
    assert logged[-1]["eval/validation/return_lo"] <= logged[-1]["eval/validation/return_hi"]
    # What is reported is the test split, which is not what chose a checkpoint.
    summary = json.loads((workdir / "summary.json").read_text())
    assert [name for name in summary if name.startswith("final/")] == [
        "final/test/return", "final/test/return_lo", "final/test/return_hi",
        "final/test/failed_fraction",
    ]  # fmt: skip
    assert not any(name.startswith("eval/test/") for row in logged for name in row)
    shown = trained.problem.samples(trained.variables, 24)
    assert summary["final/test/return"] == np.mean([sample.reward for sample in shown])
    assert trained.test_metrics["eval/test/return"] == summary["final/test/return"]
    test = trained.problem.records.test
    assert {sample.prompt for sample in shown} == set(test.read(range(2)).prompts)


def test_shuffled_images_are_those_of_other_records():
    # Sorted by image: a 0 2 3, b 1 5, c 4; each takes the image of the third one after it.
    others = dataset_lib.other_images(list("abaacb"))
    np.testing.assert_array_equal(others, [1, 0, 5, 4, 3, 2])
    np.testing.assert_array_equal(dataset_lib.other_images(list("aab")), [2, 0, 1])
    np.testing.assert_array_equal(np.sort(dataset_lib.other_images(list("aaaa"))), range(4))


def test_the_ablation_gives_the_policy_alone_other_images(run, monkeypatch):
    trained, _ = run
    shown, scored, prompts, scorer = [], [], dataset_lib.Dataset.prompts, Scorer.__call__
    monkeypatch.setattr(
        dataset_lib.Dataset, "prompts", lambda self, x: shown.append(x) or prompts(self, x)
    )
    monkeypatch.setattr(
        Scorer,
        "__call__",
        lambda self, records, x, *args, **kwargs: (
            scored.append(x) or scorer(self, records, x, *args, **kwargs)
        ),
    )
    measured = trained.problem.measure(ablations=True)(trained.variables, "test")
    (own, others), (first, second) = shown, scored
    assert own.prompts == others.prompts == first.prompts == second.prompts
    np.testing.assert_array_equal(own.images[::-1], others.images)
    np.testing.assert_array_equal(second.images, own.images)
    assert differ(own.images, others.images)
    names = {f"shuffled_image/{x}" for x in ("return", "return_lo", "return_hi", "failed_fraction")}
    assert {name for name in measured if "shuffled" in name} == names
    plain = trained.problem.measure()(trained.variables, "test")
    assert plain == {name: x for name, x in measured.items() if name not in names}


def test_a_stopped_run_goes_on_to_bitwise_the_same(run, make_config, tmp_path):
    whole, workdir = run
    half = runs.train(make_config(last__num_updates=2), tmp_path)
    assert half.last.updates == 2
    # Three updates a dispatch, of which two are left.
    parts = runs.train(make_config(last__updates_per_dispatch=3), tmp_path)
    bitwise_equal(whole.last.carry, parts.last.carry)
    assert differ(half.last.carry.learner.params, parts.last.carry.learner.params)
    mean = np.mean([row["completion/reward"] for row in rows(workdir)[2:]])
    assert rows(tmp_path)[-1]["completion/reward"] == pytest.approx(mean)


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_other_algorithms_train(algorithm, run, make_config, tmp_path):
    config = make_config(
        stages=(algorithm,), last__num_updates=1, last__mask_truncated_completions=True
    )
    trained = runs.train(config, tmp_path)
    (row,) = rows(tmp_path)
    assert trained.last.updates == 1 and np.isfinite(row["loss/total"])
    # The first answers are those of GRPO: by then only the learners differ.
    assert row["completion/reward"] == rows(run[1])[0]["completion/reward"]


def test_fine_tuning_learns_the_records_own_answers_before_rl(make_config, tmp_path, monkeypatch):
    given = []

    def spy(*arguments, from_labels=ScoredCompletions.from_labels):
        given.append(from_labels(*arguments))
        return given[-1]

    monkeypatch.setattr(ScoredCompletions, "from_labels", spy)
    config = make_config(
        ("sft", "grpo"), sft__num_updates=30, sft__updates_per_dispatch=30, sft__batch_size=8,
        sft__optimizer__learning_rate=1e-2, sft__trainable=".*", last__trainable=".*",
        last__num_updates=1,
    )  # fmt: skip
    trained = runs.train(config, tmp_path)
    assert [result.updates for result in trained.results.values()] == [30, 1]
    # A batch of 8 of the 6 records: an epoch, and the beginning of the next one.
    labels = jax.tree.map(lambda x: x[0], jax.device_get(given[0]))
    asked, tokens, mask = labels.prompt, *(x[:, 0] for x in labels.completions[::2])
    chat, train_records = trained.problem.chat, trained.problem.records.train
    numbers = train_records.with_batch_size(8).batch(0).records
    assert set(numbers[:6]) == set(range(6)) and len(tokens) == 8
    for row, number in enumerate(numbers):
        i = int(train_records.names[number].split(":")[1]) - 1  # Record i is line i + 1.
        prompt = chat.encode_prompt(f"which of {i} ?", images=4)
        np.testing.assert_array_equal(asked.tokens[row][asked.mask[row]], prompt)
        np.testing.assert_array_equal(tokens[row][mask[row]], chat.encode_completion(str(i)))
        np.testing.assert_array_equal(asked.images[row, 0, 0], color(i))
    # Random guesses among 400 tokens cost 6 nats; a digit and the stop token are soon learned.
    (row,) = rows(tmp_path / "sft")
    assert row["loss/sft"] < 4
    # RL begins with what was learned, and both can be evaluated from what was stored.
    before = restoring.load(tmp_path / "sft", trust_modules=True).variables
    after, fresh = trained.variables, trained.problem.initial_variables()
    assert 0 < largest_change(before, after) < 0.05 and largest_change(before, fresh) > 0.05
    page = (tmp_path / "samples.html").read_text()
    assert page.count("<img") == 2 and "mean reward of 2 completions" in page
    for place in (tmp_path, tmp_path / "sft"):
        variables = restoring.load(place, trust_modules=True).variables
        found = evaluate(place, which="latest", split="all", episodes=None, trust_modules=True)
        shown = trained.problem.samples(variables, 24)
        assert found["test/return"] == np.mean([sample.reward for sample in shown])
        assert found["test/episodes"] == found["validation/episodes"] == 2
        assert found["test/failed_fraction"] == found["validation/failed_fraction"] == 0
        assert (
            found["test/shuffled_image/episodes"] == 2 and found["test/shuffled_image/return"] >= 0
        )
        assert [2 * sample.reward for sample in shown] == [
            len(sample.completion) for sample in shown
        ]
        tested = trained.problem.records.test.read(range(2))
        assert tuple(sample.prompt for sample in shown) == tested.prompts
        assert tuple(sample.answer for sample in shown) == tested.answers
    with pytest.raises(ValueError, match="3 episodes, but split 'validation' has only 2 records"):
        evaluate(place, which="latest", split="all", episodes=3, trust_modules=True)


def test_fine_tuning_reads_a_batch_at_a_time_and_goes_on_bitwise(make_config, tmp_path):
    changes = {"stages": ("sft",), "sft__num_updates": 4, "sft__batch_size": 2,
               "sft__updates_per_dispatch": 1, "sft__checkpoint_interval": 1}  # fmt: skip
    config, largest = make_config(**changes), []
    original, before = folder_lib.Records.read, jax.live_arrays()

    def read(self, numbers):
        others = {id(x) for x in before}
        live = [x for x in jax.live_arrays() if x.shape[1:] == (16, 16, 3) and id(x) not in others]
        largest.append((len(numbers), sum(len(x) for x in live)))
        return original(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_lib.Records, "read", read)
        whole = runs.train(config, tmp_path / "whole")
    # Held-out records are 2 too. On the device there are the batch and the one that is read ahead.
    assert {count for count, _ in largest} == {2} and max(live for _, live in largest) <= 4
    runs.train(make_config(**changes | {"sft__num_updates": 2}), tmp_path / "half")
    parts = runs.train(config, tmp_path / "half")
    bitwise_equal(whole.last.carry, parts.last.carry)


def test_held_out_records_are_answered_in_chunks(make_config, monkeypatch):
    shown, generate, asked = [], TokenPolicy.generate, []

    def counted(self, params, frozen, prompts, *args, **kwargs):
        asked.append(len(prompts.tokens))
        return generate(self, params, frozen, prompts, *args, **kwargs)

    monkeypatch.setattr(TokenPolicy, "generate", counted)
    for together in (4, 2):
        folder_problem = problems.make(
            make_config(dataset__test_size=3, last__prompts_per_update=together)
        )
        shown.append(folder_problem.samples(folder_problem.initial_variables(), 24))
        assert len(shown[-1]) == 3
    assert asked == [3, 2]  # Of the three, two and one that is filled up.
    for one, other in zip(*shown, strict=True):
        assert one[1:] == other[1:]
        np.testing.assert_array_equal(one.image, other.image)


def test_answers_without_a_reward_are_left_out_and_counted(make_config, tmp_path, capfd):
    seen = []

    def spy(reward, scored):
        jax.debug.callback(lambda *x: seen.append(x), reward, scored)
        return group_advantages.standardized(reward, scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(group_advantages.ESTIMATORS, "standardized", spy)
        config = make_config(
            rewards__functions=(LENGTH, HALF),
            rewards__weights=(1.0, 1.0),
            last__num_updates=2,
            dataset__test_size=3,
        )
        trained = runs.train(config, tmp_path)
    assert trained.last.updates == 2 and len(seen) == 2
    split = open_split(config)
    for update, (reward, scored) in enumerate(seen):
        batch = split.train.batch(update)
        level = np.array([columns["level"] for columns in batch.columns])
        np.testing.assert_array_equal(scored, np.repeat(level[:, None], 4, axis=1))
        assert np.all(np.asarray(reward)[level == 0] == 0)
        row = rows(tmp_path)[update]
        assert (
            row["completion/unscored"] == np.mean(level == 0)
            and row["optimizer/skipped_steps"] == 0
        )
        # One of the two functions fails there.
        assert row["reward/failed"] == np.mean(level == 0) / 2
    assert {0 < row["completion/unscored"] < 1 for row in rows(tmp_path)} == {True}
    # An evaluation counts every record, and a mean over half of them is not reported.
    row, summary = rows(tmp_path)[-1], json.loads((tmp_path / "summary.json").read_text())
    for name, part, found in (
        ("validation", split.validation, {k.removeprefix("eval/"): x for k, x in row.items()}),
        ("test", split.test, {k.removeprefix("final/"): x for k, x in summary.items()}),
    ):
        columns = part.read(range(len(part))).columns
        failed = np.mean([x["level"] == 0 for x in columns])
        assert found[f"{name}/failed_fraction"] == pytest.approx(failed) and 0.1 < failed
        assert found[f"{name}/return"] is None and found[f"{name}/return_lo"] is None
    assert row[f"eval/validation/reward/{HALF}"] is None
    assert row[f"eval/validation/reward/{LENGTH}"] >= 0
    with pytest.raises(ValueError, match="has a score"):
        restoring.load(tmp_path, which="best", trust_modules=True)
    # One line for one reason, with who and why; once more when held-out samples are written.
    printed = capfd.readouterr().err.splitlines()
    assert sum("failed, more than rewards.max_failed=0.1" in x for x in printed) == 3
    line, *_ = lines = [x for x in printed if x.startswith("The reward of a completion")]
    assert len(lines) <= 2
    assert "completion of metadata.jsonl:" in line and "KeyError: 'no such level'" in line
    assert HALF in line


def test_reward_functions_read_what_was_written_and_are_told_what_was_truncated(make_config):
    problem, given = problems.make(make_config()), []
    records, chat = problem.records.train, problem.chat

    class Pool:
        takes_ids = True

        def __call__(self, *arguments, allow_none, messages, completion_ids):
            assert not allow_none and messages == (None,) * 4
            assert completion_ids == [[[two, chat.stop], [two]]] * 4
            given.append(arguments)
            zeros, ones = np.zeros((4, 2), np.float32), np.ones((4, 2), bool)
            return Rewards(zeros, ones, {"length": zeros}, {"length": ones}, ())

    two = chat.encode_completion("2")[0]
    tokens = np.array([[[two, chat.stop, two], [two, chat.pad, two]]] * 4)
    mask = np.array([[[True, True, False], [True, False, False]]] * 4)
    finished = np.array([[True, False]] * 4)
    batch = records.batch(0)
    completions = Completions(tokens, np.zeros(tokens.shape), mask, finished)
    scored = Scorer(Pool(), chat)(records, batch, completions)
    assert scored.completions == [["2", "2"]] * 4
    ((prompts, completions, right, columns, ended),) = given
    assert completions == scored.completions
    assert (prompts, right, columns) == (batch.prompts, batch.answers, batch.columns)
    np.testing.assert_array_equal(ended, finished)


def test_functions_with_trls_signature_train_and_are_evaluated(make_config, tmp_path):
    trl = "tests.reward_functions:tokens"
    config = make_config(
        rewards__functions=(trl, "tests.reward_functions:at_odd_levels_list"),
        rewards__weights=(1.0, 100.0),
        last__num_updates=1,
    )
    trained = runs.train(config, tmp_path)
    (row,) = rows(tmp_path)
    level = [x["level"] for x in trained.problem.records.train.batch(0).columns]
    # The tokens of each completion, 10 for its level, and 100 where the second function applies.
    expected = 110 * np.mean(level) + row["completion/length"]
    assert row["completion/reward"] == pytest.approx(expected)
    assert row["completion/unscored"] == row["reward/failed"] == 0
    validation = trained.problem.records.validation
    found = trained.problem.measure()(trained.variables, "validation")
    level = [x["level"] for x in validation.read(range(2)).columns]
    assert found["failed_fraction"] == 0 and found["return"] > 110 * np.mean(level)
    part = found["reward/tests.reward_functions:at_odd_levels_list"]
    assert part == 1 if any(level) else np.isnan(part)


def test_functions_that_are_ready_are_named_with_their_options(make_config, tmp_path, monkeypatch):
    config = make_config(
        rewards__functions=("mmrl_jax.rewards:length_bounds", "mmrl_jax.rewards:json_schema"),
        rewards__options=({"max_length": 2**20}, {"schema": {"enum": [[10**6]]}}),
        rewards__weights=(0.5, 8.0),
        last__num_updates=1,
        last__mask_truncated_completions=True,
    )
    trained = runs.train(config, tmp_path)
    (row,) = rows(tmp_path)
    # Every completion that ended has a length in the bounds, unless it is blank; none is JSON.
    ended = 1 - row["completion/truncated_fraction"]
    assert 0 <= row["completion/reward"] <= 0.5 * ended and row["reward/failed"] == 0
    with monkeypatch.context() as patch:  # The records are read for an evaluation alone.
        patch.setattr(tables, "fingerprint", lambda *_: pytest.fail("a table is read"))
        loaded = restoring.load(tmp_path)  # Of modules of the package alone.
    assert loaded.problem.config.rewards.options[0]["max_length"] == 2**20
    assert loaded.evaluate("test") == trained.problem.measure()(trained.variables, "test")


def test_a_run_on_parquet_with_messages(make_config, tmp_path):
    # The images of the test table come after those of training, and repeat none.
    layouts.write(tmp_path, "chat", count=14, parquet=True, row_group_size=3)
    (path,) = tmp_path.iterdir()
    table = layouts.pq.read_table(path)
    layouts.pq.write_table(table[:8], path)
    test_path = path.with_name("test-00000-of-00001.parquet")
    layouts.pq.write_table(table[8:], test_path)
    config = make_config(
        dataset__directory=str(tmp_path),
        dataset__files="train-*.parquet",
        dataset__test_directory=str(tmp_path),
        dataset__test_files="test-*.parquet",
        dataset__test_size=0,
        rewards__functions=("tests.reward_functions:of_messages",),
        rewards__weights=(1.0,),
        last__num_updates=2,
    )
    trained = runs.train(config, tmp_path / "run")
    assert [row["completion/reward"] for row in rows(tmp_path / "run")] == [7.0, 7.0]
    assert [row["reward/failed"] for row in rows(tmp_path / "run")] == [0, 0]
    split = trained.problem.records
    assert len(split.train) == 6 and len(split.validation) == 2 and len(split.test) == 6
    assert trained.test_metrics["eval/test/return"] == 7
    # A changed table is another input, and so is a changed text of a test record alone.
    before = trained.problem.dependencies()["records"]
    other = table[8:].set_column(
        table.column_names.index("level"), "level", layouts.pa.array([7] * 6)
    )
    layouts.pq.write_table(other, test_path)
    assert problems.make(config).dependencies()["records"] != before


def test_columns_of_a_table_are_named_in_the_config(make_config, tmp_path):
    layouts.write(tmp_path, "trl", count=8)
    text = (tmp_path / "train.jsonl").read_text()
    text = text.replace('"answer"', '"solution"').replace('"images"', '"photos"')
    (tmp_path / "train.jsonl").write_text(text)
    changes = {
        "dataset__directory": str(tmp_path),
        "dataset__columns": {"answer": "solution", "image": "photos"},
    }
    problem = problems.make(
        make_config(rewards__functions=("tests.reward_functions:solved",), **changes)
    )
    batch = problem.records.train.read([0])
    assert batch.columns[0]["solution"] == batch.answers[0] and "photos" not in batch.columns[0]
    with pytest.raises(ValueError, match=r"10 of 10 records(.|\n)*solution=None is not a"):
        problems.make(make_config(dataset__columns={"answer": "solution"}))


def test_functions_that_always_fail_stop_the_run_before_it_compiles(
    make_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_problem, "Stage", None)  # Nothing is built.
    config = make_config(rewards__functions=(NEVER,))
    # Called for the right answers to the first four questions.
    with pytest.raises(NoRewards, match=r"None of 4 samples(.|\n)*never\(\).*ZeroDivisionError"):
        runs.train(config, tmp_path)
    assert not (tmp_path / metrics.JSONL_NAME).exists() and NoRewards in common.FAILURES


class FixedPool:
    """Pool whose functions return fixed rewards [B, 1], with failures."""

    takes_ids = False

    def __init__(self, reward, failures=()):
        self.reward, self.failures = np.float32(reward)[:, None], failures

    def __call__(self, *arguments, **keywords):
        valid = np.isfinite(self.reward)
        return Rewards(self.reward, valid, {"f": self.reward}, {"f": ~valid}, self.failures)


@pytest.mark.parametrize(
    ("reward", "warned"),
    [([0, 0, -1, 0], True), ([0, np.nan, 0, 0], True), ([0, 0, 0, 1], False)],
)
def test_right_answers_without_a_reward_are_warned_of(make_config, reward, warned, capfd):
    problem = problems.make(make_config())
    capfd.readouterr()
    Scorer(FixedPool(reward), problem.chat).check_functions(problem.records.train)
    assert ("reference answers of the first batch" in capfd.readouterr().err) == warned


def test_failures_of_one_kind_are_printed_once(make_config, capfd):
    problem = problems.make(make_config())
    kinds = ["KeyError (m.py:3)"] * 20 + ["KeyError (m.py:4)"]
    failures = tuple(
        Failure(i % 4, 0, "f", f"KeyError: 'text {i}' (m.py:3)", kind, np.nan)
        for i, kind in enumerate(kinds)
    )
    scorer = Scorer(FixedPool([1, 1, 1, 1], failures), problem.chat)
    capfd.readouterr()
    scorer.check_functions(problem.records.train)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "'text 0'" in lines[0] and "'text 20'" in lines[1]


def test_compilation_is_no_time_of_the_updates(make_config, tmp_path, monkeypatch):
    generate, advantage, traced, made = TokenPolicy.generate, group_advantages.standardized, [], []
    # A clock of which tracing takes 100 s, and everything else next to nothing.
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: 100 * len(traced) + 1e-3 * next(ticks))
    monkeypatch.setattr(loop, "time", clock)

    def slow_generate(self, *args, **kwargs):
        if kwargs["num_completions"] > 1:  # Evaluations sample one.
            traced.append("generate")
        return generate(self, *args, **kwargs)

    def slow_advantage(*args):
        traced.append("learn")
        return advantage(*args)

    def spy(*args):
        made.append(loop.HostUpdate(*args))
        return made[-1]

    monkeypatch.setattr(TokenPolicy, "generate", slow_generate)
    monkeypatch.setitem(group_advantages.ESTIMATORS, "standardized", slow_advantage)
    monkeypatch.setattr(host_update, "HostUpdate", spy)
    # The second dispatch is of another size, and shares the programs.
    config = make_config(last__num_updates=3, last__updates_per_dispatch=2)
    counters = runs.train(config, tmp_path).last.counters
    assert traced == ["generate", "learn"] and len(made) == 1
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
    images = folder(tmp_path / "d", count=8)
    config = make_config(dataset__directory=str(images), last__num_updates=1)
    runs.train(config, tmp_path / "run")
    assert len(read) == 8
    # Another config, or another table, is another opening.
    config = make_config(dataset__directory=str(images), dataset__test_size=3)
    assert len(open_split(config).train) == 3 and len(read) == 16
    metadata = images / "metadata.jsonl"
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[:7]))
    assert len(open_split(config).train) == 2 and len(read) == 23


def test_a_policy_is_used_without_its_data(make_config, tmp_path):
    images = folder(tmp_path / "d", count=8)
    config = make_config(dataset__directory=str(images), last__num_updates=1)
    image = (images / "a/0.png").read_bytes()
    runs.train(config, tmp_path / "run")
    shutil.rmtree(images)
    loaded = restoring.load(tmp_path / "run", trust_modules=True)
    ((completed,),) = loaded.generate(["Which color?"], [image])
    assert completed.log_prob < 0
    with pytest.raises(ValueError, match=r"dataset.directory|does not exist"):
        loaded.evaluate("test")
    with pytest.raises(ValueError, match=r"dataset.directory|does not exist"):
        evaluate(tmp_path / "run", trust_modules=True)


def digests(records):
    return {info.digest for info in records.images}


def test_held_out_records_are_never_learned_from(make_config):
    split = open_split(make_config())
    asked = {prompt for update in range(6) for prompt in split.train.batch(update).prompts}
    held_out = [set(part.read(range(2)).prompts) for part in (split.validation, split.test)]
    assert len(asked) == 6 and not asked & (held_out[0] | held_out[1])
    assert len(held_out[0]) == len(held_out[1]) == 2 and not held_out[0] & held_out[1]
    # Whoever compares seeds compares them on the same records.
    other = open_split(make_config(seed=1))
    for name in ("train", "validation", "test"):
        assert digests(getattr(other, name)) == digests(getattr(split, name))
    assert not np.array_equal(other.train.batch(0).records, split.train.batch(0).records)
    assert digests(open_split(make_config(dataset__split_seed=1)).test) != digests(split.test)


def test_weights_leave_records_out_of_training_alone(make_config, tmp_path):
    config, path = make_config(), tmp_path / "weights.jsonl"
    plain = open_split(config)
    parts = {name: x for part in plain for name, x in zip(part.names, part.digests, strict=True)}
    out = {plain.train.names[0], plain.test.names[0]}
    rows = [SampleWeight(name, digest, float(name not in out)) for name, digest in parts.items()]
    weights_lib.write(path, rows)
    weighted_config = make_config(dataset__weights=str(path))
    weighted = problems.make(weighted_config)
    assert weighted.weighted_records.names == plain.train.names[1:]
    assert weighted.records.test.names == plain.test.names
    assert weighted.records.validation.names == plain.validation.names
    before = weighted.dependencies()
    weights_lib.write(
        path, [row._replace(weight=row.weight * (1 + i)) for i, row in enumerate(rows)]
    )
    after = problems.make(weighted_config).dependencies()
    assert [name for name in after if after[name] != before[name]] == ["weights"]
    weights_lib.write(path, [row._replace(digest="x") for row in rows])
    with pytest.raises(InvalidData, match="dataset.weights=.* for other contents of"):
        problems.make(weighted_config).stage("grpo")


def test_only_training_needs_the_file_of_weights(make_config, tmp_path):
    problem = problems.make(make_config(dataset__weights=str(tmp_path / "weights.jsonl")))
    problem.open_data()
    assert problem.splits["validation"] == len(problem.records.validation) > 0
    assert "weights" not in problem.dependencies()
    with pytest.raises(InvalidData, match="dataset.weights=.* cannot be read"):
        problem.stage("grpo")


def test_what_a_resumed_run_may_change_leaves_its_batches_as_they_were(make_config, tmp_path):
    config = make_config()
    batch = open_split(config).train.batch(5)
    may_change = problems.may_change(config)
    workdir_lib.claim_workdir(tmp_path, config, may_change=may_change)
    for name in ("run.max_to_keep", *(name for name in may_change if name not in ("run", "mesh"))):
        group, key = name.split(".")
        changed = make_config(**{f"{group}__{key}": config[group][key] + 3})
        workdir_lib.claim_workdir(tmp_path, changed, may_change=may_change)
        bitwise_equal(open_split(changed).train.batch(5)._asdict(), batch._asdict())
    # What would move records from one side to the other is another run.
    for name in ("validation_size", "test_size", "split_seed"):
        changed = make_config(**{f"dataset__{name}": 3})
        with pytest.raises(ValueError, match=f"dataset.{name}: . there, 3 now"):
            workdir_lib.claim_workdir(tmp_path, changed, may_change=may_change)


def test_a_test_folder_is_reported_if_it_has_no_image_of_training(make_config, tmp_path, capfd):
    tested = folder(tmp_path / "d", count=12)  # The first ten are those of training.
    lines = (tested / "metadata.jsonl").read_text().splitlines(keepends=True)
    changes = {"dataset__test_directory": str(tested), "dataset__test_size": 0}
    config = make_config(**changes)
    with pytest.raises(ValueError, match=r"10 of 12 records of dataset.test_directory have an im"):
        problems.make(config)
    (tested / "metadata.jsonl").write_text("".join([lines[10], lines[11], "{"]))
    config = make_config(**changes, dataset__max_rejected=0.4)
    problem = problems.make(config)
    split = problem.records
    assert split.test.read(range(2)).prompts == ("which of 10 ?", "which of 11 ?")
    assert len(split.train) == 8 and len(split.validation) == 2
    assert problem.splits == {"validation": 2, "test": 2}
    host_rewards.print_rejected(split)
    printed = capfd.readouterr().err
    assert "Rejected record of dataset.test_directory: metadata.jsonl:3" in printed
    assert "1 records of dataset.test_directory are left out." in printed


def test_an_evaluation_is_a_mean_over_all_answers_or_says_of_how_many_it_is_not():
    # Five answers: of one the first function failed, of two the second, which has no weight.
    nan = np.nan
    first = np.float32([[1], [2], [nan], [4], [5]])
    second = np.float32([[nan], [1], [nan], [1], [1]])
    applies = {"f": np.ones((5, 1), bool), "g": np.ones((5, 1), bool)}
    rewards = Rewards(2 * first, np.isfinite(first), {"f": first, "g": second}, applies, ())
    found = describe(rewards, "test", max_failed=0.2, weighted=["f"])
    assert found["failed_fraction"] == pytest.approx(0.2)
    assert found["return"] == 6 and found["reward/f"] == 3 and np.isnan(found["reward/g"])
    assert found["return_lo"] <= 6 <= found["return_hi"]
    lost = describe(rewards, "test", max_failed=0.19, weighted=["f"])
    assert lost["failed_fraction"] == pytest.approx(0.2)
    assert all(np.isnan(x) for name, x in lost.items() if name != "failed_fraction")
    # Where a function does not apply it has not failed: 1 and 1 of the last two, and nothing.
    some = np.array([[False], [False], [False], [True], [True]])
    partial = rewards._replace(applies={"f": ~some & some, "g": some})
    found = describe(partial, "test", max_failed=0.2, weighted=["f"])
    assert found["reward/g"] == 1 and np.isnan(found["reward/f"])
    none = rewards._replace(reward=0 * first * nan, valid=np.zeros((5, 1), bool))
    assert describe(none, "test", max_failed=0.9, weighted=["f"])["failed_fraction"] == 1


def test_an_evaluation_counts_failures_where_a_function_applies(capfd):
    # Of six answers the first function applies to the last four, and fails for one of them; the
    # second one, without weight, fails for the first two.
    nan, no, yes = np.nan, False, True
    first = np.float32([nan, nan, nan, 0, 1, 1])[:, None]
    second = np.float32([nan, nan, 1, 1, 1, 1])[:, None]
    applies = {"f": np.array([no, no, yes, yes, yes, yes])[:, None], "g": np.ones((6, 1), bool)}
    rewards = Rewards(first, np.isfinite(first), {"f": first, "g": second}, applies, ())
    found = describe(rewards, "test", max_failed=0.3, weighted=["f"])
    assert found["failed_fraction"] == 0.25 and found["return"] == pytest.approx(2 / 3)
    # All rewards are 0 or 1, so that the interval is Wilson's.
    low, high = found["return_lo"], found["return_hi"]
    assert (low, high) == pytest.approx(rate_interval([0, 1, 1], confidence=0.95)[1:])
    assert (
        describe(rewards._replace(reward=2 * first), "test", max_failed=0.3, weighted=["f"])[
            "return_hi"
        ]
        == 2
    )
    assert not capfd.readouterr().err
    # Where no function applies, nothing failed, and there is no return.
    nowhere = rewards._replace(
        reward=first * nan, valid=np.zeros((6, 1), bool), applies=applies | {"f": applies["f"] & no}
    )
    found = describe(nowhere, "test", max_failed=0.0, weighted=["f"])
    assert found["failed_fraction"] == 0 and np.isnan(found["return"])
    assert "no function with a weight applies" in capfd.readouterr().err


def test_the_code_of_a_package_is_all_of_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "a_package_of_rewards"
    (package / "sub").mkdir(parents=True)
    for name in ("__init__.py", "logic.py", "sub/more.py"):
        (package / name).write_text(f"NAME = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    codes = [dataset_options.source_code(f"{package.name}:f")]
    for name in ("logic.py", "sub/more.py"):
        (package / name).write_text("NAME = 'another'\n")
        codes.append(dataset_options.source_code(f"{package.name}:f"))
    (package / "logic.py").rename(package / "logics.py")
    codes.append(dataset_options.source_code(f"{package.name}:f"))
    assert len(set(codes)) == 4
    # A module is known by its own file.
    module = dataset_options.source_code(f"{package.name}.logics:f")
    assert module == b"NAME = 'another'\n"


def test_prompts_that_are_too_long_are_set_aside(make_config, tmp_path):
    good = folder(tmp_path / "d", count=8)  # Of which four are held out.
    lines = (good / "metadata.jsonl").read_text()
    long = {"file_name": "a/0.png", "prompt": "x" * 60, "answer": "y"}
    taken = {"file_name": "a/0.png", "prompt": "p", "answer": "y", "completion": "z"}
    text = "\n".join(map(json.dumps, (long, taken))) + "\n" + lines
    (good / "metadata.jsonl").write_text(text)
    config = make_config(dataset__directory=str(good), dataset__max_rejected=0.2)
    split = open_split(config)
    first, second = split.train.rejected
    assert first.name == "metadata.jsonl:1" and "dataset.prompt_tokens=64; raise it" in first.reason
    assert second.name == "metadata.jsonl:2" and "columns ['completion']" in second.reason
    assert "dataset.columns={'answer': 'completion'}" in second.reason
    config.dataset.max_rejected = 0.1
    with pytest.raises(ValueError, match="2 of 10 records cannot be used"):
        problems.make(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, r"'stages' is \(\)"),
        ({"stages": ("bc", "grpo")}, r"'stages' is \('bc', 'grpo'\)"),
        (
            {"stages": ("sft", "grpo"), "dataset__completion_tokens": 1},
            "answer '0' has 2 tokens, more than data",
        ),
        (
            {"stages": ("sft", "grpo"), "sft__trainable": "lora"},
            "sft.trainable='lora': 'lora' matches no leaf",
        ),
        ({"dataset__directory": ""}, "'dataset.directory' is ''"),
        ({"dataset__directory": "nowhere"}, r"nowhere/metadata.jsonl does not exist"),
        (
            {"dataset__columns": {"question": "q"}},
            "dataset.columns.question='q': give the name of the column of 'image', 'prompt', 'ans",
        ),
        ({"dataset__test_files": "x"}, "dataset.test_files='x' without dataset.test_directory"),
        ({"dataset__files": "x"}, "dataset.files='x' matches no file in"),
        ({"dataset__prompt_tokens": 8}, "dataset.prompt_tokens=8"),
        ({"model__checkpoint": None}, "model.checkpoint=None"),
        ({"rewards__functions": ()}, r"rewards.functions=\(\)"),
        ({"rewards__functions": (LENGTH, LENGTH)}, "without duplicates"),
        ({"rewards__functions": ("tests.reward_functions",)}, "'tests.reward_functions', which"),
        ({"rewards__functions": ("no_such_module:f",)}, "'no_such_module', which cannot be imp"),
        ({"rewards__functions": (f"{LENGTH}s",)}, "has no 'lengths'"),
        (
            {"rewards__functions": ("tests.reward_functions:solved",)},
            r"'tests.reward_functions:solved', whose parameter 'solution' .* are \['level'\]",
        ),
        (
            {"rewards__functions": ("mmrl_jax.rewards:length_bounds",)},
            "'max_length' is neither .* set it in rewards.options",
        ),
        ({"rewards__options": ({}, {})}, r"rewards.options=\(\{\}, \{\}\) must have one dict"),
        ({"rewards__options": (3,)}, r"'rewards.options' is \(3,\), but must be a tuple of dict"),
        (
            {"rewards__functions": ("mmrl_jax.rewards:number",), "rewards__options": ({"x": 1},)},
            r"rewards.options has 'x' for 'mmrl_jax.rewards:number', whose .* \['tolerance',",
        ),
        ({"rewards__functions": ("asyncio:sleep",)}, "'asyncio:sleep', which is asynchronous"),
        ({"rewards__weights": (1.0, 1.0)}, r"rewards.weights=\(1.0, 1.0\)"),
        ({"rewards__workers": 0}, "'rewards.workers' is 0"),
        ({"last__num_completions": 1}, "grpo.num_completions=1, but the stage 'grpo'"),
        ({"last__overlong_buffer": 5}, "grpo.overlong_buffer=5 is more than the 4 tokens"),
        ({"last__trainable": "lora"}, "grpo.trainable='lora': 'lora' matches no leaf"),
        ({"run__eval_episodes": 2}, "Unknown config key 'run.eval_episodes'"),
        (
            {"dataset__test_size": 8},
            r"dataset.validation_size=2, dataset.test_size=8: .* of 10 records of 10 images leave",
        ),
        ({"dataset__test_size": 0}, "dataset.test_size=0, dataset.test_directory=None: the test"),
        (
            {"dataset__test_directory": "x"},
            "dataset.test_size=2, dataset.test_directory='x': the t",
        ),
        ({"dataset__max_rejected": 1.0}, r"'dataset.max_rejected' is 1.0, but must be in \[0, 1\)"),
        ({"dataset__resize": "crop"}, "'dataset.resize' is 'crop'"),
        ({"rewards__max_failed": 1.0}, "'rewards.max_failed' is 1.0"),
    ],
)
def test_what_cannot_run_is_refused(changes, message, make_config):
    with pytest.raises(ValueError, match=message):
        problems.make(make_config(**changes))
