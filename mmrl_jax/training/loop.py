"""The training loop of a stage: it compiles, updates, logs, evaluates, saves and resumes."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from mmrl_jax import envs
from mmrl_jax.config import ConfigLike
from mmrl_jax.monitoring import loggers, metric_definitions
from mmrl_jax.monitoring.health_checks import HealthChecks
from mmrl_jax.monitoring.metrics import JSONL_NAME, MetricWriter, read_jsonl
from mmrl_jax.training.checkpoint import Checkpointer, saved_steps
from mmrl_jax.training.dispatch import (
    OPTIMIZER_METRICS,
    RETRY_AFTER_S,
    DispatchResult,
    is_transient,
    make_dispatch,
    make_host_dispatch,
)
from mmrl_jax.training.lock import locked
from mmrl_jax.training.preemption import PreemptionGuard
from mmrl_jax.training.settings import check_settings
from mmrl_jax.training.stage import Carry, HostUpdate, Stage
from mmrl_jax.workdir import PathLike, as_path, one_line


class HostFailed(RuntimeError):
    """The host's part of an update failed in every retry; the updates before it are saved."""


@dataclasses.dataclass(frozen=True)
class Counters:
    """Counters of a stage on the host, which are stored in its checkpoints.

    All counters include the time and the steps of earlier processes before a resume.

    Attributes:
      wall_s: Time of the updates in seconds, without initialization, compilation and evaluations.
      compile_s: Time of initialization and compilation in seconds.
      total_s: Total time in `run` in seconds.
      env_steps: Number of environment steps, without steps that only reset an environment.
    """

    wall_s: float = 0.0
    compile_s: float = 0.0
    total_s: float = 0.0
    env_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a stage.

    Attributes:
      carry: Last carry; None after a later stage has started, so that its memory is released.
      updates: Number of completed updates, including those before a resume.
      counters: Counters of the stage.
      earlier_s: Part of counters.total_s in seconds that earlier processes have spent.
      interrupted: Whether a SIGTERM or SIGINT was received, also during the last update, so that no
        further stage should be started. The checkpoint is saved.
    """

    carry: Carry | None
    updates: int
    counters: Counters
    earlier_s: float
    interrupted: bool

    @property
    def wall_s(self) -> float:
        """Time of the updates in seconds."""
        return self.counters.wall_s


def start(stage: Stage) -> tuple[Carry, Any]:
    """Creates the initial carry of a stage on its devices, and releases its initial arrays.

    No array of the carry is weakly typed, so that the update is compiled only once.

    Returns:
      The carry and its shardings.

    Raises:
      InvalidEnvironment: If the environments have invalid initial states, see
        `envs.check_started`.
    """
    fresh = stage.init()
    if fresh.env_state is not None:
        envs.check_started(fresh.env_state)
    shardings = stage.shardings(fresh)
    leaves, structure = jax.tree.flatten(fresh)
    del fresh
    stage.release()
    # Each leaf is copied, because two leaves of an initial state may share a buffer, which cannot
    # be donated twice. One leaf is copied at a time to avoid the memory of a second carry.
    for i, sharding in enumerate(jax.tree.leaves(shardings)):
        strong = jax.lax.convert_element_type(leaves[i], jnp.asarray(leaves[i]).dtype)
        leaves[i] = jnp.copy(jax.device_put(strong, sharding))
    return jax.tree.unflatten(structure, leaves), shardings


def restore(stage: Stage, checkpointer: Checkpointer) -> tuple[Carry, Any, dict[str, Any], int]:
    """Restores the carry of the newest checkpoint, which must exist.

    No initial carry is created, and the initial arrays of the stage are released before the arrays
    are read.

    Returns:
      The carry, its shardings, the values that were stored with it, and its step.
    """
    # A lambda is traced instead of `init`, because JAX caches the trace with its arrays while the
    # traced function exists.
    like = jax.eval_shape(lambda: stage.init())
    shardings = stage.shardings(like)
    stage.release()
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        like,
        shardings,
    )
    restored = checkpointer.restore_latest(like)
    assert restored is not None
    carry, extra, step = restored
    return carry, shardings, extra, step


def run(
    stage: Stage,
    *,
    workdir: PathLike,
    config: ConfigLike,
    may_change: Collection[str] = (),
    max_seconds: float | None = None,
    log_interval_s: float = 10.0,
) -> Result:
    """Runs a stage to its end in `workdir`, from its newest checkpoint if there is one.

    A new stage is evaluated before its first update, as step 0 of the metrics. The stage ends after
    exactly `stage.num_updates` updates, or after the first dispatch beyond `max_seconds`, with an
    evaluation and a checkpoint. If it has ended before, its result is returned unchanged. Each
    evaluation with a value of the best metric is followed by a checkpoint, so that the best one can
    be restored.

    Args:
      stage: Stage to run.
      workdir: Working directory for checkpoints, metrics.jsonl and TensorBoard events.
      config: Config of the run, which is stored with it. A workdir of another config is rejected.
      may_change: Config keys, or groups of keys, whose values may differ in a resumed run.
      max_seconds: Time of the updates in seconds after which the stage ends early; None for no
        limit.
      log_interval_s: Minimum time in seconds between two console lines without a terminal.

    Raises:
      ValueError: If a setting of JAX is not supported, or the workdir cannot be used, see
        `Checkpointer` and `locked`.
      InvalidEnvironment: If the environments have invalid initial states, or no step of a dispatch
        has a finite state, see `AutoReset`.
      HostFailed: If the host's part of an update failed in every retry. The updates before it are
        saved.
      FloatingPointError: If a parameter is not finite, or too many optimizer steps of a dispatch
        were skipped because their loss or gradient is not finite. No update of that dispatch is
        saved.
    """
    check_settings()
    started = time.perf_counter()
    with (
        locked(workdir),
        Checkpointer(
            workdir,
            config=config,
            keep=stage.max_to_keep,
            best_metric=stage.best_metric,
            save_interval=stage.checkpoint_interval,
            may_change=may_change,
        ) as checkpointer,
        PreemptionGuard() as terminated,
    ):
        init_s, done, counters = 0.0, 0, Counters()
        resumed = bool(saved_steps(workdir))
        if resumed:
            carry, shardings, extra, done = restore(stage, checkpointer)
            counters = Counters(**extra)
        else:
            init_start = time.perf_counter()
            carry, shardings = start(stage)
            init_s = time.perf_counter() - init_start
        progress = _Progress(stage.num_updates, max_seconds, started, done, counters)
        if progress.over():
            return Result(carry, done, counters, progress.earlier_s, terminated())
        progress.add(compile_s=init_s)
        with MetricWriter(
            workdir,
            max_wall_s=max_seconds,
            resume_step=done if resumed else None,
            console_interval_s=log_interval_s,
            loggers=loggers.make(stage.loggers, workdir, label=stage.name, config=config),
            **_writer_fields(stage),
        ) as writer:
            if resumed:
                writer.message(f"{stage.name}: resumed after update {done} of {stage.num_updates}")
            compiled = _compiler(stage, shardings, terminated, writer.message)
            logging = _Logging(stage, workdir, writer, checkpointer, done)
            carry, error = _train(carry, stage, compiled, progress, logging, terminated)
            if progress.done:
                logging.save(carry, progress, {}, force=True)
        checkpointer.wait()
        if error is not None and not terminated():
            if not is_transient(error):
                raise error
            raise HostFailed(_host_failed(stage.name, progress.done, error)) from error
        counters = progress.add()
        return Result(carry, progress.done, counters, progress.earlier_s, terminated())


def _writer_fields(stage: Stage) -> dict[str, Any]:
    """Returns the arguments of a `MetricWriter` that depend on the stage."""
    return {
        "total_steps": stage.num_updates,
        "console_names": stage.console,
        # There is at most one evaluation per dispatch.
        "eval_interval": stage.evaluate and max(stage.eval_interval, stage.updates_per_dispatch),
        "label": stage.name,
        "active": jax.process_index() == 0,
        "tensorboard": "tensorboard" in stage.loggers,
    }


class _Progress:
    """Progress of a stage.

    Attributes:
      done: Number of completed updates.
      counters: Counters of the stage.
      earlier_s: Time in seconds that earlier processes have spent.
    """

    def __init__(
        self,
        updates: int,
        max_seconds: float | None,
        started: float,
        done: int,
        counters: Counters,
    ):
        self._updates, self._max_seconds, self._started = updates, max_seconds, started
        self.done, self.counters, self.earlier_s = done, counters, counters.total_s

    def over(self) -> bool:
        """Returns whether the stage has reached its number of updates or its time limit."""
        late = self._max_seconds is not None and self.counters.wall_s >= self._max_seconds
        return late or self.done >= self._updates

    def add(self, **more: float) -> Counters:
        """Adds to the counters, updates the total time, and returns the counters."""
        total = self.earlier_s + time.perf_counter() - self._started
        sums = {name: getattr(self.counters, name) + x for name, x in more.items()}
        self.counters = dataclasses.replace(self.counters, total_s=total, **sums)
        return self.counters


class _Logging:
    """Evaluates, logs and saves a stage after its updates.

    Attributes:
      writer: Writer of metrics and messages.
      path: Path of metrics.jsonl.
    """

    def __init__(
        self,
        stage: Stage,
        workdir: PathLike,
        writer: MetricWriter,
        checkpointer: Checkpointer,
        done: int,
    ):
        self._stage, self._checkpointer = stage, checkpointer
        self._failed_evaluations = 0
        self.writer = writer
        self.path = as_path(workdir) / JSONL_NAME
        self._health_checks = HealthChecks()
        for row in read_jsonl(self.path):  # A resumed run raises the alarms of the whole run.
            if 0 < row["step"] <= done:
                self._health_checks.update(row)

    def log_start(self, carry: Carry, progress: _Progress) -> None:
        """Evaluates the initial carry, if the stage has an evaluation, and writes row 0.

        Health checks ignore this row, and no checkpoint is saved, so that step 0 is never the best.
        """
        if self._stage.evaluate is not None:
            values = _row({}, {}, progress.counters, 0) | self._evaluation(carry, 0)
            self.writer.write(0, values | self._failed())

    def log(self, values: dict[str, float], carry: Carry, progress: _Progress, before: int) -> None:
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
        self.writer.write(done, values)
        best = stage.best_metric
        scores = {best: values[best]} if best is not None and best in values else {}
        self.save(carry, progress, scores, force=last or bool(scores))

    def save(
        self, carry: Carry, progress: _Progress, scores: Mapping[str, float], *, force: bool
    ) -> None:
        """Saves the carry if a checkpoint is due or forced, after the metrics are flushed."""
        if force or self._checkpointer.due(progress.done):
            self.writer.flush()
        extra = dataclasses.asdict(progress.add())
        self._checkpointer.save(progress.done, carry, extra=extra, metrics=scores, force=force)

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
            return dict(measure())
        except Exception as error:  # A failed measurement must not end the run.
            self.writer.message(
                f"{self._stage.name}: {what} at update {done} failed, and the run continues "
                f"without it: {one_line(error)}"
            )
            return {}


def _train(
    carry: Carry,
    stage: Stage,
    compiled: Callable[[int, Carry], Callable[[Carry, Any], DispatchResult]],
    progress: _Progress,
    logging: _Logging,
    stopping: Callable[[], bool],
) -> tuple[Carry, Exception | None]:
    """Runs the updates of a stage until it ends, a signal stops it, or the host's part fails.

    Returns:
      The carry after progress.done updates, and the error of the host's part, if any.

    Raises:
      InvalidEnvironment: If no step of a dispatch has a finite state.
      FloatingPointError: If the stage has diverged, see `run`.
    """
    programs: dict[int, Callable[[Carry, Any], DispatchResult]] = {}
    error: Exception | None = None
    while error is None and not (progress.over() or stopping()):
        size = min(stage.updates_per_dispatch, stage.num_updates - progress.done)
        if size not in programs:
            logging.writer.message(f"{stage.name}: compiling ...")
            compile_start = time.perf_counter()
            programs[size] = compiled(size, carry)
            compile_s = time.perf_counter() - compile_start
            progress.add(compile_s=compile_s)
            logging.writer.message(f"{stage.name}: compiled in {compile_s:.0f} s")
            if not (progress.done or stopping()):
                logging.log_start(carry, progress)
            continue  # A signal may have been received in the meantime.
        update_start = time.perf_counter()
        with jax.transfer_guard("disallow"):
            carry, metrics, size, retries, error = programs[size](carry, stage.constants)
            jax.block_until_ready(carry.updates)
        if metrics is None:
            break
        seconds = time.perf_counter() - update_start
        before = progress.done
        progress.done += size
        metrics = jax.device_get(metrics)
        finite, counted = bool(metrics.pop("finite")), metrics.pop("counted")
        valid = float(metrics.get("rollout/valid_fraction", 1.0))
        steps = size * stage.env_steps_per_update * valid
        progress.add(wall_s=seconds, env_steps=round(steps) if finite else 0)
        values = _row(metrics, counted, progress.counters, progress.done) | {
            "time/update_s": seconds / size,
            "time/samples_per_s": size * stage.samples_per_update / seconds,
        }
        values |= {"optimizer/retries": retries} if retries else {}
        all_nonfinite = valid == 0.0 and metrics["rollout/nonfinite_envs"] > 0
        if all_nonfinite or not finite:
            logging.writer.write(progress.done, values)
            if all_nonfinite:
                raise envs.InvalidEnvironment(_all_nonfinite(before, progress.done))
            raise FloatingPointError(_diverged(stage.name, logging.path, before, progress.done))
        logging.log(values, carry, progress, before)
    return carry, error


def _compiler(
    stage: Stage, shardings: Any, stopping: Callable[[], bool], tell: Callable[[str], None]
) -> Callable[[int, Carry], Callable[[Carry, Any], DispatchResult]]:
    """Returns a function (number of updates, carry) -> compiled dispatch of that many updates."""
    host: list[HostUpdate] = []  # The compiled parts are the same for dispatches of every size.

    def compiled(size: int, carry: Carry) -> Callable[[Carry, Any], DispatchResult]:
        if stage.on_host is None:
            assert stage.update is not None
            dispatch = make_dispatch(stage.update, size, shardings)
            lowered = dispatch.lower(carry, stage.constants)
            _check_metrics(lowered.out_info[1])
            program = lowered.compile()

            def traced(carry: Carry, constants: Any) -> DispatchResult:
                carry, metrics = program(carry, constants)
                return DispatchResult(carry, metrics, size)

            return traced
        if not host:
            host.append(stage.on_host(carry, stage.constants))
            _check_metrics(host[0].metrics)
        return make_host_dispatch(host[0], size, carry, stopping=stopping, tell=tell)

    return compiled


def _check_metrics(metrics: Collection[str]) -> None:
    """Raises ValueError for undefined metrics, before the update that logs them is compiled."""
    for name in metrics:
        if name not in ("finite", "counted"):
            metric_definitions.lookup(name)


def _row(
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


def _diverged(name: str, path: PathLike, before: int, done: int) -> str:
    return (
        f"Stage {name!r} diverged in updates {before + 1} to {done}: a parameter is not finite, or "
        f"the loss or gradient of at least half of the optimizer steps is not. These updates are "
        f"not saved. The same command would diverge again: start in a fresh workdir with a lower "
        f"learning rate, or see optimizer/skipped_steps, loss/* and grad/norm in {path}."
    )


def _host_failed(name: str, done: int, error: Exception) -> str:
    return (
        f"Stage {name!r}: update {done + 1} failed {1 + len(RETRY_AFTER_S)} times: {error}\n"
        f"{f'Update {done} is saved' if done else 'No update was completed yet'}: fix the error "
        "above, then run the same command again."
    )


def _all_nonfinite(before: int, done: int) -> str:
    return (
        f"Every step of every environment in updates {before + 1} to {done} had a number that is "
        "not finite, so that there is nothing to learn from: state.obs, reward, done, metrics, "
        "info['truncation'] and info['privileged'] must stay finite under actions in [-1, 1]."
    )
