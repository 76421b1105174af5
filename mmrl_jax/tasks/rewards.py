"""Rewards by a user's own Python functions, each call in a process that can be stopped.

A reward function takes keywords and returns a number:

    def length(*, prompt, completion, answer, **columns) -> float:
        return -len(completion) / 100

Between the program that generates and the one that updates, the host calls it for every sample. A
call that raises, returns no finite number, or takes too long is reported, and its sample masked
out: it is never counted as a reward of 0, for which a policy would be punished.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import math
import multiprocessing
from multiprocessing.connection import Connection, wait
import numbers
import os
import pickle
import signal
import time
from typing import Any, NamedTuple

import numpy as np

# Seconds for a process to start and to import the functions' modules, jax perhaps among them.
START_TIMEOUT_S = 120.0

FLOAT32_MAX = float(np.finfo(np.float32).max)

RewardFunction = Callable[..., float]


class NoRewards(RuntimeError):
    """Not a single sample has a reward: there is nothing to learn from."""


class Failure(NamedTuple):
    """A call without a result.

    Attributes:
      prompt: number of the prompt, of B.
      completion: number of the completion, of G.
      function: name of the function.
      reason: the exception, or what was returned, or the time that was up.
    """

    prompt: int
    completion: int
    function: str
    reason: str


class Rewards(NamedTuple):
    """Of G completions of each of B prompts.

    Attributes:
      reward: float32 [B, G], weighted sum of the functions' results; NaN where one failed.
      valid: bool [B, G], False where the reward is NaN: to be left out of losses and statistics.
      parts: each function's results before its weight, float32 [B, G], NaN where it failed.
      failures: every call that failed.
    """

    reward: np.ndarray
    valid: np.ndarray
    parts: dict[str, np.ndarray]
    failures: tuple[Failure, ...]


def exact_match(*, prompt: str, completion: str, answer: str, **columns: Any) -> float:
    """1 where the completion is the answer, spaces around them and case aside; else 0."""
    return float(completion.strip().casefold() == answer.strip().casefold())


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class Pool:
    """Processes that call reward functions; a context manager, or to be closed by `close`.

    Processes are spawned, not forked, for a fork of a process with JAX's threads can hang: the
    functions' modules are imported anew, and a script must guard its entry by
    `if __name__ == "__main__"`.

    Args:
      functions: name -> function; each must be importable, so neither a lambda nor of a notebook.
      weights: name -> weight of its result in the reward.
      workers: number of processes.
      timeout_s: seconds for one call.

    Raises:
      ValueError: an argument is out of range, the names differ, or a function is not importable.
      RuntimeError: a process does not start.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        weights: Mapping[str, float],
        *,
        workers: int,
        timeout_s: float,
    ):
        if not functions or set(functions) != set(weights):
            raise ValueError(
                f"weights={dict(weights)} must name exactly the functions {list(functions)}, of "
                "which there must be one."
            )
        for name, weight in weights.items():
            if not abs(weight) <= FLOAT32_MAX:
                raise ValueError(f"weights[{name!r}]={weight} must be a finite float32.")
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1.")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be above 0.")
        for name, function in functions.items():
            try:
                pickle.dumps(function)
            except Exception as error:
                raise ValueError(
                    f"functions[{name!r}]={function!r} cannot be given to another process "
                    f"({error}); define it at the top level of a module."
                ) from error
        self._functions, self._weights = dict(functions), dict(weights)
        self._timeout_s = timeout_s
        self._workers: list[_Worker] = []
        try:
            started = [self._spawn() for _ in range(workers)]
            for worker in started:
                self._await_start(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops all processes."""
        for worker in list(self._workers):
            self._stop(worker)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        answers: Sequence[str],
        columns: Sequence[Mapping[str, Any]],
        *,
        allow_none: bool = False,
    ) -> Rewards:
        """Calls every function for every completion.

        Args:
          prompts: B texts.
          completions: B times G texts.
          answers: B texts.
          columns: B mappings, further keywords of the functions.
          allow_none: whether it is no error that no sample has a reward.

        Raises:
          ValueError: the lengths differ.
          NoRewards: not a single sample has a reward, and that is not allowed.
          RuntimeError: a process does not start again.
        """
        lengths = [len(x) for x in (prompts, completions, answers, columns)]
        groups = {len(group) for group in completions}
        if len(set(lengths)) != 1 or len(groups) != 1 or not min(groups):
            raise ValueError(
                f"prompts, completions, answers and columns are {lengths} long, and the groups of "
                f"completions {sorted(groups)}; give B of each, and G > 0 completions of each."
            )
        for taken in ("prompt", "completion", "answer"):
            if any(taken in own for own in columns):
                raise ValueError(f"columns has {taken!r}, which functions are given already.")
        shape = lengths[0], groups.pop()
        calls = [(name, b, g) for b, g in np.ndindex(*shape) for name in self._functions]

        def keywords(b: int, g: int) -> dict[str, Any]:
            own = {"prompt": prompts[b], "completion": completions[b][g], "answer": answers[b]}
            return {**columns[b], **own}

        results = self._run([(name, keywords(b, g)) for name, b, g in calls])
        parts = {name: np.full(shape, np.nan, np.float32) for name in self._functions}
        failures = []
        for (name, b, g), (value, reason) in zip(calls, results, strict=True):
            scale = max(1.0, abs(self._weights[name])) * len(self._functions)
            if reason is None and abs(value) * scale > FLOAT32_MAX:
                reason = f"it returned {value}, with which the reward can leave float32"
            if reason is None:
                parts[name][b, g] = value
            else:
                failures.append(Failure(b, g, name, reason))
        weighted = [np.float32(self._weights[name]) * part for name, part in parts.items()]
        reward = np.stack(weighted).sum(axis=0)
        valid = np.isfinite(reward)
        if not valid.any() and not allow_none:
            first = failures[0]
            raise NoRewards(
                f"None of {reward.size} samples has a reward: {len(failures)} of {len(calls)} "
                f"calls failed. The first: {first.function}() of completion {first.completion} of "
                f"prompt {first.prompt}: {first.reason}"
            )
        return Rewards(reward, valid, parts, tuple(failures))

    def _run(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[float, str | None]]:
        """For each call its value, and a reason where it failed."""
        results: list[tuple[float, str | None]] = [(math.nan, "not called")] * len(calls)
        waiting, idle = deque(range(len(calls))), deque(self._workers)
        busy: dict[Connection, tuple[int, float, _Worker]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    number, worker = waiting.popleft(), idle.popleft()
                    if not worker.process.is_alive():
                        worker = self._replace(worker)
                    worker.connection.send(calls[number])
                    busy[worker.connection] = number, time.monotonic() + self._timeout_s, worker
                soonest = min(deadline for _, deadline, _ in busy.values())
                ready = wait(list(busy), max(0.0, soonest - time.monotonic()))
                # Taken once: a call may finish in time while another's process is replaced.
                now = time.monotonic()
                for connection in [*busy]:
                    number, deadline, worker = busy[connection]
                    if connection in ready:
                        try:
                            results[number] = connection.recv()
                            idle.append(worker)
                        except (EOFError, OSError):
                            results[number] = math.nan, "the process that ran it died"
                            idle.append(self._replace(worker))
                        del busy[connection]
                    elif now > deadline:
                        results[number] = math.nan, f"no result within {self._timeout_s} s"
                        idle.append(self._replace(worker))
                        del busy[connection]
        except BaseException:
            # Whoever is still busy would answer to the next batch's calls.
            for _, _, worker in busy.values():
                self._replace(worker)
            raise
        return results

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._functions), daemon=True)
        # A reward that uses JAX must not take the accelerator from the training.
        with _environment("JAX_PLATFORMS", "cpu"):
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _await_start(self, worker: _Worker) -> None:
        with contextlib.suppress(EOFError, OSError):
            if worker.connection.poll(START_TIMEOUT_S) and worker.connection.recv():
                return
        raise RuntimeError(
            "A process for reward functions did not start; see its error above. Their modules must "
            "be importable from there, and a script must guard its entry by "
            'if __name__ == "__main__".'
        )

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def _replace(self, worker: _Worker) -> _Worker:
        self._stop(worker)
        new = self._spawn()
        self._await_start(new)
        return new


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _serve(connection: Connection, functions: Mapping[str, RewardFunction]) -> None:
    """Of a process: answers calls until there are no more."""
    # Ctrl-C is for the training, which ends its update first, and all processes get it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send(True)
    with contextlib.suppress(EOFError):
        while True:
            name, keywords = connection.recv()
            connection.send(_call(functions[name], keywords))


def _call(function: RewardFunction, keywords: Mapping[str, Any]) -> tuple[float, str | None]:
    try:
        value = function(**keywords)
        if isinstance(value, (numbers.Real, np.number, np.bool_)) and math.isfinite(value):
            return float(value), None
        return math.nan, f"it returned {value!r}, which is no finite number"
    except Exception as error:
        return math.nan, f"{type(error).__name__}: {error}"
