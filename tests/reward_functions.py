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
        connection.send(reward_workers._Reply(1, os.getpid(), reward_workers.Result(99.0, None)))
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
