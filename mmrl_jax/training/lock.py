"""The lock of a workdir, so that only one process at a time writes to it.

    workdir/lock.json    {"host": "a", "pid": 12, "process_started": 345, "since": ..., "beats": 6}

The owner increments `beats` periodically while it lives (a heartbeat). Another process on the same
host checks whether the owner still runs; a process on another host checks whether the heartbeat
continues. A bucket has no exclusive access, so that two processes that start within the same second
may both acquire the lock.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

from etils import epath
import numpy as np

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.distributed import multihost

NAME = "lock.json"
BEAT_S = 15.0  # Interval of the heartbeat.
# Time without a heartbeat after which an owner on another host counts as dead. A preempted pod
# restarts under another host name, and should not wait for long.
SILENCE_S = 60.0

# Time for which a process looks for the lock file that process 0 wrote to a shared directory.
VISIBLE_S = 30.0

_held: set[str] = set()  # Workdirs that the run of this process has locked.

Owner = dict[str, Any]


@contextlib.contextmanager
def locked(workdir: workdir_lib.PathLike) -> Iterator[None]:
    """Context manager that locks a workdir against other processes.

    It is reentrant within a process. In a run of several processes, all must use it, and process 0
    holds the lock for all of them.

    Raises:
        ValueError: In all processes, if another run has locked the workdir, a process cannot write
            to it, or does not share it with process 0.
    """
    directory = workdir_lib.as_path(workdir)
    path, name = directory / NAME, os.fspath(directory)
    if name in _held:
        yield
        return
    primary, owner = multihost.is_primary(), _this_process()
    multihost.on_all(lambda: _enter(path, owner) if primary else None)
    digest = multihost.gather(_digest(owner))[0]
    multihost.on_all(lambda: None if primary else _check_shared(path, digest))
    _held.add(name)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, owner, ended), daemon=True)
    if primary:
        beating.start()
    try:
        yield
    finally:
        _held.discard(name)
        if primary:
            ended.set()
            beating.join()
            # Errors are ignored, because a remaining lock is taken over by the next process.
            with contextlib.suppress(Exception), _exclusive(path):
                if _same(_read(path), owner):
                    path.unlink()


def _enter(path: epath.Path, owner: Owner) -> None:
    """Creates the workdir and acquires its lock."""
    workdir_lib.make_directory(path.parent)
    _acquire(path, owner)


def _digest(owner: Owner | None) -> np.ndarray:
    """Returns a digest of an owner, without its heartbeat, as uint8 [16]."""
    text = json.dumps({**(owner or {}), "beats": 0}, sort_keys=True)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)


def _check_shared(path: epath.Path, digest: np.ndarray) -> None:
    """Checks as another process than process 0 that this one sees the lock file of process 0.

    Raises:
        ValueError: If the workdir is not shared with process 0, or cannot be written.
    """
    deadline = time.monotonic() + VISIBLE_S
    while not np.array_equal(_digest(_read(path)), digest):
        # Network file systems show new files with a delay.
        if time.monotonic() > deadline:
            raise ValueError(
                f"Workdir {path.parent}: process 0 has written {NAME} there, but a process on "
                f"{socket.gethostname()} does not see it. Give a directory that all hosts share: "
                "gs://bucket/directory, or one on a network file system."
            )
        time.sleep(0.5)
    workdir_lib.make_directory(path.parent)


def _acquire(path: epath.Path, owner: Owner) -> None:
    """Writes the owner to the lock file as soon as no living process owns the lock."""
    watched, deadline = None, 0.0
    while True:
        with _exclusive(path):
            other = _read(path)
            remote = other is not None and other["host"] != owner["host"]
            silent = remote and other == watched and time.monotonic() > deadline
            if other is None or silent or not (remote or _is_alive(other)):
                if other is not None:
                    _tell(f"Took over {path.parent} from {_describe(other)}, which has ended.")
                workdir_lib.write_text(path, json.dumps(owner))
                return
        if not remote or watched not in (None, other):
            raise ValueError(
                f"Workdir {path.parent} is in use by {_describe(other)}: wait until it ends, stop "
                f"it, or give another workdir. If that process is not a run, delete {path}."
            )
        if watched is None:
            watched, deadline = other, time.monotonic() + SILENCE_S
            _tell(
                f"Workdir {path.parent} was in use by {_describe(other)}; waiting "
                f"{SILENCE_S:.0f} s to check whether that process still runs ..."
            )
        time.sleep(min(1.0, SILENCE_S / 10))


def _beat(path: epath.Path, owner: Owner, ended: threading.Event) -> None:
    """Increments the beats in the lock file until `ended` is set, or another process owns it."""
    beats = 0
    while not ended.wait(BEAT_S):
        beats += 1
        # A temporary failure of the storage must not end the heartbeat.
        with contextlib.suppress(Exception), _exclusive(path):
            other = _read(path)
            if other is not None and not _same(other, owner):
                _tell(
                    f"{path} is now owned by {_describe(other)}, which took over {path.parent} "
                    "because the heartbeat of this process was interrupted: stop one of the two, "
                    "because both write to it."
                )
                return
            workdir_lib.write_text(path, json.dumps(owner | {"beats": beats}))


@contextlib.contextmanager
def _exclusive(path: epath.Path) -> Iterator[None]:
    """Gives exclusive access to a lock file within the context, if the storage supports it."""
    if workdir_lib.is_remote(path):
        yield
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems cannot lock directories.
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _this_process() -> Owner:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": _started(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "beats": 0,
    }


def _read(path: epath.Path) -> Owner | None:
    """Returns the owner in a lock file; None if the file does not exist or is damaged."""
    try:
        owner = json.loads(path.read_bytes())
        return owner if {"host", "pid", "process_started", "since", "beats"} <= set(owner) else None
    except (OSError, ValueError, TypeError):
        return None


def _same(one: Owner | None, two: Owner) -> bool:
    return one is not None and (one | {"beats": 0}) == (two | {"beats": 0})


def _is_alive(owner: Owner) -> bool:
    """Returns whether the owner, a process of this host, still runs and its pid was not reused."""
    pid = owner["pid"]
    if not isinstance(pid, int) or pid == os.getpid():
        return False  # This process would have found its own lock in `_held`.
    if pathlib.Path("/proc/self/stat").exists():
        return owner["process_started"] is not None and _started(pid) == owner["process_started"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # The process belongs to another user.
    return True


def _started(pid: int) -> int | None:
    """Returns the start time of a process in clock ticks since boot; None if it has ended."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name before the last parenthesis may contain any character. A zombie counts as ended.
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def _describe(owner: Owner | None) -> str:
    assert owner is not None
    return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
