"""Handles preemption: a run that receives a signal to stop saves a checkpoint first."""

import os
import signal
import time
from typing import Any

from mmrl_jax.distributed import multihost


class PreemptionGuard:
    """Context manager that records SIGTERM and SIGINT, so that the loop can save before it stops.

    Calling the guard returns whether a process of the run has received a signal; all processes must
    call it, so that they save the same update. A later SIGINT raises KeyboardInterrupt, so that
    pressing Ctrl-C again stops the run immediately.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "PreemptionGuard":
        self._received = False
        self._previous: dict[int, Any] = {}
        try:
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # Only the main thread may set signal handlers.
            pass
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return multihost.any_process(self._received)

    def sleep(self, seconds: float) -> None:
        """Waits, but not any longer after this process has received a signal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._received:
            time.sleep(min(0.2, seconds))

    def _handle(self, number: int, _: object) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        # print is not reentrant, and the signal may have interrupted a call of it.
        os.write(2, b"\nStopping after the current updates; press Ctrl-C to stop immediately.\n")
