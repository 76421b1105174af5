"""Metrics files: one JSON object per line, and the same values as TensorBoard events.

A file that cannot be written does not end the run; a message says what is missing. Objects in a
bucket cannot be appended to, so that the files there are copies of local ones, which are updated at
intervals.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import logging
import math
import pathlib
import shutil
import tempfile
import time
from typing import Any

from etils import epath

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.monitoring import metric_definitions

JSONL_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
SAMPLES_NAME = "samples.jsonl"  # Written by the probe 'samples', a row with 'update' per line.
COPY_INTERVAL_S = 30.0  # Minimum time between two copies to a bucket.

logger = logging.getLogger(__name__)


def read_jsonl(path: workdir_lib.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; an empty list if the file does not exist.

    Metrics that an earlier version logged under another name are returned under their current name.
    The incomplete last line of a killed run is skipped. Other lines that cannot be parsed are
    skipped too, with a warning that counts them.
    """
    rows, damaged = _read_rows(epath.Path(path))
    if damaged:
        logger.warning(
            "%s: %d lines are not rows of metrics and are skipped; the first is line %d.",
            path,
            len(damaged),
            damaged[0],
        )
    return [{metric_definitions.current_name(n): x for n, x in row.items()} for row in rows]


def _read_rows(path: epath.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the rows of a metrics file, and the numbers of the lines that cannot be parsed."""
    if not path.exists():
        return [], []
    if path.is_dir():
        return [], [1]
    rows, damaged = [], []
    # Each line is written with its newline; what follows the last newline is incomplete.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif line:
            damaged.append(number)
    return rows, damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the row in a line; None if the line is not a row of metrics."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(x is None or type(x) in (int, float) for x in row.values()) else None


class MetricFiles:
    """Writes the metrics of one run to its files."""

    def __init__(
        self,
        workdir: workdir_lib.PathLike,
        *,
        resume_step: int | None,
        tell: Callable[[str], None],
        tensorboard: bool = True,
    ):
        """Opens the files, and removes the rows that a resumed run will write again.

        Args:
            workdir: Directory of the run, which is created if it does not exist.
            resume_step: Step of the restored checkpoint, after which rows are removed; None for a
                new run, which removes all rows.
            tell: Function that prints a message.
            tensorboard: Whether to write TensorBoard events too.
        """
        self._tell = tell
        self._reported: set[str] = set()  # Files whose first failure was reported.
        self._after_failure = b""
        workdir = workdir_lib.as_path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._bucket = workdir if workdir_lib.is_remote(workdir) else None
        self._local = pathlib.Path(tempfile.mkdtemp() if self._bucket else workdir)
        self._copied: dict[pathlib.Path, int] = {}  # Sizes of the files in the bucket.
        self._copied_at = time.monotonic()
        with self._tolerating(JSONL_NAME):
            if self._bucket and (workdir / JSONL_NAME).exists():
                (self._local / JSONL_NAME).write_bytes((workdir / JSONL_NAME).read_bytes())
            self._truncate(resume_step)
        with self._tolerating(SAMPLES_NAME):
            _truncate_samples(workdir / SAMPLES_NAME, resume_step)
        self._board: Any = None
        with self._tolerating(TENSORBOARD_NAME):
            events = workdir / TENSORBOARD_NAME
            if resume_step is None and events.is_dir():
                events.rmtree()
            if tensorboard:
                first = 0 if resume_step is None else resume_step + 1
                self._board = _open_board(self._local / TENSORBOARD_NAME, first)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the metrics of a step to the files."""
        row = {name: x if math.isfinite(x) else None for name, x in values.items()}
        line = json.dumps({"step": step, **row}, allow_nan=False).encode() + b"\n"
        with self._tolerating(JSONL_NAME):
            before, self._after_failure = self._after_failure, b"\n"
            with (self._local / JSONL_NAME).open("ab") as file:
                file.write(before + line)
            self._after_failure = b""
        with self._tolerating(TENSORBOARD_NAME):
            if self._board is not None:
                _add_scalars(self._board, step, values)
        if time.monotonic() - self._copied_at > COPY_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Copies files that have grown since the last copy to the bucket, if the run is in one."""
        if self._bucket is None:
            return
        self._copied_at = time.monotonic()
        for path in sorted(path for path in self._local.rglob("*") if path.is_file()):
            size = path.stat().st_size
            with self._tolerating(path.name):
                if self._copied.get(path) != size:
                    target = self._bucket / path.relative_to(self._local).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
                    self._copied[path] = size

    def close(self) -> None:
        """Closes the files."""
        with self._tolerating(TENSORBOARD_NAME):
            if self._board is not None:
                self._board.close()
        self.flush()
        if self._bucket is not None:
            shutil.rmtree(self._local, ignore_errors=True)

    @contextlib.contextmanager
    def _tolerating(self, name: str) -> Iterator[None]:
        """Turns errors of a file into one message, which is printed at the first error."""
        try:
            yield
        except Exception as error:  # Clients of remote storage have their own exception types.
            if name not in self._reported:
                self._reported.add(name)
                self._tell(
                    f"{name} cannot be written ({workdir_lib.one_line(error)}). The run continues, "
                    "but metrics will be missing there."
                )

    def _truncate(self, resume_step: int | None) -> None:
        """Removes the rows after `resume_step` atomically, and keeps a copy of a damaged file."""
        path = epath.Path(self._local / JSONL_NAME)
        rows, damaged = _read_rows(path)
        if damaged:
            backup = workdir_lib.free_name(path.parent, f"{JSONL_NAME}.damaged")
            path.rename(backup)
            self._tell(f"{path.name} is damaged: it was moved to {backup.name}, and its readable "
                       "rows are written to a new file.")  # fmt: skip
        remaining = [row for row in rows if resume_step is not None and row["step"] <= resume_step]
        workdir_lib.write_text(path, "".join(json.dumps(row) + "\n" for row in remaining))


def _truncate_samples(path: epath.Path, resume_step: int | None) -> None:
    """Removes the sample completions after `resume_step`, or all of them if it is None."""
    if not path.exists():
        return
    last = -1 if resume_step is None else resume_step
    lines = path.read_text().splitlines(keepends=True)
    remaining = [line for line in lines if json.loads(line)["update"] <= last]
    workdir_lib.write_text(path, "".join(remaining))


def _open_board(directory: pathlib.Path, first: int) -> Any:
    """Opens an event file that makes TensorBoard drop events of earlier files from `first` on.

    The SummaryWriter of tensorboardX is not used: it passes events to a thread, which dies when it
    cannot write, and then the full queue blocks the run.
    """
    # Imported here, so that the module can be imported without tensorboardX.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    directory.mkdir(parents=True, exist_ok=True)
    board = EventsWriter(str(directory / "events"))
    status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    board.write_event(event_pb2.Event(step=first, session_log=status))
    return board


def _add_scalars(board: Any, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    for name, value in values.items():
        event = event_pb2.Event(step=step, wall_time=time.time(), summary=scalar(name, value))
        board.write_event(event)
    board.flush()
