"""Prefetching: a thread reads the next batch while the devices compute with the current one."""

from collections.abc import Callable
import concurrent.futures
import threading
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Reads the batch of update u + 1 in the background during update u.

    Each batch is read by a new thread, so that no thread outlives the run by more than one batch.

    Args:
      read: Returns the batch of an update, which must depend on the number of the update alone.
      updates: Number of updates of the run, after which no batch is read ahead.
    """

    def __init__(self, read: Callable[[int], Batch], *, updates: int):
        self._read, self._updates = read, updates
        self._ahead: tuple[int, concurrent.futures.Future[Batch]] | None = None

    def __call__(self, update: int) -> Batch:
        """Returns the batch of an update, and starts reading the next one.

        Raises:
          Exception: Any exception that `read` raised for this batch, also in the background.
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
            except BaseException as error:  # The caller of `__call__` receives it.
                future.set_exception(error)

        threading.Thread(target=read, name=f"prefetch {update}", daemon=True).start()
        return future
