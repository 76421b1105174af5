"""Tests of rewards from Python functions: keywords, weights, and failures of calls."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from mmrl_jax.tasks import reward_workers
from mmrl_jax.tasks.reward_signatures import check_columns, read_signature, with_options
from mmrl_jax.tasks.rewards import NoRewards, RewardWorkerPool, exact_match, on_failure
from tests import reward_functions as user


@pytest.fixture(scope="module")
def pool():
    """Returns a pool of two functions, whose weights are powers of two for exact sums."""
    functions = {"awkward": user.awkward, "length": user.length}
    with RewardWorkerPool(
        functions, {"awkward": 2.0, "length": 0.25}, workers=2, timeout_s=20.0
    ) as made:
        yield made


def ask(pool, completions):
    count = len(completions)
    return pool(["p"] * count, completions, ["a"] * count, [{}] * count)


def test_every_function_is_given_its_samples_keywords():
    functions = {"keywords": user.keywords, "exact": exact_match}
    with RewardWorkerPool(
        functions, {"keywords": 1.0, "exact": 10.0}, workers=1, timeout_s=20.0
    ) as pool:
        scored = pool(
            ["p0", "p1"], [["a0", "A0 ", "a1"], ["a1", "a0", ""]], ["a0", "a1"],
            [{"bonus": 0.5}, {"bonus": 4.0}], [[True, True, True], [True, False, True]],
        )  # fmt: skip
    # keywords: the bonus alone, 0.5; and 1 + 2 + 4, with 100 for the truncated one. exact: case and
    # spaces aside.
    np.testing.assert_array_equal(scored.parts["keywords"], [[0.5] * 3, [7.0, 107.0, 7.0]])
    np.testing.assert_array_equal(scored.parts["exact"], [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(scored.reward, [[10.5, 10.5, 0.5], [17, 107, 7]])
    assert scored.reward.dtype == np.float32 and scored.valid.all() and scored.failures == ()


def test_a_function_gets_what_it_has_parameters_for_and_no_value_replaces_no_option():
    functions = {"plain": with_options("plain", user.plain, {"scale": 2.0})}
    rows = [{}, {"scale": None, "level": 1}, {"scale": 5.0}]
    with RewardWorkerPool(functions, {"plain": 1.0}, workers=1, timeout_s=20.0) as pool:
        scored = pool(["p"] * 3, [["abc"]] * 3, ["a"] * 3, rows)
    np.testing.assert_array_equal(scored.reward, [[6], [6], [15]])


def line_of(text):
    """Returns the number of the first line of the user's module that has this text."""
    lines = pathlib.Path(user.__file__).read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, start=1) if text in line)


def test_a_call_that_fails_masks_its_sample_and_says_why(pool):
    scored = ask(pool, [["fine", "raise", "none"], ["nan", "text", "exit"]])
    # 2 * 1.5 + 0.25 * 4 letters.
    np.testing.assert_array_equal(scored.reward, [[4, np.nan, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(scored.valid, [[True, False, False], [False] * 3])
    # The other function's results are there all the same.
    np.testing.assert_array_equal(scored.parts["length"], [[4, 5, 4], [3, 4, 4]])
    reasons = {(f.prompt, f.completion): f.reason for f in scored.failures}
    assert {f.function for f in scored.failures} == {"awkward"}
    assert reasons == {
        (0, 1): f"KeyError: 'no such thing' ({user.__file__}:{line_of('no such thing')})",
        (0, 2): "it returned None, which is not a finite number",
        (1, 0): "it returned nan, which is not a finite number",
        (1, 1): "it returned '1', which is not a finite number",
        (1, 2): "the process that ran it died",
    }
    # Whoever died has a successor.
    np.testing.assert_array_equal(ask(pool, [["fine"] * 8]).reward, [[4.0] * 8])


def test_what_float32_cannot_hold_is_a_failure_and_no_infinity(pool):
    # 1e38 fits into float32 (3.4e38), twice its weight of 2 and a second function do not.
    scored = ask(pool, [["fine", "large", "huge"]])
    np.testing.assert_array_equal(scored.reward, [[4, np.nan, np.nan]])
    np.testing.assert_array_equal(scored.parts["awkward"], [[1.5, np.nan, np.nan]])
    large, huge = scored.failures
    assert "1e+38, with which the reward can exceed float32" in large.reason
    assert huge.reason == "OverflowError: int too large to convert to float"
    with pytest.raises(RuntimeError, match=r"None of 1 samples.*can exceed float32"):
        ask(pool, [["large"]])


def test_a_call_without_end_is_stopped_and_the_others_are_not():
    with RewardWorkerPool(
        {"awkward": user.awkward}, {"awkward": 1.0}, workers=2, timeout_s=0.5
    ) as pool:
        start = time.monotonic()
        scored = ask(pool, [["fine", "sleep", "fine", "fine"]])
        assert time.monotonic() - start < 60
        np.testing.assert_array_equal(scored.reward, [[1.5, np.nan, 1.5, 1.5]])
        assert [(f.completion, f.reason) for f in scored.failures] == [
            (1, "no result within 0.5 s")
        ]
        np.testing.assert_array_equal(ask(pool, [["fine"] * 4]).reward, [[1.5] * 4])


def test_nothing_but_failures_is_an_error(pool):
    with pytest.raises(RuntimeError, match=r"None of 2 samples.*2 of 4 calls.*KeyError: 'no such"):
        ask(pool, [["raise", "raise"]])
    assert ask(pool, [["raise", "fine"]]).valid.sum() == 1


def test_reward_functions_leave_the_accelerator_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with RewardWorkerPool(
        {"platform": user.platform}, {"platform": 1.0}, workers=1, timeout_s=20.0
    ) as pool:
        assert ask(pool, [["x"]]).reward[0, 0] == 1.0
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"


def test_every_kind_of_real_number_is_one():
    halves = ["float", "Decimal", "Fraction", "numpy.float16", "array of no axes", "jax"]
    ones = ["bool", "numpy.bool", "int", "numpy.int8"]
    none = ["complex", "numpy.complex64", "array of one axis", "array of text", "signaling"]
    with RewardWorkerPool({"half": user.half}, {"half": 1.0}, workers=1, timeout_s=60.0) as pool:
        scored = ask(pool, [halves + ones + none])
    np.testing.assert_array_equal(scored.reward, [[0.5] * 6 + [1.0] * 4 + [np.nan] * 5])
    reasons = [failure.reason for failure in scored.failures]
    assert all("which is not a finite number" in reason for reason in reasons[:4])
    assert reasons[4].startswith("ValueError: cannot convert signaling NaN")


def test_reasons_are_short_and_printable_and_say_where(pool):
    scored = ask(pool, [["long", "library", "sys.exit", "fine"]])
    long, library, ended = (failure.reason for failure in scored.failures)
    # Three characters of the escape sequence are its code, which counts as four.
    assert long.startswith(r"ValueError: \x1b[2Jxxxx") and len(long) < 500
    assert "x... (5000004 characters)" in long
    assert long.endswith(f"({user.__file__}:{line_of('5_000_000')})")
    # The last frame is in json's decoder, the last one of the user's own where it was called.
    assert library.endswith(f"({user.__file__}:{line_of('json.loads')})")
    assert ended == f"SystemExit: 3 ({user.__file__}:{line_of('sys.exit(3)')})"


def test_failures_at_the_same_place_are_of_one_kind_whatever_they_say():
    with RewardWorkerPool({"f": user.repeats}, {"f": 1.0}, workers=1, timeout_s=20.0) as pool:
        scored = ask(pool, [["raise 1", "raise 2", "a", "b", "huge", "0.5"]])
    assert len({failure.reason for failure in scored.failures}) == 5
    kinds = [failure.kind for failure in scored.failures]
    raised, again, text, other, large = kinds
    assert raised == again and raised.startswith(f"KeyError ({user.__file__}:")
    assert text == other and len(set(kinds)) == 3


def test_a_function_without_weight_masks_nothing():
    functions, weights = {"length": user.length, "watched": user.awkward}, {"length": 0.5}
    with RewardWorkerPool(functions, weights | {"watched": 0.0}, workers=1, timeout_s=20.0) as pool:
        scored = ask(pool, [["raise", "fine"]])
    np.testing.assert_array_equal(scored.reward, [[2.5, 2.0]])
    assert scored.valid.all()
    np.testing.assert_array_equal(scored.parts["watched"], [[np.nan, 1.5]])
    assert len(scored.failures) == 1 and scored.failed == 0.25


def test_a_function_declares_what_its_failure_counts_as():
    functions = {"declared": user.declared, "length": user.length}
    with RewardWorkerPool(
        functions, {"declared": 2.0, "length": 1.0}, workers=1, timeout_s=20.0
    ) as pool:
        scored = ask(pool, [["4", "none", "nan", "1e39"]])
    # 2 * 4 + 1; and of the failures 2 * -0.25 + 4, 3 and 4 letters.
    np.testing.assert_array_equal(scored.reward, [[9, 3.5, 2.5, 3.5]])
    assert scored.valid.all() and [f.value for f in scored.failures] == [-0.25] * 3
    assert scored.failures[0].reason.startswith("ValueError: could not convert string to float")


@pytest.fixture(scope="module")
def processes():
    """Returns a pool of one worker with a function that starts processes."""
    functions = {"process": user.process}
    with RewardWorkerPool(functions, {"process": 1.0}, workers=1, timeout_s=60.0) as made:
        yield made


def starting(pool, completions, note):
    scored = pool(["p"], [completions], ["a"], [{"note": str(note)}])
    return scored.reward[0].tolist(), [failure.reason for failure in scored.failures]


def await_end(pid):
    """Waits until a process has ended; a zombie counts as ended."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            return
        if stat.rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is still running.")


def pids_of(note):
    return [int(pid) for pid in note.read_text(encoding="utf-8").split()]


def test_a_function_may_use_multiprocessing(processes):
    assert starting(processes, ["pool"], "") == ([0.5], [])


def test_a_fork_that_comes_back_answers_nothing(processes, tmp_path):
    pid = float(processes._workers.all[0].pid)
    note = tmp_path / "note"
    assert starting(processes, ["fork"], note)[0] == [pid]
    until = time.monotonic() + 60
    while not (note.exists() and note.read_text(encoding="utf-8")) and time.monotonic() < until:
        time.sleep(0.05)
    await_end(pids_of(note)[0])
    assert starting(processes, ["x", "pool", "x"], "") == ([pid, 0.5, pid], [])


def test_a_reply_to_another_call_masks_the_sample_and_ends_the_worker(processes):
    before = float(processes._workers.all[0].pid)
    (first, *rest), reasons = starting(processes, ["x", "forge", "pool", "x"], "")
    assert first == before and np.isnan(rest[0]) and rest[1] == 0.5
    assert rest[2] == float(processes._workers.all[0].pid) != before
    assert reasons == ["the process that ran it sent a message that is not the reply to the call"]
    assert starting(processes, ["pool", "x"], "")[0] == [0.5, rest[2]]


def test_a_reply_with_other_results_than_those_of_the_call_ends_the_worker():
    one = reward_workers.Result(1.0, None)
    worker = object.__new__(reward_workers.Worker)
    worker._handle = types.SimpleNamespace(pid=7)

    def receive(results):
        reply = reward_workers._Reply(3, 7, results)
        worker.connection = types.SimpleNamespace(recv=lambda: reply)
        return worker.receive(3, 2)

    assert receive((one, one)) == (one, one)
    for results in ((one,), (one,) * 3, None, 5):
        with pytest.raises(reward_workers.WorkerLost, match="not the reply to the call"):
            receive(results)


def test_what_a_call_without_end_has_started_ends_with_it(processes, tmp_path, monkeypatch):
    note = tmp_path / "note"
    starting(processes, ["start"], note)
    pids = pids_of(note)
    assert len(pids) == 3 and all(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
    monkeypatch.setattr(processes, "_timeout_s", 0.5)
    with pytest.raises(NoRewards, match="no result within 0.5 s"):
        starting(processes, ["sleep"], "")
    for pid in pids:
        await_end(pid)


OWNER = """
import sys, time
from mmrl_jax.tasks.rewards import RewardWorkerPool
from tests import reward_functions as user

note, end = sys.argv[1:]
if __name__ == "__main__":
    pool = RewardWorkerPool({"process": user.process}, {"process": 1.0}, workers=1, timeout_s=60.0)
    pool(["p"], [["start"]], ["a"], [{"note": note}])
    if end == "collected":
        del pool
    print("ready", flush=True)
    if end == "raises":
        raise KeyError(end)
    if end != "exits":
        time.sleep(600)
"""


@pytest.mark.parametrize("end", ["killed", "raises", "exits", "collected"])
def test_nothing_outlives_its_owner(end, tmp_path):
    note, script = tmp_path / "note", tmp_path / "owner.py"
    script.write_text(OWNER, encoding="utf-8")
    owner = subprocess.Popen(
        [sys.executable, str(script), str(note), end],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert owner.stdout.readline() == b"ready\n"
        if end == "killed":
            owner.kill()
        if end in ("exits", "raises"):  # It does not wait for its workers.
            assert owner.wait(60) == (end == "raises")
        for pid in pids_of(note):
            await_end(pid)
    finally:
        owner.kill()
        owner.communicate()


def test_memory_has_a_limit():
    def made(memory_mb):
        functions, weights = {"process": user.process}, {"process": 1.0}
        return RewardWorkerPool(functions, weights, workers=1, timeout_s=60.0, memory_mb=memory_mb)

    with made(None) as pool:
        assert ask(pool, [["allocate"]]).reward.tolist() == [[6.0]]
    with made(4096) as pool, pytest.raises(NoRewards, match="process.*MemoryError"):
        ask(pool, [["allocate"]])


def test_processes_end_with_the_pool():
    pool = RewardWorkerPool({"length": user.length}, {"length": 1.0}, workers=1, timeout_s=5.0)
    workers = list(pool._workers.all)
    assert all(worker.is_alive() for worker in workers)
    pool.close()
    assert not any(worker.is_alive() for worker in workers)
    pool.close()  # Again does nothing.


@on_failure(float("nan"))
def unable(**_):
    return 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, r"weights=\{\} must name exactly the functions \['length'\]"),
        ({"functions": {}, "weights": {}}, "at least one"),
        ({"weights": {"length": float("nan")}}, r"weights\['length'\]=nan"),
        ({"weights": {"length": 1e39}}, r"weights\['length'\]=1e\+39"),
        ({"weights": {"length": 0.0}}, r"weights=\{'length': 0.0\} are all 0"),
        ({"workers": 0}, "workers=0"),
        ({"memory_mb": 0}, "memory_mb=0"),
        ({"functions": {"length": unable}}, r"functions\['length'\] has on_failure=nan"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"functions": {"length": lambda **_: 1.0}}, r"functions\['length'\].*top level"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    good = {"functions": {"length": user.length}, "weights": {"length": 1.0}}
    with pytest.raises(ValueError, match=message):
        RewardWorkerPool(**(good | {"workers": 1, "timeout_s": 1.0} | changes))


def test_ragged_samples_are_refused(pool):
    with pytest.raises(ValueError, match=r"are \[2, 2, 1, 2\] long"):
        pool(["p"] * 2, [["x"], ["y"]], ["a"], [{}] * 2)
    with pytest.raises(ValueError, match=r"groups of completions \[1, 2\]"):
        ask(pool, [["x"], ["y", "z"]])
    with pytest.raises(ValueError, match="columns has 'answer'"):
        pool(["p"], [["x"]], ["a"], [{"answer": "b"}])
    with pytest.raises(
        ValueError, match=r"finished has the shape \(1, 2\), but completions \(1, 1"
    ):
        pool(["p"], [["x"]], ["a"], [{}], [[True, True]])


def test_functions_that_other_processes_cannot_import_are_an_error(monkeypatch):
    module = types.ModuleType("here_alone")
    exec("def reward(**_): return 1.0", module.__dict__)
    monkeypatch.setitem(sys.modules, "here_alone", module)
    with pytest.raises(RuntimeError, match="did not start; see its error above"):
        RewardWorkerPool({"reward": module.reward}, {"reward": 1.0}, workers=1, timeout_s=5.0)


def test_ctrl_c_is_left_to_the_training(pool):
    workers = list(pool._workers.all)
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    scored = ask(pool, [["fine"] * 4])
    assert scored.valid.all() and pool._workers.all == workers


def test_workers_that_cannot_be_replaced_are_missing_only_for_a_while(monkeypatch):
    def without_memory(*_):
        raise OSError("Cannot allocate memory")

    functions = {"exact_match": exact_match}
    with RewardWorkerPool(functions, {"exact_match": 1.0}, workers=1, timeout_s=60.0) as pool:
        (worker,) = pool._workers.all
        worker._process.kill()
        worker._process.join()
        with monkeypatch.context() as patch:
            patch.setattr(reward_workers, "Worker", without_memory)
            with pytest.raises(OSError, match="Cannot allocate memory"):
                pool(["p"], [["1"]], ["x"], [{}])
        # The next call starts what is missing.
        assert pool(["p"], [["x", "y"]], ["x"], [{}]).reward.tolist() == [[1.0, 0.0]]


def test_trl_functions_get_the_completions_of_a_prompt_as_lists():
    functions = {
        "solved": user.solved, "tokens": user.tokens, "scaled": user.scaled, "own": user.length,
    }  # fmt: skip
    weights = {"solved": 100.0, "tokens": 1.0, "scaled": 0.0, "own": 0.5}
    # The second record has no solution, neither has a 'note'.
    with RewardWorkerPool(
        functions, weights, workers=2, timeout_s=20.0, columns=("solution", "level", "note")
    ) as pool:
        assert pool.takes_ids
        scored = pool(
            ["p0", "p1"], [["a", "bb"], ["cc", "d"]], ["a0", "a1"],
            [{"solution": "bb", "level": 1}, {"level": 2}], [[True, False]] * 2,
            completion_ids=[[[5, 6, 7], [5]], [[], [5, 6]]],
        )  # fmt: skip
    nan = np.nan
    np.testing.assert_array_equal(scored.parts["solved"], [[0, 1], [nan, nan]])
    np.testing.assert_array_equal(scored.parts["tokens"], [[13, 11], [20, 22]])
    np.testing.assert_array_equal(scored.parts["scaled"], [[3, 6], [6, 3]])
    np.testing.assert_array_equal(scored.applies["solved"], [[True] * 2, [False] * 2])
    # 0 + 13 + 1/2; 100 + 11 + 1; of the second record without the first function 20 + 1, 22 + 1/2.
    np.testing.assert_array_equal(scored.reward, [[13.5, 112], [21, 22.5]])
    assert scored.valid.all() and scored.failures == ()


def test_trl_functions_that_fail_mask_the_completions_of_their_prompt_and_say_why():
    functions = {"awkward": user.awkward_list, "length": user.length}
    with RewardWorkerPool(
        functions, {"awkward": 2.0, "length": 1.0}, workers=2, timeout_s=2.0
    ) as pool:
        firsts = ["fine", "raise", "short", "number", "nan", "none", "sleep"]
        scored = ask(pool, [[first, "xx"] for first in firsts])
    nan = np.nan
    # 2 * 2 + 4 letters; where the function does not apply the letters alone.
    expected = [[8, 2], [nan] * 2, [nan] * 2, [nan] * 2, [7, nan], [4, 2], [nan] * 2]
    np.testing.assert_array_equal(scored.reward, expected)
    np.testing.assert_array_equal(scored.valid, np.isfinite(expected))
    reasons = {(f.prompt, f.completion): f.reason for f in scored.failures}
    error = f"KeyError: 'no such list' ({user.__file__}:{line_of('no such list')})"
    no_list = (
        "it returned 1.0, but must return a list with a reward for each completion, as its "
        "parameters are those of TRL"
    )
    assert reasons == {
        **{(1, g): error for g in range(2)},
        **{(2, g): "it returned 1 rewards for 2 completions" for g in range(2)},
        **{(3, g): no_list for g in range(2)},
        (4, 1): "it returned nan, which is not a finite number",
        **{(6, g): "no result within 2.0 s" for g in range(2)},
    }
    assert scored.failed == 9 / 28


def test_samples_to_which_no_function_applies_have_no_reward():
    with RewardWorkerPool(
        {"solved": user.solved, "length": user.length}, {"solved": 1.0, "length": 0.0},
        workers=1, timeout_s=20.0,
    ) as pool:  # fmt: skip
        scored = pool(["p"] * 2, [["x"]] * 2, ["a"] * 2, [{"solution": "x"}, {"solution": None}])
        np.testing.assert_array_equal(scored.reward, [[1], [np.nan]])
        np.testing.assert_array_equal(scored.valid, [[True], [False]])
        assert scored.failures == () and scored.failed == 0
        with pytest.raises(NoRewards, match="None of 1 samples .* returned None for them"):
            pool(["p"], [["x"]], ["a"], [{"solution": None}])


def parameters_of(text):
    space = {}
    exec(f"{text}: return 1.0", space)
    return space["f"]


@pytest.mark.parametrize(
    ("text", "batched", "required"),
    [
        ("def f(*, completion, answer, **columns)", False, ("completion", "answer")),
        ("def f(**columns)", False, ()),
        ("def f(completion, answer=None)", False, ("completion",)),
        ("def f(completions, **kwargs)", True, ("completions",)),
        ("def f(prompts, completions, answer, log_extra=None)", True,
         ("prompts", "completions", "answer")),
        ("def f(completion_ids, **kwargs)", True, ("completion_ids",)),
        ("def f(completions, completion=None)", True, ("completions",)),
    ],
)  # fmt: skip
def test_a_signature_is_known_by_its_parameters(text, batched, required):
    signature = read_signature("m:f", parameters_of(text))
    assert (signature.batched, signature.required) == (batched, required)
    assert (
        signature.accepts("anything") == ("**" in text) and signature.accepts(required[0])
        if required
        else True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(completion, /)", "'m:f', whose parameter 'completion' is positional only.*'/'"),
        ("def f(completion, completions)", "'completion' is for one completion and .'completions'"),
        ("def f(prompt, completions)", "'prompt' is for one completion"),
        ("def f(completions, trainer_state)", "'trainer_state' is not passed.* trainer_state=None"),
        ("def f(completions, images, **columns)", "'images' is not passed"),
        ("async def f(completions)", "'m:f', which is asynchronous; wrap it"),
    ],
)  # fmt: skip
def test_signatures_that_cannot_be_called_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_signature("m:f", parameters_of(text))


def test_parameters_that_no_record_gives_are_refused():
    trl = read_signature("m:f", parameters_of("def f(completions, finished, answer, solution)"))
    check_columns("m:f", trl, {"solution", "x"})
    with pytest.raises(
        ValueError, match=r"'m:f', whose parameter 'solution' .*, which are \['x'\]; add"
    ):
        check_columns("m:f", trl, {"x"})
    ours = read_signature("m:f", parameters_of("def f(completion, level, note='')"))
    check_columns("m:f", ours, {"level"})
    with pytest.raises(ValueError, match="'level' is neither"):
        check_columns("m:f", ours, {"note"})


def test_trl_functions_get_messages_where_the_prompt_has_them():
    functions = {"spoken": user.spoken}
    message = {"role": "user", "content": "p"}
    with RewardWorkerPool(functions, {"spoken": 1.0}, workers=1, timeout_s=20.0) as pool:
        scored = pool(
            ["p", "p"], [["ab", "c"]] * 2, ["a"] * 2, [{}] * 2, messages=[(message,), None]
        )
    # The letters of a message are negative.
    np.testing.assert_array_equal(scored.reward, [[-2, -1], [2, 1]])
