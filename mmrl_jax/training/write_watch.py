"""Notices that this process could not write its part of a checkpoint.

Orbax writes in the background. If the write fails in one of several processes, for example because
its disk is full, that process and the others wait for each other at different barriers, until a
timeout of many minutes.
"""

import threading
from typing import Any

import jax
import orbax.checkpoint as ocp

_POLL_S = 0.05


class WriteWatch:
    """Handlers of a `CheckpointManager` that remember the first error of a write."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def handlers(self) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
        """Returns the handlers of the items 'carry', a pytree of arrays, and 'record', JSON."""
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("carry", ocp.args.PyTreeSave, self._watched(ocp.PyTreeCheckpointHandler()))
        registry.add("record", ocp.args.JsonSave, self._watched(ocp.JsonCheckpointHandler()))
        return registry

    def wait(self, manager: ocp.CheckpointManager) -> None:
        """Blocks until the pending save is on disk.

        Raises:
          Exception: The error of this process, as soon as it occurs; with one process only after
            Orbax has cleaned up.
        """
        if jax.process_count() == 1:
            manager.wait_until_finished()
            return
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                manager.wait_until_finished()
            except BaseException as error:
                errors.append(error)

        waiting = threading.Thread(target=wait, name="checkpoint", daemon=True)
        waiting.start()
        while waiting.is_alive() and self._error is None:
            waiting.join(_POLL_S)
        error = self._error or next(iter(errors), None)
        if error is not None:
            raise error

    def _watched(self, handler: Any) -> Any:
        """Returns a handler whose writes in the background are watched."""
        save = handler.async_save

        async def async_save(*arguments: Any, **options: Any) -> list[Any]:
            futures = await save(*arguments, **options) or ()
            return [_WatchedFuture(future, self) for future in futures]

        handler.async_save = async_save
        return handler

    def failed(self, error: BaseException) -> None:
        """Remembers an error of a write, unless there was one before."""
        self._error = self._error or error


class _WatchedFuture:
    """A write in the background whose error is reported to a `WriteWatch`."""

    def __init__(self, future: Any, watch: WriteWatch):
        self._future, self._watch = future, watch

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except BaseException as error:
            self._watch.failed(error)
            raise

    def cancel(self) -> Any:
        return self._future.cancel()
