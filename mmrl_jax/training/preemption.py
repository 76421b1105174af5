"""Preemption: a run that is told to stop saves first."""

import os
import signal
from typing import Any


class PreemptionGuard:
    """Notes a SIGTERM or SIGINT, so that the loop can save and stop between two dispatches.

    A SIGINT after that raises KeyboardInterrupt: who presses Ctrl-C twice does not want to wait.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "PreemptionGuard":
        self._seen = False
        self._previous: dict[int, Any] = {}
        try:
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # Not the main thread: signals are somebody else's.
            pass
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._seen

    def _note(self, number: int, _: object) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = True
        # Not print: the signal may have come inside of one.
        os.write(2, b"\nStopping after the updates under way; Ctrl-C to stop at once.\n")
