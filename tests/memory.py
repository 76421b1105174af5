"""The host memory that a piece of code takes, measured in a process of its own (Linux)."""

from collections.abc import Iterator
import contextlib
import ctypes
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent


def anonymous() -> int:
    """Bytes of this process's memory that are no file's: the pages of a mapped one do not count."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon.")


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """A list that gets, at the end, the most bytes that were held above those at the beginning."""
    # What was freed before, but not given back, would hide what is taken.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    start, most, stop, found = anonymous(), [0], threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found.append(max(most[0], anonymous()) - start)


def start(code: str, *arguments: object, devices: int) -> subprocess.Popen:
    """Code in a fresh process of so many simulated devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT)


def numbers(child: subprocess.Popen) -> list[float]:
    """What it printed, when it has ended well."""
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    return [float(x) for x in out.split()]


def in_child(code: str, *arguments: object, devices: int) -> list[float]:
    """The numbers that code prints in a fresh process of so many simulated devices."""
    return numbers(start(code, *arguments, devices=devices))
