"""Memory: of the host, in a process of its own (Linux), and of live arrays on one device."""

from collections.abc import Iterable, Iterator
import contextlib
import ctypes
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax

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


def array_bytes(arrays: Iterable[jax.Array]) -> int:
    """Bytes of arrays that lie on one device, those that share a buffer counted once."""
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in arrays if x.size}.values())


class LiveArrays:
    """Counts the bytes of arrays on one device that live, but for those from before this object."""

    def __init__(self) -> None:
        gc.collect()
        self._before = jax.live_arrays()  # They cannot make room for others meanwhile.

    def __call__(self) -> int:
        gc.collect()
        before = {id(x) for x in self._before}
        return array_bytes(x for x in jax.live_arrays() if id(x) not in before)


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
