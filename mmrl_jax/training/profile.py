"""Traces of a few dispatches of a stage, for Perfetto and for TensorBoard."""

from collections.abc import Callable
import pathlib
import tempfile
import time

from etils import epath
import jax

from mmrl_jax.distributed import multihost
from mmrl_jax.workdir import PathLike, as_path, one_line

DIRECTORY = "profile"  # In the working directory of a stage.
DISPATCHES = 3  # Largest number of dispatches in a trace.
# Time in seconds after which no further dispatch is traced. On a CPU, each operation in a loop is
# an event, and a second of a small model has 100 MB of them.
TRACED_S = 2.0
WARMUP = 2  # Largest number of dispatches before the trace, in which caches are filled.


class Profile:
    """Traces a few dispatches of a stage, and what the host does between them.

    The first process writes the trace to <workdir>/profile/plugins/profile/<time>. If the directory
    `profile` exists already, nothing is traced, so that the same command can resume a run. An error
    of the profiler is a message and does not end the run.

    Args:
      workdir: Working directory of the stage.
      dispatches: Number of dispatches that the stage still has without compiling another one.
      tell: Function that prints a message.
    """

    def __init__(self, workdir: PathLike, dispatches: int, tell: Callable[[str], None]):
        self._directory, self._tell = as_path(workdir) / DIRECTORY, tell
        self._dispatches = max(1, min(DISPATCHES, dispatches))
        self._warmup = max(0, min(WARMUP, dispatches - DISPATCHES))
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._started = 0.0
        self._dispatch_s: list[float] = []
        self._over = not multihost.is_primary()
        if not self._over and self._directory.exists():
            self._over = True
            tell(f"There is a profile already: to write a new one, remove {self._directory}")

    def before_dispatch(self) -> None:
        """Starts the trace before its first dispatch."""
        if self._over or self._local is not None:
            return
        if self._warmup:
            self._warmup -= 1
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls would be most of a trace, and slow the host.
        # It is written locally first, because the profiler cannot write to a bucket.
        self._local = tempfile.TemporaryDirectory()
        try:
            jax.profiler.start_trace(self._local.name, profiler_options=options)
        except Exception as error:
            self._fail(error)
        self._started = time.perf_counter()

    def after_dispatch(self, seconds: float) -> None:
        """Ends the trace after its last dispatch.

        Args:
          seconds: Time of the dispatch in seconds.
        """
        if self._over or self._local is None:
            return
        self._dispatch_s.append(seconds)
        late = time.perf_counter() - self._started >= TRACED_S
        if late or len(self._dispatch_s) == self._dispatches:
            self.close()

    def close(self) -> None:
        """Ends the trace and writes it, if there is one that has not been written."""
        if self._over or self._local is None:
            return
        total_s = time.perf_counter() - self._started
        try:
            jax.profiler.stop_trace()
            local = pathlib.Path(self._local.name)
            files = [path for path in local.rglob("*") if path.is_file()]
            for path in files:
                target = self._directory / path.relative_to(local)
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(path).copy(target)
            (trace,) = (p.relative_to(local) for p in files if p.name.endswith(".trace.json.gz"))
            self._local.cleanup()
        except Exception as error:
            self._fail(error)
            return
        self._over = True
        inside = sum(self._dispatch_s)
        each = ", ".join(f"{seconds:.3g}" for seconds in self._dispatch_s)
        self._tell(
            f"Profile of {len(self._dispatch_s)} dispatches, which took {each} s; the host took "
            f"{total_s - inside:.3g} s between them.\n"
            f"  Open {self._directory / trace} at https://ui.perfetto.dev, or\n"
            f"  pip install tensorboard xprof; tensorboard --logdir {self._directory}"
        )

    def _fail(self, error: Exception) -> None:
        self._over = True
        self._tell(f"The profile failed, and the run continues without it: {one_line(error)}")
