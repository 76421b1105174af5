"""Handles preemption: a run that receives a signal to stop saves a checkpoint first."""

import os
import signal
from typing import Any


class PreemptionGuard:
    """Context manager that records SIGTERM and SIGINT, so that the loop can save before it stops.

    Calling the guard returns whether a signal was received. A later SIGINT raises
    KeyboardInterrupt, so that pressing Ctrl-C again stops the run immediately.
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
        return self._received

    def _handle(self, number: int, _: object) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        # print is not reentrant, and the signal may have interrupted a call of it.
        os.write(2, b"\nStopping after the current updates; press Ctrl-C to stop immediately.\n")
