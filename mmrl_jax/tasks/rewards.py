"""Rewards from Python functions of the user, which are called in worker processes.

A reward function takes keyword arguments and returns a number:

    def length(*, prompt, completion, answer, finished, **columns) -> float:
        return -len(completion) / 100 if finished else -1.0

`finished` is False if the completion was truncated at the maximum number of tokens. A function
without `**columns` gets only the arguments that it has parameters for, and a column whose value is
None does not replace a default. The number may be a bool, int, float, Decimal or Fraction, or a
scalar or an array of shape () of NumPy, JAX or torch; it must be finite as a float32.

The host calls the function for every sample, after the program that generates and before the one
that updates. A call fails if it raises, returns any other value, or times out. Its sample is then
masked out, because a reward of 0 would penalize the policy for the failure. Some functions,
however, fail on bad completions: `json.loads` raises on text that is not JSON. If such samples were
masked out, the policy would never learn to avoid them. Such a function therefore declares the
result of a failed call:

    @on_failure(-1.0)
    def valid_json(*, completion, **columns) -> float:
        return float(set(json.loads(completion)) == {"answer"})

A function with a parameter `completions`, `prompts` or `completion_ids` has the signature of TRL's
`GRPOTrainer` instead, see `reward_signatures`:

    def solved(completions, solution, **columns) -> list[float | None]:
        return [None if s is None else float(c == s) for c, s in zip(completions, solution)]

It is called once for all completions of a prompt, so that a failed call masks out these, and its
results depend neither on the other prompts of a batch nor on the number of workers. Where it
returns None, the reward is the weighted sum of the other functions.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import itertools
import math
from multiprocessing import util
from multiprocessing.connection import Connection, wait
import pickle
import time
from typing import Any, NamedTuple, TypeVar

import numpy as np

# Configs of earlier versions name the function here.
from mmrl_jax.rewards import exact_match as exact_match
from mmrl_jax.tasks.reward_signatures import RESERVED, RewardFunction, read_signature
from mmrl_jax.tasks.reward_workers import Call, Result, Worker, WorkerLost, Workers
from mmrl_jax.tasks.samples import Message

FLOAT32_MAX = float(np.finfo(np.float32).max)

Function = TypeVar("Function", bound=RewardFunction)


def on_failure(value: float) -> Callable[[Function], Function]:
    """Decorator of a reward function that declares the result of a failed call.

    Args:
      value: Finite result of a failed call, which is stored as attribute `on_failure` of the
        function.
    """

    def declare(function: Function) -> Function:
        function.on_failure = value  # type: ignore[attr-defined]
        return function

    return declare


class NoRewards(RuntimeError):
    """No sample of a batch has a reward, so that there is nothing to learn from."""


class Failure(NamedTuple):
    """A failed call of a reward function.

    Attributes:
      prompt: Index of the prompt, in [0, B).
      completion: Index of the completion of the prompt, in [0, G).
      function: Name of the function.
      reason: Short printable reason: the exception, the invalid result, or the timeout.
      kind: The reason without the values of the call, such as the exception and its location.
      value: Result that the call counts as, the `on_failure` of the function; NaN if it has none.
    """

    prompt: int
    completion: int
    function: str
    reason: str
    kind: str
    value: float


class Rewards(NamedTuple):
    """Rewards of G completions for each of B prompts.

    Attributes:
      reward: Weighted sum of the results of the functions that apply, float32 [B, G]; NaN if one
        with nonzero weight and without `on_failure` failed, or none with nonzero weight applies.
      valid: Mask of the samples with a reward, bool [B, G]. The others must be left out of losses
        and statistics.
      parts: Results of each function before its weight, float32 [B, G]. A failed call has the
        `on_failure` of the function, or NaN if it has none. NaN where the function does not apply.
      applies: Mask of the samples to which each function applies, bool [B, G].
      failures: All failures.
    """

    reward: np.ndarray
    valid: np.ndarray
    parts: dict[str, np.ndarray]
    applies: dict[str, np.ndarray]
    failures: tuple[Failure, ...]

    @property
    def failed(self) -> float:
        """Fraction of the results that are failures, in [0, 1]."""
        return len(self.failures) / (self.reward.size * len(self.parts))


class _Batch(NamedTuple):
    """Arguments of a call of the pool, see `RewardWorkerPool.__call__`."""

    prompts: Sequence[str]
    completions: Sequence[Sequence[str]]
    answers: Sequence[str]
    columns: Sequence[Mapping[str, Any]]
    finished: np.ndarray
    messages: Sequence[Sequence[Message] | None]
    completion_ids: Sequence[Sequence[Sequence[int]]] | None


def _no_rewards(
    samples: int, results: int, failures: Sequence[Failure], weighted: Collection[str]
) -> NoRewards:
    """Returns the error that none of the samples has a reward."""
    masking = (x for x in failures if x.function in weighted and math.isnan(x.value))
    first = next(masking, None)
    if first is None:
        return NoRewards(
            f"None of {samples} samples has a reward: every function with a nonzero weight "
            "returned None for them. Give a function that applies to each of the records."
        )
    return NoRewards(
        f"None of {samples} samples has a reward: {len(failures)} of {results} calls failed. The "
        f"first: {first.function}() of completion {first.completion} of prompt {first.prompt}: "
        f"{first.reason}"
    )


class RewardWorkerPool:
    """Pool of worker processes that call reward functions.

    The pool is a context manager; otherwise it must be closed with `close`. Processes are spawned,
    because a fork of a process with JAX's threads can hang: each worker imports the modules of the
    functions, and a script must guard its entry point with `if __name__ == "__main__"`. Processes
    that a function starts are killed with their worker when a call times out, when the pool is
    closed or garbage-collected, and when this process ends for any reason. See
    `process_guard.kill_all` for the exceptions.

    Args:
      functions: Reward functions by their names. They must be importable, which excludes lambdas
        and functions of a notebook.
      weights: Weights of the functions in the reward by their names. A function of weight 0 is
        called for its metric only. At least one weight must not be 0.
      workers: Number of worker processes.
      timeout_s: Maximum duration of a call in seconds.
      memory_mb: Limit in MiB on the address space of each worker and of each process that it
        starts; None for no limit. The address space exceeds the used memory: a function that
        imports jax may need several thousand MiB.
      columns: Names of the columns that some of the records have. A function with TRL's signature
        gets all of them, with None for a record that lacks a column.

    Raises:
      ValueError: If an argument is out of range, the names of functions and weights differ, or a
        function is not importable or has an invalid signature, see `read_signature`.
      RuntimeError: If a worker does not start.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        weights: Mapping[str, float],
        *,
        workers: int,
        timeout_s: float,
        memory_mb: int | None = None,
        columns: Iterable[str] = (),
    ):
        if not functions or set(functions) != set(weights):
            raise ValueError(
                f"weights={dict(weights)} must name exactly the functions {list(functions)}, and "
                "there must be at least one."
            )
        for name, weight in weights.items():
            if not abs(weight) <= FLOAT32_MAX:
                raise ValueError(f"weights[{name!r}]={weight} must be a finite float32.")
        if not any(weights.values()):
            raise ValueError(f"weights={dict(weights)} are all 0; at least one must not be.")
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
                    f"functions[{name!r}]={function!r} cannot be sent to another process "
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
        self._signatures = {name: read_signature(name, x) for name, x in functions.items()}
        self._columns = frozenset(columns)
        self._numbers = itertools.count(1)
        self._workers = Workers(functions, memory_mb, count=workers)
        # The priority closes the workers before multiprocessing joins its processes at exit.
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

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the reward functions."""
        return tuple(self._weights)

    @property
    def takes_ids(self) -> bool:
        """Whether a function is called with the token ids of the completions."""
        return any(x.batched and x.accepts("completion_ids") for x in self._signatures.values())

    def close(self) -> None:
        """Stops all worker processes."""
        self._finalize()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        answers: Sequence[str],
        columns: Sequence[Mapping[str, Any]],
        finished: Sequence[Sequence[bool]] | np.ndarray | None = None,
        *,
        messages: Sequence[Sequence[Message] | None] | None = None,
        completion_ids: Sequence[Sequence[Sequence[int]]] | None = None,
        allow_none: bool = False,
    ) -> Rewards:
        """Calls every function for every completion.

        Args:
          prompts: Texts of the B prompts.
          completions: Texts of the G completions of each of the B prompts.
          answers: Reference answers of the B prompts.
          columns: Further keyword arguments for each of the B prompts.
          finished: Whether each of the [B, G] completions has ended rather than been truncated;
            None if all have ended.
          messages: Each prompt as messages, or None if it is a text. As in TRL, functions with its
            signature get these messages, and each completion as a list of one message.
          completion_ids: Token ids of the completions, which functions with TRL's signature get;
            None if they are unknown.
          allow_none: Whether no error is raised if no sample has a reward.

        Raises:
          ValueError: If the lengths of the arguments differ, or a column has a reserved name.
          NoRewards: If no sample has a reward and `allow_none` is False.
          RuntimeError: If the replacement of a worker does not start.
        """
        lengths = [len(x) for x in (prompts, completions, answers, columns)]
        groups = {len(group) for group in completions}
        if len(set(lengths)) != 1 or len(groups) != 1 or not min(groups):
            raise ValueError(
                f"prompts, completions, answers and columns are {lengths} long, and the groups of "
                f"completions {sorted(groups)}; give B of each, and G > 0 completions of each."
            )
        for reserved in RESERVED:
            if any(reserved in row for row in columns):
                raise ValueError(f"columns has {reserved!r}, which is an argument of every call.")
        shape = lengths[0], groups.pop()
        ended = np.ones(shape, bool) if finished is None else np.asarray(finished, bool)
        if ended.shape != shape:
            raise ValueError(f"finished has the shape {ended.shape}, but completions {shape}.")
        messages = [None] * shape[0] if messages is None else messages
        batch = _Batch(prompts, completions, answers, columns, ended, messages, completion_ids)
        calls, cells = [], []
        for b, name in itertools.product(range(shape[0]), self._weights):
            if self._signatures[name].batched:
                calls.append(self._group_call(name, batch, b))
                cells.append([(name, b, g) for g in range(shape[1])])
                continue
            for g in range(shape[1]):
                calls.append(self._call(name, batch, b, g))
                cells.append([(name, b, g)])
        results = self._run(calls)
        flat = zip(itertools.chain(*cells), itertools.chain(*results), strict=True)
        return self._rewards(shape, dict(flat), allow_none)

    def _call(self, name: str, batch: "_Batch", b: int, g: int) -> Call:
        """Returns the call of a function for completion g of prompt b."""
        arguments = {
            **batch.columns[b],
            "prompt": batch.prompts[b],
            "completion": batch.completions[b][g],
            "answer": batch.answers[b],
            "finished": bool(batch.finished[b, g]),
        }
        signature = self._signatures[name]
        # Tables have None where a record has no column: the default, or the option, holds there.
        passed = {
            key: value
            for key, value in arguments.items()
            if signature.accepts(key) and not (value is None and key in signature.optional)
        }
        return Call(name, passed, None)

    def _group_call(self, name: str, batch: "_Batch", b: int) -> Call:
        """Returns the call of a function with TRL's signature for all completions of prompt b."""
        row, texts, messages = batch.columns[b], batch.completions[b], batch.messages[b]
        same = {key: row.get(key) for key in {*self._columns, *row}} | {
            "prompts": batch.prompts[b] if messages is None else list(messages),
            "answer": batch.answers[b],
        }
        completions = (
            list(texts)
            if messages is None
            else [[{"role": "assistant", "content": text}] for text in texts]
        )
        arguments = {key: [value] * len(texts) for key, value in same.items()} | {
            "completions": completions,
            "finished": batch.finished[b].tolist(),
        }
        if batch.completion_ids is not None:
            arguments["completion_ids"] = [list(ids) for ids in batch.completion_ids[b]]
        accepts = self._signatures[name].accepts
        return Call(name, {k: x for k, x in arguments.items() if accepts(k)}, len(texts))

    def _rewards(
        self,
        shape: tuple[int, int],
        results: Mapping[tuple[str, int, int], Result],
        allow_none: bool,
    ) -> Rewards:
        """Returns the rewards from the result of each function for each completion (b, g)."""
        parts = {name: np.full(shape, np.nan, np.float32) for name in self._weights}
        applies = {name: np.ones(shape, bool) for name in self._weights}
        failures = []
        for (name, b, g), (value, reason, kind) in results.items():
            scale = max(1.0, abs(self._weights[name])) * len(self._weights)
            if reason is None and abs(value) * scale > FLOAT32_MAX:
                reason = f"it returned {value}, with which the reward can exceed float32"
                kind = "it returned a large number"
            if reason is not None:
                value = self._on_failure[name]
                failures.append(Failure(b, g, name, reason, kind or reason, value))
            elif math.isnan(value):
                applies[name][b, g] = False
            parts[name][b, g] = value
        # Functions of weight 0 are left out, because 0 times NaN would mask out their samples.
        weights = {name: np.float32(weight) for name, weight in self._weights.items() if weight}
        zero = np.float32(0)
        reward = np.stack(
            [np.where(applies[name], w * parts[name], zero) for name, w in weights.items()]
        ).sum(axis=0)
        any_applies = np.any([applies[name] for name in weights], axis=0)
        reward = np.where(any_applies, reward, np.float32(np.nan))
        valid = np.isfinite(reward)
        if not valid.any() and not allow_none:
            raise _no_rewards(reward.size, len(results), failures, set(weights))
        return Rewards(reward, valid, parts, applies, tuple(failures))

    def _run(self, calls: Sequence[Call]) -> list[tuple[Result, ...]]:
        """Runs the calls on the workers, and returns the results of each."""
        self._workers.refill()
        results: list[tuple[Result, ...]] = [()] * len(calls)
        waiting, idle = deque(range(len(calls))), deque(self._workers.all)
        # Index in `calls`, number of the call, deadline and worker of each pending call.
        busy: dict[Connection, tuple[int, int, float, Worker]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    i, worker = waiting.popleft(), idle.popleft()
                    if not worker.is_alive():
                        worker = self._workers.replace(worker)
                    number = next(self._numbers)
                    worker.send(number, calls[i])
                    busy[worker.connection] = i, number, time.monotonic() + self._timeout_s, worker
                soonest = min(deadline for _, _, deadline, _ in busy.values())
                ready = wait(list(busy), max(0.0, soonest - time.monotonic()))
                # The time is read once, so that no call times out while another worker is replaced.
                now = time.monotonic()
                for connection in [*busy]:
                    i, number, deadline, worker = busy[connection]
                    if connection not in ready and now <= deadline:
                        continue
                    del busy[connection]
                    try:
                        if connection not in ready:
                            raise WorkerLost(f"no result within {self._timeout_s} s")
                        results[i] = worker.receive(number, calls[i].size)
                    except WorkerLost as lost:
                        results[i] = calls[i].failed(str(lost))
                        worker = self._workers.replace(worker)
                    idle.append(worker)
        except BaseException:
            # Busy workers are stopped, because their late replies would reach the next batch, which
            # starts new workers.
            for *_, worker in busy.values():
                self._workers.stop(worker)
            raise
        return results
