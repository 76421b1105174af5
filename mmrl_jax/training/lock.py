"""The lock of a workdir: one process at a time writes there.

    workdir/lock.json    {"host": "a", "pid": 12, "process_started": 345, "since": ..., "beats": 6}

The owner counts its beats up for as long as it lives. Another process on the same host sees whether
the owner still runs; on another host it sees whether the beats go on. In a bucket nothing can be
changed by one process alone, so that two that start in the same second may both get the lock.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

from etils import epath
import jax

from mmrl_jax import workdir as workdir_lib

NAME = "lock.json"
BEAT_S = 15.0
# Seconds without a beat after which an owner on another host is gone: a pod that was preempted
# comes back under another name, and should not wait for long.
SILENCE_S = 60.0

_held: set[str] = set()  # By this process.

Owner = dict[str, Any]


@contextlib.contextmanager
def locked(workdir: workdir_lib.PathLike) -> Iterator[None]:
    """Keeps other processes from running in a workdir meanwhile.

    A process may do so within itself again. Of the processes of a multi-host run the first one has
    the lock for all.

    Raises:
        ValueError: Another process runs there, or the workdir cannot be written.
    """
    directory = workdir_lib.as_path(workdir)
    path, name = directory / NAME, os.fspath(directory)
    if jax.process_index() != 0 or name in _held:
        yield
        return
    workdir_lib.make_directory(directory)
    owner = _this_process()
    _acquire(path, owner)
    _held.add(name)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, owner, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        _held.discard(name)
        # A lock that cannot be removed is taken over later; the run has ended well all the same.
        with contextlib.suppress(Exception), _alone(path):
            if _same(_read(path), owner):
                path.unlink()


def _acquire(path: epath.Path, owner: Owner) -> None:
    """Writes the owner into the lock once nobody else's is there."""
    watched, until = None, 0.0
    while True:
        with _alone(path):
            other = _read(path)
            elsewhere = other is not None and other["host"] != owner["host"]
            silent = elsewhere and other == watched and time.monotonic() > until
            if other is None or silent or not (elsewhere or _is_alive(other)):
                if other is not None:
                    _tell(f"Took over {path.parent} from {_named(other)}, which is gone.")
                workdir_lib.write_text(path, json.dumps(owner))
                return
        if not elsewhere or watched not in (None, other):
            raise ValueError(
                f"Workdir {path.parent} is in use by {_named(other)}: wait until it ends, stop it, "
                f"or give another workdir. If it is no run at all, delete {path}."
            )
        if watched is None:
            watched, until = other, time.monotonic() + SILENCE_S
            _tell(
                f"Workdir {path.parent} was in use by {_named(other)}; seeing for {SILENCE_S:.0f} "
                "s whether it still is ..."
            )
        time.sleep(min(1.0, SILENCE_S / 10))


def _beat(path: epath.Path, owner: Owner, ended: threading.Event) -> None:
    """Counts up the beats of the lock until it ends, or is another's."""
    beats = 0
    while not ended.wait(BEAT_S):
        beats += 1
        # Storage that fails for a moment shall not end the beats.
        with contextlib.suppress(Exception), _alone(path):
            other = _read(path)
            if other is not None and not _same(other, owner):
                _tell(
                    f"{path} is now of {_named(other)}, which took {path.parent} over while this "
                    "process gave no sign: stop one of the two, both write there."
                )
                return
            workdir_lib.write_text(path, json.dumps(owner | {"beats": beats}))


@contextlib.contextmanager
def _alone(path: epath.Path) -> Iterator[None]:
    """Keeps other processes from reading and writing a lock meanwhile, where storage can do so."""
    if workdir_lib.is_remote(path):
        yield
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network disks cannot lock directories.
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
    """Returns the owner in a lock; None if there is none, or the file is damaged."""
    try:
        owner = json.loads(path.read_bytes())
        return owner if {"host", "pid", "process_started", "since", "beats"} <= set(owner) else None
    except (OSError, ValueError, TypeError):
        return None


def _same(one: Owner | None, two: Owner) -> bool:
    return one is not None and (one | {"beats": 0}) == (two | {"beats": 0})


def _is_alive(owner: Owner) -> bool:
    """Says whether a process of this host still runs, and is no other of the same number."""
    pid = owner["pid"]
    if not isinstance(pid, int) or pid == os.getpid():
        return False  # What this process holds it knows of.
    if pathlib.Path("/proc/self/stat").exists():
        return owner["process_started"] is not None and _started(pid) == owner["process_started"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # Another user's.
    return True


def _started(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; None if it is gone or unknown."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name before the last bracket may hold anything. Of a zombie nothing runs any more.
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def _named(owner: Owner | None) -> str:
    assert owner is not None
    return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
