"""Rewards by Python functions: keywords, weights, and every way in which a call can fail."""

import os
import signal
import sys
import time
import types

import numpy as np
import pytest

from mmrl_jax.tasks.rewards import Pool, exact_match
from tests import reward_functions as user


@pytest.fixture(scope="module")
def pool():
    """Two functions; the weights are powers of two, so that sums are exact."""
    functions = {"awkward": user.awkward, "length": user.length}
    with Pool(functions, {"awkward": 2.0, "length": 0.25}, workers=2, timeout_s=20.0) as made:
        yield made


def ask(pool, completions):
    count = len(completions)
    return pool(["p"] * count, completions, ["a"] * count, [{}] * count)


def test_every_function_is_given_its_samples_keywords():
    functions = {"keywords": user.keywords, "exact": exact_match}
    with Pool(functions, {"keywords": 1.0, "exact": 10.0}, workers=1, timeout_s=20.0) as pool:
        scored = pool(
            ["p0", "p1"], [["a0", "A0 ", "a1"], ["a1", "a0", ""]], ["a0", "a1"],
            [{"bonus": 0.5}, {"bonus": 4.0}],
        )  # fmt: skip
    # keywords: the bonus alone, 0.5; and 1 + 2 + 4. exact: case and spaces aside.
    np.testing.assert_array_equal(scored.parts["keywords"], [[0.5] * 3, [7.0] * 3])
    np.testing.assert_array_equal(scored.parts["exact"], [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(scored.reward, [[10.5, 10.5, 0.5], [17, 7, 7]])
    assert scored.reward.dtype == np.float32 and scored.valid.all() and scored.failures == ()


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
        (0, 1): "KeyError: 'no such thing'",
        (0, 2): "it returned None, which is no finite number",
        (1, 0): "it returned nan, which is no finite number",
        (1, 1): "it returned '1', which is no finite number",
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
    assert "1e+38, with which the reward can leave float32" in large.reason
    assert huge.reason == "OverflowError: int too large to convert to float"
    with pytest.raises(RuntimeError, match=r"None of 1 samples.*can leave float32"):
        ask(pool, [["large"]])


def test_a_call_without_end_is_stopped_and_the_others_are_not():
    with Pool({"awkward": user.awkward}, {"awkward": 1.0}, workers=2, timeout_s=0.5) as pool:
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
    with Pool({"platform": user.platform}, {"platform": 1.0}, workers=1, timeout_s=20.0) as pool:
        assert ask(pool, [["x"]]).reward[0, 0] == 1.0
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"


def test_processes_end_with_the_pool():
    pool = Pool({"length": user.length}, {"length": 1.0}, workers=1, timeout_s=5.0)
    processes = [worker.process for worker in pool._workers]
    assert all(process.is_alive() for process in processes)
    pool.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, r"weights=\{\} must name exactly the functions \['length'\]"),
        ({"functions": {}, "weights": {}}, "there must be one"),
        ({"weights": {"length": float("nan")}}, r"weights\['length'\]=nan"),
        ({"weights": {"length": 1e39}}, r"weights\['length'\]=1e\+39"),
        ({"workers": 0}, "workers=0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"functions": {"length": lambda **_: 1.0}}, r"functions\['length'\].*top level"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    good = {"functions": {"length": user.length}, "weights": {"length": 1.0}}
    with pytest.raises(ValueError, match=message):
        Pool(**(good | {"workers": 1, "timeout_s": 1.0} | changes))


def test_ragged_samples_are_refused(pool):
    with pytest.raises(ValueError, match=r"are \[2, 2, 1, 2\] long"):
        pool(["p"] * 2, [["x"], ["y"]], ["a"], [{}] * 2)
    with pytest.raises(ValueError, match=r"groups of completions \[1, 2\]"):
        ask(pool, [["x"], ["y", "z"]])
    with pytest.raises(ValueError, match="columns has 'answer'"):
        pool(["p"], [["x"]], ["a"], [{"answer": "b"}])


def test_functions_that_other_processes_cannot_import_are_an_error(monkeypatch):
    module = types.ModuleType("here_alone")
    exec("def reward(**_): return 1.0", module.__dict__)
    monkeypatch.setitem(sys.modules, "here_alone", module)
    with pytest.raises(RuntimeError, match="did not start; see its error above"):
        Pool({"reward": module.reward}, {"reward": 1.0}, workers=1, timeout_s=5.0)


def test_ctrl_c_is_left_to_the_training(pool):
    workers = list(pool._workers)
    for worker in workers:
        os.kill(worker.process.pid, signal.SIGINT)
    scored = ask(pool, [["fine"] * 4])
    assert scored.valid.all() and pool._workers == workers
