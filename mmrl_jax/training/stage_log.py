"""Logging of a stage: evaluations, probes, health checks, rows of metrics, and checkpoints."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import time
from typing import Any

import jax

from mmrl_jax.distributed import multihost
from mmrl_jax.monitoring.health_checks import HealthChecks
from mmrl_jax.monitoring.metrics import JSONL_NAME, MetricWriter, read_jsonl
from mmrl_jax.training.checkpoint import Checkpointer
from mmrl_jax.training.dispatch import OPTIMIZER_METRICS
from mmrl_jax.training.progress import Counters, Progress
from mmrl_jax.training.rollback import Watcher
from mmrl_jax.training.stage import Carry, Stage
from mmrl_jax.workdir import PathLike, as_path, one_line


class StageLog:
    """Evaluates, logs and saves a stage after its updates.

    Args:
      stage: The stage.
      workdir: Working directory of the stage.
      writer: Writer of metrics and messages.
      checkpointer: Checkpointer of the stage.
      watcher: Watcher for divergences.
      done: Step of the restored checkpoint; None for a new stage.

    Attributes:
      writer: Writer of metrics and messages.
      watcher: Watcher for divergences, whose state is saved with the carry.
      is_new: Whether the stage is new and row 0 is not written yet.
      path: Path of metrics.jsonl.
    """

    def __init__(
        self,
        stage: Stage,
        workdir: PathLike,
        writer: MetricWriter,
        checkpointer: Checkpointer,
        watcher: Watcher,
        done: int | None,
    ):
        self._stage, self._checkpointer, self.watcher = stage, checkpointer, watcher
        self._failed_evaluations = 0
        self.is_new = done is None
        self.writer = writer
        self.path = as_path(workdir) / JSONL_NAME
        self._health_checks = HealthChecks()
        # A resumed run raises the alarms of the whole run.
        for row in read_jsonl(self.path) if multihost.is_primary() else ():
            if 0 < row["step"] <= (done or 0):
                self._health_checks.update(row)

    def log_start(self, carry: Carry, progress: Progress) -> None:
        """Evaluates the initial carry, if the stage has an evaluation, and writes row 0.

        Health checks ignore this row. A checkpoint of step 0 is saved only for rollbacks, without a
        score, so that it is never the best.
        """
        self.is_new = False
        if self._stage.evaluate is not None:
            values = metrics_row({}, {}, progress.counters, 0) | self._evaluation(carry, 0)
            self.writer.write(0, values | self._failed())
        if self.watcher.enabled:
            self.save(carry, progress, {}, force=True)

    def log(self, values: dict[str, float], carry: Carry, progress: Progress, before: int) -> None:
        """Evaluates if due, writes a row of metrics, and saves a checkpoint if due.

        Args:
          values: Metrics of the dispatch.
          carry: Carry after the dispatch.
          progress: Progress after the dispatch.
          before: Number of completed updates before the dispatch.
        """
        stage, last, done = self._stage, progress.over(), progress.done
        if stage.evaluate is not None and (
            last or done // stage.eval_interval > before // stage.eval_interval
        ):
            values |= self._evaluation(carry, done)
        for probe in stage.probes:
            if last or done // probe.interval > before // probe.interval:
                values |= self._attempt(
                    f"the probe {probe.name!r}",
                    done,
                    functools.partial(probe.measure, carry.learner, done),
                )
        values |= self._failed()
        for text in self._health_checks.update(values).values():
            self.writer.message(f"{stage.name}: alarm at update {done}: {text}")
        values |= {f"alarm/{name}": 1.0 for name in self._health_checks.raised}
        if retries := self.watcher.state.retries:
            values |= {"optimizer/rollbacks": retries}
        self.writer.write(done, values)
        best = stage.best_metric
        scores = {best: values[best]} if best is not None and best in values else {}
        # The newest checkpoint must be one from before a divergence.
        if last or not self.watcher.state.suspicious:
            self.save(carry, progress, scores, force=last or bool(scores))

    def save(
        self, carry: Carry, progress: Progress, scores: Mapping[str, float], *, force: bool
    ) -> None:
        """Saves the carry if a checkpoint is due or forced, after the metrics are flushed."""
        if force or self._checkpointer.due(progress.done):
            self.writer.flush()
        extra = dataclasses.asdict(progress.add()) | self.watcher.to_extra()
        with jax.profiler.TraceAnnotation("checkpoint"):
            self._checkpointer.save(
                progress.done,
                carry,
                extra=extra,
                metrics=scores,
                force=force,
                is_good=not self.watcher.state.suspicious,
            )

    def _evaluation(self, carry: Carry, done: int) -> dict[str, float]:
        """Returns the metrics of an evaluation, or only its time if it fails."""
        evaluate, eval_start = self._stage.evaluate, time.perf_counter()
        assert evaluate is not None
        values = self._attempt("the evaluation", done, lambda: evaluate(carry.learner))
        if not values:
            self._failed_evaluations += 1
        return values | {"time/eval_s": time.perf_counter() - eval_start}

    def _failed(self) -> dict[str, float]:
        """Returns the number of failed evaluations as a metric, if there are any."""
        return {"eval/failed": self._failed_evaluations} if self._failed_evaluations else {}

    def _attempt(
        self, what: str, done: int, measure: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """Returns the metrics of a measurement, or an empty dict and a message if it fails."""
        try:
            with jax.profiler.TraceAnnotation(what):
                return dict(measure())
        except Exception as error:  # A failed measurement must not end the run.
            if multihost.is_lost(error):
                raise
            self.writer.message(
                f"{self._stage.name}: {what} at update {done} failed, and the run continues "
                f"without it: {one_line(error)}"
            )
            return {}


def metrics_row(
    metrics: Mapping[str, Any], counted: Mapping[str, int], counters: Counters, done: int
) -> dict[str, float]:
    """Returns the row of metrics of a dispatch that ended at update `done`.

    Metrics of episodes are left out if no episode ended. Metrics of optimizer steps are NaN if no
    step was taken.

    Args:
      metrics: Metrics of the dispatch.
      counted: Number of updates over which each of these metrics is a mean, see `make_dispatch`.
      counters: Counters of the stage.
      done: Number of completed updates.
    """
    absent = {name for name, count in counted.items() if not count}
    values = {name: math.nan if name in absent else float(x) for name, x in metrics.items()}
    return {
        n: x for n, x in values.items() if n not in absent or n.startswith(OPTIMIZER_METRICS)
    } | {
        "time/compile_s": counters.compile_s,
        "time/wall_s": counters.wall_s,
        "progress/updates": done,
        "progress/env_steps": counters.env_steps,
    }
