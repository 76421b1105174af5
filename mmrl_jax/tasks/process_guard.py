"""Kills processes together with all that they have started, even after the end of their owner.

    python process_guard.py < pipe

The guard reads from a pipe which processes its owner has started (`+ pid start`) and ended (`- pid
start`). The pipe closes when the owner ends, in whatever way, SIGKILL included; the guard then
kills the processes that are left. A fork of the owner holds the pipe open as long as it lives.

The module needs nothing but Python's own library, so that the guard starts fast and stays small.
"""

from collections.abc import Iterable
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple


class Leader(NamedTuple):
    """A process that leads a session and a process group, and is told from later ones of its pid.

    Attributes:
      pid: of the process.
      start: time of its start in clock ticks since the machine's; None where /proc is absent.
    """

    pid: int
    start: int | None


class _Status(NamedTuple):
    parent: int
    start: int


def leader(pid: int) -> Leader:
    """Names a process that runs, or whose end was not yet waited for."""
    status = _status(pid)
    return Leader(pid, status and status.start)


def kill_all(process: Leader) -> None:
    """Kills a process, its process group and its descendants.

    Descendants with a session of their own, as sandboxes have it, are found through their parents,
    on Linux alone. A daemon, which has left both its session and its parent, is not found.
    """
    status = _status(process.pid)
    if status is not None and status.start != process.start:
        return  # The pid belongs to another process, which it cannot while the group has members.
    with contextlib.suppress(ProcessLookupError):
        # Stopped, it starts nothing more, and stays the parent of what it has started.
        os.kill(process.pid, signal.SIGSTOP)
    killed: set[int] = set()
    while found := _descendants(process.pid) - killed:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
    # Before it leads a group, the process itself has to be named.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process.pid, signal.SIGKILL)


class Guard:
    """A process that calls `kill_all` for what is left when this process ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C and a closed terminal are not for the guard.
            text=True,
        )

    def started(self, process: Leader) -> None:
        """Adds a process to those that are killed at the end."""
        self._tell("+", process)

    def ended(self, process: Leader) -> None:
        """Takes a process from those that are killed at the end."""
        self._tell("-", process)

    def close(self) -> None:
        """Ends the guard; nothing may be left that it would have to kill."""
        self._process.kill()  # The end of the pipe may never come, see above.
        self._process.communicate()

    def _tell(self, what: str, process: Leader) -> None:
        assert self._process.stdin is not None
        # Without a guard, which somebody has killed, all other ends still kill everything.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{what} {process.pid} {process.start}\n")
            self._process.stdin.flush()


def _status(pid: int) -> _Status | None:
    """Parent and start of a process; None where it is gone, or where /proc is absent."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the name, in brackets, and may hold anything; see proc_pid_stat(5).
    fields = text.rpartition(")")[2].split()
    return _Status(parent=int(fields[1]), start=int(fields[19]))


def _descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on, as far as parents are alive."""
    proc = pathlib.Path("/proc")
    pids = [int(x.name) for x in proc.iterdir() if x.name.isdigit()] if proc.is_dir() else []
    parents = {x: status.parent for x in pids if (status := _status(x)) is not None}
    found, last = set[int](), {pid}
    while last:
        last = {child for child, parent in parents.items() if parent in last} - found
        found |= last
    return found


def _watch(lines: Iterable[str]) -> None:
    """The guard: see above."""
    left: set[Leader] = set()
    for line in lines:
        what, pid, start = line.split()
        process = Leader(int(pid), None if start == "None" else int(start))
        if what == "+":
            left.add(process)
        else:
            left.discard(process)
    for process in left:
        kill_all(process)


if __name__ == "__main__":
    _watch(sys.stdin)
