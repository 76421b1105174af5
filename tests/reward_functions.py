"""Reward functions in a module, which worker processes import without jax."""

import concurrent.futures
import decimal
import fractions
import gc
import json
import math
from multiprocessing.connection import Connection
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from mmrl_jax.tasks import reward_workers
from mmrl_jax.tasks.rewards import on_failure


def length(*, prompt, completion, answer, **columns):
    return len(completion)


def keywords(*, prompt, completion, answer, finished, bonus):
    return float(prompt == "p1") + 2 * float(answer == "a1") + bonus + 100 * (not finished)


def plain(completion, scale):
    return scale * len(completion)


def platform(*, prompt, completion, answer):
    return float(os.environ["JAX_PLATFORMS"] == "cpu")


def awkward(*, prompt, completion, answer, **columns):
    """Behaves as its completion says."""
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "sleep":
        time.sleep(600)
    if completion == "exit":
        os._exit(3)
    if completion == "sys.exit":
        sys.exit(3)
    if completion == "library":
        json.loads("{")
    if completion == "long":
        raise ValueError("\x1b[2J" + "x" * 5_000_000)
    odd = {"none": None, "nan": float("nan"), "text": "1", "large": 1e38, "huge": 10**400}
    return odd.get(completion, 1.5)


def repeats(completion):
    """Fails with its completion in the reason, or returns what it says."""
    if completion.startswith("raise"):
        raise KeyError(completion)
    return {"huge": 3e38 * 10, "0.5": 0.5}.get(completion, completion)


def half(*, completion, **columns):
    """Returns one half as the type that its completion says, or a value that is not a number."""
    if completion == "jax":
        import jax.numpy as jnp

        return jnp.mean(jnp.array([0.25, 0.75], jnp.bfloat16))
    return {
        "float": 0.5,
        "Decimal": decimal.Decimal("0.5"),
        "Fraction": fractions.Fraction(1, 2),
        "numpy.float16": np.float16(0.5),
        "array of no axes": np.array(0.5),
        "bool": True,
        "numpy.bool": np.True_,
        "int": 1,
        "numpy.int8": np.int8(1),
        "complex": 0.5 + 0j,
        "numpy.complex64": np.complex64(0.5),
        "array of one axis": np.array([0.5]),
        "array of text": np.array("0.5"),
        "signaling": decimal.Decimal("sNaN"),
    }[completion]


def process(*, completion, note="", **columns):
    """Starts processes and behaves as its completion says; returns the pid of its worker."""
    if completion == "pool":
        with concurrent.futures.ProcessPoolExecutor(1) as pool:
            return pool.submit(math.fabs, -0.5).result()
    if completion == "start":
        waiting = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
        pids = [subprocess.Popen(waiting, start_new_session=own).pid for own in (False, True)]
        pathlib.Path(note).write_text(" ".join(map(str, [*pids, os.getpid()])), encoding="utf-8")
    if completion == "sleep":
        time.sleep(600)
    if completion == "fork" and not os.fork():
        # The child that nobody ends.
        pathlib.Path(note).write_text(str(os.getpid()), encoding="utf-8")
        return 99.0
    if completion == "forge":
        (connection,) = (x for x in gc.get_objects() if isinstance(x, Connection))
        result = reward_workers.Result(99.0, None)
        connection.send(reward_workers._Reply(1, os.getpid(), (result,)))
    if completion == "allocate":
        return np.empty(6 * 2**30, np.uint8).size / 2**30  # Address space, and no memory.
    return float(os.getpid())


@on_failure(-0.25)
def declared(*, completion, **columns):
    """Returns the number that the completion is, and raises if it is not a number."""
    return float(completion)


def at_odd_levels(*, prompt, completion, answer, level):
    """Fails for half of the records."""
    if level == 0:
        raise KeyError("no such level")
    return len(completion)


def never(*, prompt, completion, answer, **columns):
    raise ZeroDivisionError("always")


def solved(completions, solution, prompts, **columns):
    """Has TRL's signature; does not apply to records without a solution."""
    assert len(prompts) == len(completions) == len(solution) == len(columns["answer"])
    return [
        None if s is None else float(c == s) for c, s in zip(completions, solution, strict=True)
    ]


def tokens(completion_ids, level, note=None):
    """Has TRL's signature; returns 10 for a level and 1 for a token."""
    assert note in (None, [None] * len(level))
    return np.array([10 * x + len(ids) for ids, x in zip(completion_ids, level, strict=True)])


def awkward_list(completions, **columns):
    """Has TRL's signature, and behaves as the first completion says."""
    if completions[0] == "sleep":
        time.sleep(600)
    if completions[0] == "raise":
        raise KeyError("no such list")
    odd = {"short": [1.0], "number": 1.0, "nan": [2.0, float("nan")], "none": [None, None]}
    return odd.get(completions[0], [2.0, None])


class Scaled:
    """A callable object with TRL's signature, as its factories return."""

    def __init__(self, scale):
        self._scale = scale

    def __call__(self, completions, **kwargs):
        return [self._scale * len(text) for text in completions]


scaled = Scaled(3)


def at_odd_levels_list(completions, level):
    """Has TRL's signature; applies to half of the records."""
    return [1.0 if x else None for x in level]


def spoken(completions, prompts, **columns):
    """Has TRL's signature; tells messages from texts."""
    if isinstance(completions[0], str):
        assert prompts == ["p"] * len(completions)
        return list(map(len, completions))
    assert prompts == [[{"role": "user", "content": "p"}]] * len(completions)
    assert {completion[0]["role"] for completion in completions} == {"assistant"}
    return [-len(completion[0]["content"]) for completion in completions]


def of_messages(completions, prompts, level, **columns):
    """Has TRL's signature; returns 7 if prompts and completions are messages."""
    (message,) = prompts[0]
    right = message["role"] == "user" and message["content"].startswith("which of")
    return [7.0 if right and set(x[0]) == {"role", "content"} else 0.0 for x in completions]
