"""Rewards by a user's own Python functions, each call in a process that can be stopped.

A reward function takes keywords and returns a number:

    def length(*, prompt, completion, answer, finished, **columns) -> float:
        return -len(completion) / 100 if finished else -1.0

`finished` says whether the completion ended by itself: it is False where the completion was
truncated at its most tokens. It is left out of calls of a function without such a parameter, or
`**columns`. A number is a bool, int, float, Decimal or Fraction, or a scalar or an
array of shape () of NumPy, JAX or torch; it must be finite as a float32.

Between the program that generates and the one that updates, the host calls the function for every
sample. A call fails if it raises, returns anything else, or takes too long. Its sample is then
masked out, not given a reward of 0, for which a policy would be punished. Some functions fail
exactly where the completion is bad: `json.loads` raises on text that is no JSON. If such samples
were masked out, the policy would never learn to avoid them, so the function declares what a failed
call counts as:

    @on_failure(-1.0)
    def valid_json(*, completion, **columns) -> float:
        return float(set(json.loads(completion)) == {"answer"})
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
import inspect
import itertools
import math
from multiprocessing import util
from multiprocessing.connection import Connection, wait
import pickle
import time
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mmrl_jax.tasks.reward_workers import Result, RewardFunction, Worker, WorkerLost, Workers

FLOAT32_MAX = float(np.finfo(np.float32).max)
# Keywords of every call, which no column of a record may be named.
GIVEN = ("prompt", "completion", "answer", "finished")

Function = TypeVar("Function", bound=RewardFunction)


def on_failure(value: float) -> Callable[[Function], Function]:
    """Declares, as a decorator of a reward function, the result that a failed call counts as.

    Args:
      value: finite; it is kept as the function's attribute `on_failure`.
    """

    def declare(function: Function) -> Function:
        function.on_failure = value  # type: ignore[attr-defined]
        return function

    return declare


class NoRewards(RuntimeError):
    """Not a single sample has a reward: there is nothing to learn from."""


class Failure(NamedTuple):
    """A call without a result.

    Attributes:
      prompt: number of the prompt, of B.
      completion: number of the completion, of G.
      function: name of the function.
      reason: the exception, or what was returned, or the time that was up; short and printable.
      value: what the call counts as, the function's `on_failure`; NaN without one.
    """

    prompt: int
    completion: int
    function: str
    reason: str
    value: float


class Rewards(NamedTuple):
    """Of G completions of each of B prompts.

    Attributes:
      reward: float32 [B, G], weighted sum of the functions' results; NaN where one failed that has
        a weight other than 0 and no `on_failure`.
      valid: bool [B, G], False where the reward is NaN: to be left out of losses and statistics.
      parts: each function's results before its weight, float32 [B, G]; where it failed its
        `on_failure`, or NaN without one.
      failures: every call that failed.
    """

    reward: np.ndarray
    valid: np.ndarray
    parts: dict[str, np.ndarray]
    failures: tuple[Failure, ...]

    @property
    def failed(self) -> float:
        """Share of the calls that failed, in [0, 1]."""
        return len(self.failures) / (self.reward.size * len(self.parts))


def exact_match(*, prompt: str, completion: str, answer: str, **columns: Any) -> float:
    """1 where the completion is the answer, spaces around them and case aside; else 0."""
    return float(completion.strip().casefold() == answer.strip().casefold())


def _takes(function: RewardFunction, name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # Of some functions in C.
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class RewardWorkerPool:
    """Processes that call reward functions; a context manager, or to be closed by `close`.

    Processes are spawned, not forked, for a fork of a process with JAX's threads can hang: the
    functions' modules are imported anew, and a script must guard its entry by
    `if __name__ == "__main__"`. A function may start processes of its own. They are killed with
    their worker when a call takes too long, when the pool is closed or collected, and when this
    process ends, in whatever way; see `process_guard.kill_all` for what it cannot find.

    Args:
      functions: name -> function; each must be importable, so neither a lambda nor of a notebook.
      weights: name -> weight of its result in the reward; a function of weight 0 is called for its
        part alone. One weight at least is not 0.
      workers: number of processes.
      timeout_s: seconds for one call.
      memory_mb: limit in MiB on the address space of each process, those that functions start
        among them; None for no limit. Address space is more than memory in use: a function that
        imports jax may need several thousand.

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
        memory_mb: int | None = None,
    ):
        if not functions or set(functions) != set(weights):
            raise ValueError(
                f"weights={dict(weights)} must name exactly the functions {list(functions)}, of "
                "which there must be one."
            )
        for name, weight in weights.items():
            if not abs(weight) <= FLOAT32_MAX:
                raise ValueError(f"weights[{name!r}]={weight} must be a finite float32.")
        if not any(weights.values()):
            raise ValueError(f"weights={dict(weights)} are all 0, so that nothing is rewarded.")
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1.")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be above 0.")
        if memory_mb is not None and memory_mb < 1:
            raise ValueError(f"memory_mb={memory_mb} must be at least 1, or None.")
        for name, function in functions.items():
            try:
                pickle.dumps(function)
            except Exception as error:
                raise ValueError(
                    f"functions[{name!r}]={function!r} cannot be given to another process "
                    f"({error}); define it at the top level of a module."
                ) from error
            declared = getattr(function, "on_failure", 0.0)
            if not isinstance(declared, (int, float)) or not abs(declared) <= FLOAT32_MAX:
                raise ValueError(
                    f"functions[{name!r}] has on_failure={declared!r}; give a number that is "
                    "finite as a float32."
                )
        self._weights, self._timeout_s = dict(weights), timeout_s
        self._on_failure = {
            name: float(getattr(function, "on_failure", math.nan))
            for name, function in functions.items()
        }
        self._without = {
            name: () if _takes(function, "finished") else ("finished",)
            for name, function in functions.items()
        }
        self._numbers = itertools.count(1)
        self._workers = Workers(functions, memory_mb, count=workers)
        # At the end of this process it comes before multiprocessing waits for its processes.
        self._finalize = util.Finalize(self, self._workers.close, exitpriority=10)
        try:
            self._workers.refill()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RewardWorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops all processes."""
        self._finalize()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        answers: Sequence[str],
        columns: Sequence[Mapping[str, Any]],
        finished: Sequence[Sequence[bool]] | None = None,
        *,
        allow_none: bool = False,
    ) -> Rewards:
        """Calls every function for every completion.

        Args:
          prompts: B texts.
          completions: B times G texts.
          answers: B texts.
          columns: B mappings, further keywords of the functions.
          finished: B times G, False for a completion that was truncated; None if none was.
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
        for taken in GIVEN:
            if any(taken in own for own in columns):
                raise ValueError(f"columns has {taken!r}, which functions are given already.")
        shape = lengths[0], groups.pop()
        ended = np.ones(shape, bool) if finished is None else np.asarray(finished, bool)
        if ended.shape != shape:
            raise ValueError(f"finished has the shape {ended.shape}, but completions {shape}.")
        calls = [(name, b, g) for b, g in np.ndindex(*shape) for name in self._weights]

        def keywords(name: str, b: int, g: int) -> dict[str, Any]:
            given = (prompts[b], completions[b][g], answers[b], bool(ended[b, g]))
            found = {**columns[b], **dict(zip(GIVEN, given, strict=True))}
            return {key: x for key, x in found.items() if key not in self._without[name]}

        results = self._run([(name, keywords(name, b, g)) for name, b, g in calls])
        parts = {name: np.full(shape, np.nan, np.float32) for name in self._weights}
        failures = []
        for (name, b, g), (value, reason) in zip(calls, results, strict=True):
            scale = max(1.0, abs(self._weights[name])) * len(self._weights)
            if reason is None and abs(value) * scale > FLOAT32_MAX:
                reason = f"it returned {value}, with which the reward can leave float32"
            if reason is not None:
                value = self._on_failure[name]
                failures.append(Failure(b, g, name, reason, value))
            parts[name][b, g] = value
        # 0 times NaN is NaN: what has no weight must not decide which samples are masked out.
        weights = {name: np.float32(weight) for name, weight in self._weights.items() if weight}
        reward = np.stack([weight * parts[name] for name, weight in weights.items()]).sum(axis=0)
        valid = np.isfinite(reward)
        if not valid.any() and not allow_none:
            first = next(x for x in failures if x.function in weights and math.isnan(x.value))
            raise NoRewards(
                f"None of {reward.size} samples has a reward: {len(failures)} of {len(calls)} "
                f"calls failed. The first: {first.function}() of completion {first.completion} of "
                f"prompt {first.prompt}: {first.reason}"
            )
        return Rewards(reward, valid, parts, tuple(failures))

    def _run(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[Result]:
        """What comes of each call."""
        self._workers.refill()
        results = [Result(math.nan, "not called")] * len(calls)
        waiting, idle = deque(range(len(calls))), deque(self._workers.all)
        # Of those that work: which of the calls, its number, until when.
        busy: dict[Connection, tuple[int, int, float, Worker]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    i, worker = waiting.popleft(), idle.popleft()
                    if not worker.is_alive():
                        worker = self._workers.replace(worker)
                    number = next(self._numbers)
                    worker.send(number, *calls[i])
                    busy[worker.connection] = i, number, time.monotonic() + self._timeout_s, worker
                soonest = min(deadline for _, _, deadline, _ in busy.values())
                ready = wait(list(busy), max(0.0, soonest - time.monotonic()))
                # Taken once: a call may finish in time while another's process is replaced.
                now = time.monotonic()
                for connection in [*busy]:
                    i, number, deadline, worker = busy[connection]
                    if connection not in ready and now <= deadline:
                        continue
                    del busy[connection]
                    try:
                        if connection not in ready:
                            raise WorkerLost(f"no result within {self._timeout_s} s")
                        results[i] = worker.receive(number)
                    except WorkerLost as lost:
                        results[i] = Result(math.nan, str(lost))
                        worker = self._workers.replace(worker)
                    idle.append(worker)
        except BaseException:
            # Whoever is still busy would answer to the next batch's calls, which starts others.
            for *_, worker in busy.values():
                self._workers.stop(worker)
            raise
        return results
