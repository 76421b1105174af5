"""Kills processes together with all of their descendants, even after the end of their owner.

    python process_guard.py < pipe

The owner writes to a pipe which processes it has started (`+ pid start_time`) and ended (`- pid
start_time`). The pipe closes when the owner ends for any reason, including SIGKILL, and the guard
then kills the remaining processes. A fork of the owner keeps the pipe open while it lives.

This module imports the standard library only, so that the guard starts fast and stays small.
"""

from collections.abc import Iterable
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple


class ProcessHandle(NamedTuple):
    """Identifies a session leader, unlike a pid alone, which the system may reuse later.

    Attributes:
      pid: Process id.
      start_time: Start time of the process in clock ticks since boot; None if there is no /proc.
    """

    pid: int
    start_time: int | None


class _Status(NamedTuple):
    parent: int
    start_time: int


def process_handle(pid: int) -> ProcessHandle:
    """Returns the handle of a process that runs, or that has ended but was not waited for."""
    status = _status(pid)
    return ProcessHandle(pid, status and status.start_time)


def kill_all(process: ProcessHandle) -> None:
    """Kills a process, its process group and its descendants.

    On Linux, descendants in a separate session, as sandboxes use it, are found through their
    parents. A daemon, which has left both its session and its parent, is not found.
    """
    status = _status(process.pid)
    if status is not None and status.start_time != process.start_time:
        # The pid was reused, which is impossible while the group has members: nothing is left.
        return
    with contextlib.suppress(ProcessLookupError):
        # A stopped process starts no others, and remains the parent of those it has started.
        os.kill(process.pid, signal.SIGSTOP)
    killed: set[int] = set()
    while remaining := _descendants(process.pid) - killed:
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= remaining
    # The process is killed by its pid too, because it may not yet lead its group.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process.pid, signal.SIGKILL)


class Guard:
    """A separate process that calls `kill_all` for the remaining processes when this one ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C and a closed terminal must not end the guard.
            text=True,
        )

    def started(self, process: ProcessHandle) -> None:
        """Adds a process to those that are killed when this process ends."""
        self._send("+", process)

    def ended(self, process: ProcessHandle) -> None:
        """Removes a process from those that are killed when this process ends."""
        self._send("-", process)

    def close(self) -> None:
        """Ends the guard. No guarded process may remain."""
        # The guard is killed, because a fork of this process may keep the pipe open.
        self._process.kill()
        self._process.communicate()

    def _send(self, action: str, process: ProcessHandle) -> None:
        assert self._process.stdin is not None
        # The pipe is broken if the guard was killed. The owner still kills everything when it ends
        # normally.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{action} {process.pid} {process.start_time}\n")
            self._process.stdin.flush()


def _status(pid: int) -> _Status | None:
    """Returns parent and start time of a process; None if it has ended or there is no /proc."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the name in parentheses, which may contain any character; see
    # proc_pid_stat(5).
    fields = text.rpartition(")")[2].split()
    return _Status(parent=int(fields[1]), start_time=int(fields[19]))


def _descendants(pid: int) -> set[int]:
    """Returns the descendants of a process that are linked to it by living parents."""
    proc = pathlib.Path("/proc")
    pids = [int(x.name) for x in proc.iterdir() if x.name.isdigit()] if proc.is_dir() else []
    parents = {x: status.parent for x in pids if (status := _status(x)) is not None}
    descendants, generation = set[int](), {pid}
    while generation:
        generation = {x for x, parent in parents.items() if parent in generation} - descendants
        descendants |= generation
    return descendants


def _watch(lines: Iterable[str]) -> None:
    """Runs the guard: reads the pipe until it closes, then kills the remaining processes."""
    guarded: set[ProcessHandle] = set()
    for line in lines:
        action, pid, start = line.split()
        process = ProcessHandle(int(pid), None if start == "None" else int(start))
        if action == "+":
            guarded.add(process)
        else:
            guarded.discard(process)
    for process in guarded:
        kill_all(process)


if __name__ == "__main__":
    _watch(sys.stdin)
