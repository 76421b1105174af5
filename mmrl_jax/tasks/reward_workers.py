"""Worker processes that call reward functions.

Reward functions may execute text that a model wrote, so that workers are not trusted. A worker runs
in a separate session and is killed with all of its descendants, and a message from it is accepted
only as the reply to the pending call.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import decimal
import math
import multiprocessing
from multiprocessing.connection import Connection
import numbers
import os
import pickle
import resource
import signal
import sysconfig
import traceback
from typing import Any, NamedTuple

from mmrl_jax.tasks import process_guard
from mmrl_jax.tasks.reward_signatures import RewardFunction

# Maximum time in which a worker starts and imports the modules of the functions, including jax.
START_TIMEOUT_S = 120.0
# Maximum number of characters of the reason of a failure.
REASON_LENGTH = 300

# Number of the reply that a worker sends when it has started. Calls are numbered from 1.
_START = 0
_LIBRARIES = tuple(
    sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class WorkerLost(Exception):
    """A call has no result because its worker died or misbehaved; the worker must be stopped."""


class Result(NamedTuple):
    """Result of a reward function for one completion.

    Attributes:
      value: Finite number that the function returned; NaN if it failed or does not apply.
      reason: Short printable reason why it failed; None if it did not fail.
      kind: The reason without the values of the call; None if it has none.
    """

    value: float
    reason: str | None
    kind: str | None = None


class Call(NamedTuple):
    """A call of a reward function.

    Attributes:
      name: Name of the function.
      keywords: Keyword arguments of the call.
      batch_size: Number of completions whose rewards a function with TRL's signature returns as a
        list; None for a function that returns the reward of one completion.
    """

    name: str
    keywords: dict[str, Any]
    batch_size: int | None

    @property
    def size(self) -> int:
        """Number of completions that the call is for."""
        return 1 if self.batch_size is None else self.batch_size

    def failed(self, reason: str, kind: str | None = None) -> tuple[Result, ...]:
        """Returns the results of the call if it fails as a whole."""
        return (Result(math.nan, reason, kind),) * self.size


class _Numbered(NamedTuple):
    number: int
    call: Call


class _Reply(NamedTuple):
    number: int  # Number of the call.
    pid: int  # Pid of the sender, which may be a fork of the worker.
    results: tuple[Result, ...]


class Worker:
    """A process that calls reward functions, one call at a time.

    Args:
      functions: Pickled dict of the functions by their names.
      memory_mb: Limit in MiB on the address space of the process and of each process that it
        starts; None for no limit.
      guard: Guard that kills the worker when this process ends.
    """

    def __init__(self, functions: bytes, memory_mb: int | None, guard: process_guard.Guard):
        context = multiprocessing.get_context("spawn")
        self.connection, worker_end = context.Pipe()
        # The process is not a daemon, because daemons must not have children.
        self._process = context.Process(target=_serve, args=(worker_end, functions, memory_mb))
        # A reward function that uses JAX must not claim the accelerator of the training.
        with _environment("JAX_PLATFORMS", "cpu"):
            self._process.start()
        worker_end.close()
        assert self._process.pid is not None
        self._handle, self._guard = process_guard.process_handle(self._process.pid), guard
        guard.started(self._handle)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._handle.pid

    def is_alive(self) -> bool:
        """Returns whether the process is running."""
        return self._process.is_alive()

    def await_start(self) -> None:
        """Waits until the worker has imported the functions.

        Raises:
          RuntimeError: If the worker does not start.
        """
        with contextlib.suppress(WorkerLost):
            if self.connection.poll(START_TIMEOUT_S):
                self.receive(_START, 0)
                return
        raise RuntimeError(
            "A worker process for reward functions did not start; see its error above. The modules "
            "of the functions must be importable in a new process, within its memory_mb if it has "
            'a limit, and a script must guard its entry point with if __name__ == "__main__".'
        )

    def send(self, number: int, call: Call) -> None:
        """Sends a call to the worker.

        Args:
          number: Number of the call, which its reply repeats.
          call: The call.
        """
        # The death of a worker is reported when its reply is received.
        with contextlib.suppress(OSError):
            self.connection.send(_Numbered(number, call))

    def receive(self, number: int, size: int) -> tuple[Result, ...]:
        """Receives the results of a call, once the connection is ready.

        Args:
          number: Number of the call.
          size: Number of results of the call.

        Raises:
          WorkerLost: If the process died, or its message is not the reply to this call.
        """
        try:
            reply = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost("the process that ran it died") from error
        except Exception:  # Unpickling untrusted data may raise any exception.
            reply = None
        if isinstance(reply, _Reply) and (reply.number, reply.pid) == (number, self.pid):
            if isinstance(reply.results, tuple) and len(reply.results) == size:
                return reply.results
        raise WorkerLost("the process that ran it sent a message that is not the reply to the call")

    def stop(self) -> None:
        """Kills the process and all of its descendants."""
        process_guard.kill_all(self._handle)
        self._process.join()
        self._guard.ended(self._handle)
        self.connection.close()


class Workers:
    """A set of workers for the same functions, and the guard that kills them if this process dies.

    Args:
      functions: Reward functions by their names.
      memory_mb: Limit in MiB on the address space of each process; None for no limit.
      count: Number of workers that `refill` starts.
    """

    def __init__(
        self, functions: Mapping[str, RewardFunction], memory_mb: int | None, *, count: int
    ):
        self._functions, self._memory_mb = pickle.dumps(dict(functions)), memory_mb
        self._guard = process_guard.Guard()
        self._count = count
        self.all: list[Worker] = []

    def refill(self) -> None:
        """Starts the missing workers concurrently.

        All workers are missing at first, and one is missing after a replacement has failed.

        Raises:
          RuntimeError: If a worker does not start. The workers of this call are stopped then.
        """
        started = [self._new() for _ in range(self._count - len(self.all))]
        try:
            for worker in started:
                worker.await_start()
        except BaseException:
            for worker in started:
                self.stop(worker)
            raise

    def replace(self, worker: Worker) -> Worker:
        """Stops a worker and starts a new one, which is returned.

        Raises:
          RuntimeError: If the new worker does not start.
        """
        self.stop(worker)
        self.refill()
        return self.all[-1]

    def stop(self, worker: Worker) -> None:
        """Stops a worker without a replacement; `refill` starts a new one."""
        self.all.remove(worker)
        worker.stop()

    def close(self) -> None:
        """Stops all workers and the guard."""
        for worker in list(self.all):
            self.stop(worker)
        self._guard.close()

    def _new(self) -> Worker:
        self.all.append(Worker(self._functions, self._memory_mb, self._guard))
        return self.all[-1]


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for the processes that are started within the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _serve(connection: Connection, pickled: bytes, memory_mb: int | None) -> None:
    """Main function of a worker: executes calls until the connection is closed."""
    # The session is created before any user code runs, so that all of it is in the session. Ctrl-C
    # must reach the training process only, which finishes its update first.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    pid = os.getpid()

    def reply(number: int, results: tuple[Result, ...]) -> None:
        if os.getpid() != pid:
            os._exit(1)  # This is a fork that user code has failed to end.
        connection.send(_Reply(number, pid, results))

    functions = pickle.loads(pickled)
    reply(_START, ())
    with contextlib.suppress(EOFError):
        while True:
            number, call = connection.recv()
            reply(number, _results(functions[call.name], call))


def _results(function: RewardFunction, call: Call) -> tuple[Result, ...]:
    """Calls a function and converts its value or exception to results."""
    try:
        value = function(**call.keywords)
        if call.batch_size is None:
            return (_result(value),)
        try:
            values = list(value)
        except TypeError:
            return call.failed(
                f"it returned {_text(repr, value)}, but must return a list with a reward for each "
                "completion, as its parameters are those of TRL",
                "it returned no list",
            )
        if len(values) != call.batch_size:
            return call.failed(
                f"it returned {len(values)} rewards for {call.batch_size} completions"
            )
        # None marks a completion to which the function does not apply.
        return tuple(Result(math.nan, None) if x is None else _result(x) for x in values)
    except BaseException as error:  # SystemExit is caught too: a function must not end the worker.
        name, location = type(error).__name__, _location(error)
        return call.failed(f"{name}: {_text(str, error)}{location}", f"{name}{location}")


def _result(value: Any) -> Result:
    number = _as_float(value)
    if number is not None and math.isfinite(number):
        return Result(number, None)
    reason = f"it returned {_text(repr, value)}, which is not a finite number"
    return Result(math.nan, reason, "it returned no finite number")


def _as_float(value: Any) -> float | None:
    """Converts a real number or a scalar array of NumPy, JAX or torch; None for other values."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, (numbers.Real, decimal.Decimal)) else None


def _text(convert: Callable[[Any], str], value: Any) -> str:
    """Applies `str` or `repr` to a user's value, which may raise, and makes the text printable."""
    try:
        return printable(convert(value))
    except Exception as error:
        return f"({type(error).__name__} in its {convert.__name__})"


def _location(error: BaseException) -> str:
    """Returns ' (file:line)' of the last traceback frame outside of libraries; '' if unknown."""
    frames = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if frame[0] != __file__]
    user_frames = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)] or frames
    return f" ({user_frames[-1][0]}:{user_frames[-1][1]})" if user_frames else ""


def printable(text: str, length: int = REASON_LENGTH) -> str:
    """Escapes line breaks and control characters of a text, and truncates it to `length`.

    Texts of users and models may contain escape sequences, which a terminal would execute.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length]
    )
    if len(escaped) <= length and len(text) <= length:
        return escaped
    return f"{escaped[:length]}... ({len(text)} characters)"
