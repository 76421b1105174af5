"""The metric writer of files, TensorBoard, loggers and console.

    workdir/metrics.jsonl     one JSON object per line: {"step": 12, "episode/success": 0.5, ...}
    workdir/tensorboard/      the same values as TensorBoard events

A metric without a definition in `metric_definitions` raises an error.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import shutil
import sys
import time
from typing import Any, TextIO

import numpy as np

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.monitoring import metric_definitions
from mmrl_jax.monitoring.loggers import Logger
from mmrl_jax.monitoring.metric_files import (
    JSONL_NAME,
    SAMPLES_NAME,
    TENSORBOARD_NAME,
    MetricFiles,
    read_jsonl,
)

__all__ = ["JSONL_NAME", "SAMPLES_NAME", "TENSORBOARD_NAME", "MetricWriter", "read_jsonl"]


class MetricWriter:
    """Writes the metrics of one run to JSONL, TensorBoard, loggers and the console.

    On a terminal the console shows a progress bar that is redrawn; elsewhere (a file, a CI log) it
    prints lines at intervals.
    """

    def __init__(
        self,
        workdir: workdir_lib.PathLike,
        *,
        total_steps: int,
        max_wall_s: float | None,
        resume_step: int | None,
        console_names: Sequence[str],
        console_interval_s: float,
        eval_interval: int | None = None,
        label: str = "",
        active: bool = True,
        tensorboard: bool = True,
        loggers: Sequence[Logger] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the files of a run, and removes the rows that a resumed run will write again.

        Args:
            workdir: Directory of the run, which is created if it does not exist.
            total_steps: Step at which the run ends, for the progress bar and the time left; at
                least 1.
            max_wall_s: Value of `time/wall_s` at which the run ends early; None for no limit.
            resume_step: Step of the restored checkpoint, after which rows are removed; None for a
                new run, which removes all rows.
            console_names: Names of the metrics on the console, in order.
            console_interval_s: Minimum time in seconds between two lines without a terminal.
            eval_interval: Number of steps between two evaluations. The estimated time left includes
                the `time/eval_s` of these and of the one at the end. None without evaluations.
            label: Name of the stage at the start of the console line.
            active: Whether this process writes; False for all but the first process of a
                multi-host run, in which all methods do nothing.
            tensorboard: Whether to write TensorBoard events too.
            loggers: Further loggers that receive the metrics.
            stream: Stream of the console; None for standard error.
            clock: Function that returns the time in seconds, of which only differences are used.

        Raises:
            ValueError: If `total_steps` is below 1, or a name in `console_names` is not defined.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}, but must be at least 1.")
        for name in console_names:
            metric_definitions.lookup(name)
        self._active = active
        if not active:
            return
        self._console = _Console(
            stream=sys.stderr if stream is None else stream,
            total=total_steps,
            max_wall_s=max_wall_s,
            start=resume_step or 0,
            names=console_names,
            interval_s=console_interval_s,
            eval_interval=eval_interval,
            label=label,
            clock=clock,
        )
        self._files = MetricFiles(
            workdir, resume_step=resume_step, tell=self.message, tensorboard=tensorboard
        )
        self._loggers = tuple(loggers)
        self._logger_failed = False
        self._last_step: int | None = resume_step

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row and flushes it, so that a killed run has all rows that it logged.

        Args:
            step: Step of the values, which must not be below the last one.
            values: Scalars (Python, numpy or jax) by the names of the metrics. A value that is not
                finite becomes `null` in the file, because JSON has no such numbers; TensorBoard
                keeps it.

        Raises:
            ValueError: If a metric is not defined, a value is not a scalar, or the step is below
                the last one.
        """
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        for name in scalars:
            metric_definitions.lookup(name)
        if not self._active:
            return
        if self._last_step is not None and step < self._last_step:
            raise ValueError(
                f"step is {step}, but {self._last_step} was already written: write in order, and "
                "give resume_step for a resumed run."
            )
        self._last_step = step
        self._files.append(step, scalars)
        for logger in self._loggers:
            self._attempt(functools.partial(logger.write, step, scalars))
        self._console.update(step, scalars)

    def message(self, text: str) -> None:
        """Prints a message on a separate line of the console, above the progress bar."""
        if self._active:
            self._console.message(text)

    def flush(self) -> None:
        """Copies all rows to the workdir, if it is in a bucket, before a checkpoint is saved."""
        if self._active:
            self._files.flush()

    def close(self) -> None:
        """Ends the console line and closes the files."""
        if self._active:
            self._console.close()
            self._files.close()
            for logger in self._loggers:
                self._attempt(logger.close)

    def _attempt(self, call: Callable[[], object]) -> None:
        """Calls a logger, and prints a message at the first failure, for example of the network."""
        try:
            call()
        except Exception as error:
            if not self._logger_failed:
                self._logger_failed = True
                self.message(f"A logger failed, and the run continues: {error}")


class _Console:
    """A progress bar with rate, time left and a few metrics.

    Progress and time left refer to the limit, of steps or time, that will be reached first. The
    rate is per `time/wall_s`, which excludes compilation and evaluations. The time left includes
    future evaluations, whose duration is estimated by the mean of previous ones. The first one
    includes compilation and is ignored as soon as there is another.
    """

    _BAR = 20

    def __init__(
        self,
        *,
        stream: TextIO,
        total: int,
        max_wall_s: float | None,
        start: int,
        names: Sequence[str],
        interval_s: float,
        eval_interval: int | None,
        label: str,
        clock: Callable[[], float],
    ):
        self._stream = stream
        self._total = total
        self._max_wall_s = max_wall_s
        self._names = names
        self._interval = interval_s
        self._eval_interval = eval_interval
        self._evaluations_s: list[float] = []
        self._label = label
        self._clock = clock
        self._tty = stream.isatty()
        self._step = start
        self._wall_s: float | None = None
        self._first: tuple[int, float] | None = None
        self._shown_at: float | None = None
        self._values: dict[str, float] = {}
        self._shown_step: int | None = None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        now = self._clock()
        self._step = step
        self._values.update({name: values[name] for name in self._names if name in values})
        self._wall_s = values.get("time/wall_s", self._wall_s)
        if "time/eval_s" in values:
            self._evaluations_s.append(values["time/eval_s"])
        if self._first is None and self._wall_s is not None:
            self._first = (step, self._wall_s)
        due = self._shown_at is None or now - self._shown_at >= self._interval
        if self._tty or due or max(self._by_step(), self._by_time()) >= 1:
            self._show(now)

    def message(self, text: str) -> None:
        if self._tty:
            self._stream.write("\r\x1b[K")
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._shown_at is not None:
            if self._tty:
                self._stream.write("\n")
            elif self._shown_step != self._step:
                self._show(self._clock())
        self._stream.flush()

    def _by_step(self) -> float:
        return min(max(self._step / self._total, 0.0), 1.0)

    def _by_time(self) -> float:
        if self._max_wall_s is None or self._wall_s is None:
            return 0.0
        return min(self._wall_s / self._max_wall_s, 1.0) if self._max_wall_s > 0 else 1.0

    def _show(self, now: float) -> None:
        line = self._line()
        if self._tty:
            # One column is left free, because a full line would wrap, which \r cannot undo.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{line[:width]}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
        self._shown_at, self._shown_step = now, self._step

    def _line(self) -> str:
        timed = self._by_time() > self._by_step()
        done = self._by_time() if timed else self._by_step()
        filled = int(done * self._BAR)
        progress = f"{self._step:,}/{self._total:,}"
        if timed:
            assert self._wall_s is not None and self._max_wall_s is not None
            progress = (
                f"{_duration(self._wall_s)}/{_duration(self._max_wall_s)}, update {self._step:,}"
            )
        parts = [
            f"{self._label + ' ' if self._label else ''}"
            f"[{'#' * filled}{'-' * (self._BAR - filled)}] {100 * done:3.0f} % {progress}"
        ]
        if self._first is not None and self._wall_s is not None:
            steps, seconds = self._step - self._first[0], self._wall_s - self._first[1]
            if steps > 0 and seconds > 0:
                rate = steps / seconds
                left, end = (self._total - self._step) / rate, self._total
                if timed and self._max_wall_s is not None:
                    left = max(self._max_wall_s - self._wall_s, 0)
                    end = self._step + math.ceil(left * rate)
                left += self._evaluations_left_s(end)
                parts.append(f"{_short(rate)} updates/s, {_duration(left)} left")
        shown = [f"{name} {_short(value)}" for name, value in self._values.items()]
        return " | ".join([*parts, *([", ".join(shown)] if shown else [])])

    def _evaluations_left_s(self, end: int) -> float:
        """Returns the estimated time in seconds of the evaluations until the step `end`."""
        if self._eval_interval is None or not self._evaluations_s or end <= self._step:
            return 0.0
        # The last evaluation is at the end, which need not be a multiple of the interval.
        count = -(-end // self._eval_interval) - self._step // self._eval_interval
        return count * float(np.mean(self._evaluations_s[1:] or self._evaluations_s))


def _scalar(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(
            f"Metric '{name}' has shape {array.shape}, but must be a scalar: take its mean first."
        )
    return float(array)


def _short(value: float) -> str:
    """Formats a number with about three digits: 0.0123, 4.5, 12,300."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Formats a duration as 0:09, 12:05 or 3:02:10."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
