"""Batches of a host, read by a thread while the devices work on the one before."""

from collections.abc import Callable
import concurrent.futures
import threading
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Reads the batch of update u + 1 while update u is worked on; no more than one ahead.

    A thread lives for as long as it reads one batch, so that none outlives a run by more than that.

    Args:
      read: the number of an update to its batch, which depends on nothing else.
      updates: where the run ends; no batch is read ahead from there on.
    """

    def __init__(self, read: Callable[[int], Batch], *, updates: int):
        self._read, self._updates = read, updates
        self._ahead: tuple[int, concurrent.futures.Future[Batch]] | None = None

    def __call__(self, update: int) -> Batch:
        """The batch of an update, and the next one's reading begins.

        Raises:
          Exception: whatever reading this batch raised, be it ahead of time.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == update:
            batch = ahead[1].result()
        else:
            batch = self._read(update)
        if update + 1 < self._updates:
            self._ahead = (update + 1, self._start(update + 1))
        return batch

    def _start(self, update: int) -> concurrent.futures.Future[Batch]:
        future: concurrent.futures.Future[Batch] = concurrent.futures.Future()

        def read() -> None:
            try:
                future.set_result(self._read(update))
            except BaseException as error:  # It is raised where the batch is asked for.
                future.set_exception(error)

        threading.Thread(target=read, name=f"prefetch {update}", daemon=True).start()
        return future
