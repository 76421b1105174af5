"""Processes that call reward functions, and the calls that travel to them and back.

Reward functions run what a model wrote, so a worker is not trusted: it has a session of its own and
is killed with all that it has started, and what it sends counts only if it answers the call that
waits.
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

# Seconds for a process to start and to import the functions' modules, jax perhaps among them.
START_TIMEOUT_S = 120.0
# Characters of a reason.
REASON_LENGTH = 300

RewardFunction = Callable[..., Any]

_START = 0  # Number of the reply that a worker sends when it has started; calls count from 1.
_LIBRARIES = tuple(
    sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class WorkerLost(Exception):
    """A worker whose call has no result, and which must not be given another one."""


class Result(NamedTuple):
    """What came of a call.

    Attributes:
      value: that the function returned, a finite number; NaN where it failed.
      reason: why it failed, printable and short; None where it did not.
    """

    value: float
    reason: str | None


class _Call(NamedTuple):
    number: int
    name: str
    keywords: dict[str, Any]


class _Reply(NamedTuple):
    number: int  # Of the call.
    pid: int  # Of the worker: a fork of it may come back too.
    result: Result


class Worker:
    """A process that calls reward functions, one call at a time.

    Args:
      functions: name -> function, pickled.
      memory_mb: limit on the address space of the process, and of each that it starts, MiB.
      guard: kills the process at the end of this one.
    """

    def __init__(self, functions: bytes, memory_mb: int | None, guard: process_guard.Guard):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could have no children.
        self._process = context.Process(target=_serve, args=(theirs, functions, memory_mb))
        # A reward that uses JAX must not take the accelerator from the training.
        with _environment("JAX_PLATFORMS", "cpu"):
            self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self._leader, self._guard = process_guard.leader(self._process.pid), guard
        guard.started(self._leader)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._leader.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def await_start(self) -> None:
        """Waits until the functions are imported.

        Raises:
          RuntimeError: they cannot be.
        """
        with contextlib.suppress(WorkerLost):
            if self.connection.poll(START_TIMEOUT_S):
                self.receive(_START)
                return
        raise RuntimeError(
            "A process for reward functions did not start; see its error above. Their modules must "
            "be importable from there, within its memory_mb if it has a limit, and a script must "
            'guard its entry by if __name__ == "__main__".'
        )

    def send(self, number: int, name: str, keywords: dict[str, Any]) -> None:
        """Sends a call."""
        # A worker that has just died says so when its reply is received.
        with contextlib.suppress(OSError):
            self.connection.send(_Call(number, name, keywords))

    def receive(self, number: int) -> Result:
        """The result of a call that was sent, once the connection is ready.

        Raises:
          WorkerLost: the process died, or what it sent is no reply to this call.
        """
        try:
            reply = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost("the process that ran it died") from error
        except Exception:  # Whatever unpickling comes upon.
            reply = None
        if isinstance(reply, _Reply) and (reply.number, reply.pid) == (number, self.pid):
            return reply.result
        raise WorkerLost("the process that ran it sent something that is no reply to this call")

    def stop(self) -> None:
        """Kills the process and all that it has started."""
        process_guard.kill_all(self._leader)
        self._process.join()
        self._guard.ended(self._leader)
        self.connection.close()


class Workers:
    """Workers of the same functions, and the guard that outlives this process for their sake.

    Args:
      functions: name -> function.
      memory_mb: see `Worker`.
      count: how many there are, once `refill` was called.
    """

    def __init__(
        self, functions: Mapping[str, RewardFunction], memory_mb: int | None, *, count: int
    ):
        self._functions, self._memory_mb = pickle.dumps(dict(functions)), memory_mb
        self._guard = process_guard.Guard()
        self._count = count
        self.all: list[Worker] = []

    def refill(self) -> None:
        """Starts the workers that are missing, at the same time.

        Some are at first, and where one could not be replaced. For errors see
        `Worker.await_start`; what has not started is stopped then.
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
        """Stops a worker and starts another one; for errors see `refill`."""
        self.stop(worker)
        self.refill()
        return self.all[-1]

    def stop(self, worker: Worker) -> None:
        """Stops a worker; `refill` starts another one."""
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
    """Sets a variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _serve(connection: Connection, pickled: bytes, memory_mb: int | None) -> None:
    """Of a worker: answers calls until there are no more."""
    # Before anything of the user's runs, so that nothing of it is outside the session. Ctrl-C is
    # for the training, which ends its update first.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    pid = os.getpid()

    def reply(number: int, result: Result) -> None:
        if os.getpid() != pid:
            os._exit(1)  # A fork that the user's code has forgotten to end.
        connection.send(_Reply(number, pid, result))

    functions = pickle.loads(pickled)
    reply(_START, Result(0.0, None))
    with contextlib.suppress(EOFError):
        while True:
            call: _Call = connection.recv()
            reply(call.number, _result(functions[call.name], call.keywords))


def _result(function: RewardFunction, keywords: Mapping[str, Any]) -> Result:
    """Calls a function."""
    try:
        value = function(**keywords)
        number = _as_float(value)
        if number is not None and math.isfinite(number):
            return Result(number, None)
        return Result(math.nan, f"it returned {_text(repr, value)}, which is no finite number")
    except BaseException as error:  # Also SystemExit: the worker is not the function's to end.
        name = type(error).__name__
        return Result(math.nan, f"{name}: {_text(str, error)}{_place(error)}")


def _as_float(value: Any) -> float | None:
    """A real number of Python, NumPy, JAX or torch, also as an array of shape (); else None."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, (numbers.Real, decimal.Decimal)) else None


def _text(of: Callable[[Any], str], value: Any) -> str:
    """What `str` or `repr` says of a value of the user's, printable."""
    try:
        return printable(of(value))
    except Exception as error:
        return f"({type(error).__name__} in its {of.__name__})"


def _place(error: BaseException) -> str:
    """' (file:line)' of the last frame in code that is not a library's; '' where there is none."""
    frames = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if frame[0] != __file__]
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)] or frames
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def printable(text: str, length: int = REASON_LENGTH) -> str:
    """A text without line ends and control characters, and cut off where it is too long.

    A text of the user's or of the model's may hold escape sequences, which a terminal would follow.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length]
    )
    if len(shown) <= length and len(text) <= length:
        return shown
    return f"{shown[:length]}... ({len(text)} characters)"
