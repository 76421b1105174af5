"""Measures the host memory of a piece of code in a separate process (Linux)."""

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
    """Returns the bytes of anonymous memory of this process, without pages of mapped files."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon.")


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Yields a list to which the peak memory above that at the start is appended at the end."""
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
    """Starts a process with the given code and number of simulated devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT)


def numbers(child: subprocess.Popen) -> list[float]:
    """Returns the numbers that a process printed, after it has succeeded."""
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    return [float(x) for x in out.split()]


def in_child(code: str, *arguments: object, devices: int) -> list[float]:
    """Runs code in a process with simulated devices, and returns the numbers that it prints."""
    return numbers(start(code, *arguments, devices=devices))
