"""The training loop of a stage: it compiles, updates, logs, evaluates, saves and resumes."""

from collections.abc import Callable, Collection, Iterator
import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from mmrl_jax import envs
from mmrl_jax.config import ConfigLike
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.monitoring import loggers, metric_definitions
from mmrl_jax.monitoring.metrics import MetricWriter
from mmrl_jax.stability import divergence
from mmrl_jax.training.checkpoint import Checkpointer, saved_steps
from mmrl_jax.training.dispatch import (
    RETRY_AFTER_S,
    DispatchResult,
    is_transient,
    make_dispatch,
    make_host_dispatch,
)
from mmrl_jax.training.lock import locked
from mmrl_jax.training.preemption import PreemptionGuard
from mmrl_jax.training.profile import Profile
from mmrl_jax.training.progress import Counters, Progress
from mmrl_jax.training.rollback import INCIDENTS, NOT_FINITE, Diverged, Watcher, resume, roll_back
from mmrl_jax.training.rollback import write as write_incidents
from mmrl_jax.training.settings import check_settings
from mmrl_jax.training.stage import Carry, HostUpdate, Stage
from mmrl_jax.training.stage_log import StageLog, metrics_row
from mmrl_jax.workdir import PathLike


class HostFailed(RuntimeError):
    """The host's part of an update failed in every retry; the updates before it are saved."""


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
      rollbacks: Number of rollbacks of the stage, see `training.rollback`.
    """

    carry: Carry | None
    updates: int
    counters: Counters
    earlier_s: float
    interrupted: bool
    rollbacks: int

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
        leaves[i] = jnp.copy(mesh_lib.put(strong, sharding))
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
    profile: bool = False,
) -> Result:
    """Runs a stage to its end in `workdir`, from its newest checkpoint if there is one.

    A new stage is evaluated before its first update, as step 0 of the metrics. The stage ends after
    exactly `stage.num_updates` updates, or after the first dispatch beyond `max_seconds`, with an
    evaluation and a checkpoint. If it has ended before, its result is returned unchanged. Each
    evaluation with a value of the best metric is followed by a checkpoint, so that the best one can
    be restored. A stage that diverges continues from an earlier checkpoint, if `stage.rollback` has
    retries, see `training.rollback`.

    Args:
      stage: Stage to run.
      workdir: Working directory for checkpoints, metrics.jsonl and TensorBoard events.
      config: Config of the run, which is stored with it. A workdir of another config is rejected.
      may_change: Config keys, or groups of keys, whose values may differ in a resumed run.
      max_seconds: Time of the updates in seconds after which the stage ends early; None for no
        limit.
      log_interval_s: Minimum time in seconds between two console lines without a terminal.
      profile: Whether a few dispatches are traced, see `Profile`.

    Raises:
      ValueError: If a setting of JAX is not supported, or the workdir cannot be used, see
        `Checkpointer` and `locked`.
      InvalidEnvironment: If the environments have invalid initial states, or no step of a dispatch
        has a finite state, see `AutoReset`.
      HostFailed: If the host's part of an update failed in every retry. The updates before it are
        saved.
      FloatingPointError: If a parameter is not finite, too many optimizer steps of a dispatch were
        skipped because their loss or gradient is not finite, or a metric is beyond its limit in
        `stage.rollback`, and no retries are left. No update of that dispatch is saved.
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
        return _run(
            stage,
            workdir,
            checkpointer,
            terminated,
            config=config,
            max_seconds=max_seconds,
            log_interval_s=log_interval_s,
            profile=profile,
            started=started,
        )


def _run(
    stage: Stage,
    workdir: PathLike,
    checkpointer: Checkpointer,
    terminated: PreemptionGuard,
    *,
    config: ConfigLike,
    max_seconds: float | None,
    log_interval_s: float,
    profile: bool,
    started: float,
) -> Result:
    """Runs a stage in a workdir that is locked; for arguments see `run`."""
    watcher = Watcher(stage.rollback)
    carry, shardings, counters, done, init_s = _begin(stage, workdir, checkpointer, watcher)
    progress = Progress(stage.num_updates, max_seconds, started, done or 0, counters)
    if progress.over():
        return _result(carry, progress, watcher, interrupted=terminated())
    progress.add(compile_s=init_s)
    like = mesh_lib.placed_shapes(carry, shardings)
    programs = _Programs(stage, shardings, terminated, lambda text: writer.message(text))
    while True:  # Each pass but the first one follows on a rollback, and is a resumed run.
        with MetricWriter(
            workdir,
            max_wall_s=max_seconds,
            resume_step=done,
            console_interval_s=log_interval_s,
            loggers=loggers.make(stage.loggers, workdir, label=stage.name, config=config),
            **_writer_fields(stage),
        ) as writer:
            if done is not None:
                writer.message(f"{stage.name}: resumed after update {done} of {stage.num_updates}")
            log = StageLog(stage, workdir, writer, checkpointer, watcher, done)
            with _profiling(stage, workdir, writer, progress, enabled=profile) as traced:
                carry, error = _train(carry, stage, programs, progress, log, terminated, traced)
            if not isinstance(error, Diverged):
                if progress.done:
                    log.save(carry, progress, {}, force=True)
                break
            del carry  # Its memory is needed for the carry that is restored.
            carry = roll_back(
                error,
                like,
                workdir=workdir,
                checkpointer=checkpointer,
                watcher=watcher,
                progress=progress,
            )
            done = progress.done
            writer.message(_rolled_back(stage, error, watcher, done))
    checkpointer.wait()
    interrupted = terminated()
    if error is not None and not interrupted:
        if not is_transient(error):
            raise error
        raise HostFailed(_host_failed(stage.name, progress.done, error)) from error
    progress.add()
    return _result(carry, progress, watcher, interrupted=interrupted)


def _result(carry: Carry, progress: Progress, watcher: Watcher, *, interrupted: bool) -> Result:
    return Result(
        carry=carry,
        updates=progress.done,
        counters=progress.counters,
        earlier_s=progress.earlier_s,
        interrupted=interrupted,
        rollbacks=watcher.state.retries,
    )


def _begin(
    stage: Stage, workdir: PathLike, checkpointer: Checkpointer, watcher: Watcher
) -> tuple[Carry, Any, Counters, int | None, float]:
    """Restores the newest checkpoint of a stage, or creates its initial carry if there is none.

    Returns:
      The carry, its shardings, the counters of the stage, the number of completed updates (None if
      there is no checkpoint), and the time of the initialization in seconds.
    """
    if multihost.from_primary(saved_steps(workdir)):
        carry, shardings, extra, done = restore(stage, checkpointer)
        carry, counters = resume(carry, extra, done, workdir, watcher)
        return carry, shardings, counters, done, 0.0
    init_start = time.perf_counter()
    write_incidents(workdir, ())  # Of a run without checkpoints, which begins anew.
    carry, shardings = start(stage)
    return carry, shardings, Counters(), None, time.perf_counter() - init_start


@contextlib.contextmanager
def _profiling(
    stage: Stage, workdir: PathLike, writer: MetricWriter, progress: Progress, *, enabled: bool
) -> Iterator[Profile | None]:
    """Context manager that closes the profile of a stage, which is None unless it is enabled."""
    if not enabled:
        yield None
        return
    whole = (stage.num_updates - progress.done) // stage.updates_per_dispatch
    profile = Profile(workdir, whole, writer.message)
    try:
        yield profile
    finally:
        profile.close()


def _writer_fields(stage: Stage) -> dict[str, Any]:
    """Returns the arguments of a `MetricWriter` that depend on the stage."""
    return {
        "total_steps": stage.num_updates,
        "console_names": stage.console,
        # There is at most one evaluation per dispatch.
        "eval_interval": stage.evaluate and max(stage.eval_interval, stage.updates_per_dispatch),
        "label": stage.name,
        "active": multihost.is_primary(),
        "tensorboard": "tensorboard" in stage.loggers,
    }


def _train(
    carry: Carry,
    stage: Stage,
    programs: "_Programs",
    progress: Progress,
    log: StageLog,
    stopping: Callable[[], bool],
    profile: Profile | None,
) -> tuple[Carry, Exception | None]:
    """Runs updates until the stage ends or diverges, a signal stops it, or the host's part fails.

    Returns:
      The carry after progress.done updates, and the error of the host's part or `Diverged`, if any.

    Raises:
      InvalidEnvironment: If no step of a dispatch has a finite state.
    """
    error: Exception | None = None
    while error is None and not (progress.over() or stopping()):
        size = min(stage.updates_per_dispatch, stage.num_updates - progress.done)
        if size not in programs:
            log.writer.message(f"{stage.name}: compiling ...")
            compile_start = time.perf_counter()
            programs.compile(size, carry)
            compile_s = time.perf_counter() - compile_start
            progress.add(compile_s=compile_s)
            log.writer.message(f"{stage.name}: compiled in {compile_s:.0f} s")
            if log.is_new and not stopping():
                log.log_start(carry, progress)
            continue  # A signal may have been received in the meantime.
        if profile is not None:
            profile.before_dispatch()
        update_start = time.perf_counter()
        step = jax.profiler.StepTraceAnnotation("dispatch", step_num=progress.done)
        with step, jax.transfer_guard("disallow"):
            carry, metrics, size, retries, error = programs[size](carry, stage.constants)
            jax.block_until_ready(carry.updates)
        if metrics is None:
            break
        seconds = time.perf_counter() - update_start
        if profile is not None:
            profile.after_dispatch(seconds)
        before = progress.done
        progress.done += size
        metrics = jax.device_get(metrics)
        finite, counted = bool(metrics.pop("finite")), metrics.pop("counted")
        valid = float(metrics.get("rollout/valid_fraction", 1.0))
        steps = size * stage.env_steps_per_update * valid
        progress.add(wall_s=seconds, env_steps=round(steps) if finite else 0)
        values = metrics_row(metrics, counted, progress.counters, progress.done) | {
            "time/update_s": seconds / size,
            "time/samples_per_s": size * stage.samples_per_update / seconds,
        }
        values |= {"optimizer/retries": retries} if retries else {}
        all_nonfinite = valid == 0.0 and metrics["rollout/nonfinite_envs"] > 0
        if all_nonfinite:
            log.writer.write(progress.done, values)
            raise envs.InvalidEnvironment(_all_nonfinite(before, progress.done))
        reason = log.watcher.observe(values, progress.done) if finite else NOT_FINITE
        if reason is not None:
            log.writer.write(progress.done, values)
            return carry, Diverged(reason, _diverged(reason, stage, log, before, progress), values)
        log.log(values, carry, progress, before)
    return carry, error


class _Programs(dict[int, Callable[[Carry, Any], DispatchResult]]):
    """Compiled dispatches of a stage by their numbers of updates."""

    def __init__(
        self,
        stage: Stage,
        shardings: Any,
        terminated: PreemptionGuard,
        tell: Callable[[str], None],
    ):
        super().__init__()
        self._stage, self._shardings = stage, shardings
        self._terminated, self._tell = terminated, tell
        self._host: HostUpdate | None = None  # Its parts are the same for dispatches of every size.

    def compile(self, size: int, carry: Carry) -> None:
        """Compiles the dispatch of `size` updates, for carries with the shapes of this one."""
        stage, terminated = self._stage, self._terminated
        if stage.on_host is None:
            assert stage.update is not None
            dispatch = make_dispatch(stage.update, size, self._shardings)
            program_traced = dispatch.trace(carry, stage.constants)
            stage.inspect(program_traced.jaxpr, carry)
            lowered = program_traced.lower()
            _check_metrics(lowered.out_info[1], stage)
            program = lowered.compile()

            def traced(carry: Carry, constants: Any) -> DispatchResult:
                carry, metrics = program(carry, constants)
                return DispatchResult(carry, metrics, size)

            self[size] = traced
            return
        if self._host is None:
            self._host = stage.on_host(carry, stage.constants)
            _check_metrics(self._host.metrics, stage)
        self[size] = make_host_dispatch(
            self._host, size, carry, stopping=terminated, sleep=terminated.sleep, tell=self._tell
        )


def _check_metrics(metrics: Collection[str], stage: Stage) -> None:
    """Raises ValueError for undefined metrics, or absent ones, before the update is compiled."""
    for name in metrics:
        if name not in ("finite", "counted"):
            metric_definitions.lookup(name)
    divergence.check_metrics(stage.rollback, metrics, stage.name)


def _diverged(reason: str, stage: Stage, log: StageLog, before: int, progress: Progress) -> str:
    retries = log.watcher.state.retries
    return (
        f"Stage {stage.name!r} diverged in updates {before + 1} to {progress.done}"
        f"{f', after {retries} rollbacks' if retries else ''}: {reason}. These updates are not "
        "saved. The same command would diverge again: start in a fresh workdir with a lower "
        f"learning rate, or see optimizer/skipped_steps, loss/* and grad/norm in {log.path}."
    )


def _rolled_back(stage: Stage, diverged: Diverged, watcher: Watcher, step: int) -> str:
    options = watcher.options
    return (
        f"{stage.name}: diverged: {diverged.reason}. Rollback {watcher.state.retries} of at most "
        f"{options.max_retries} to update {step}, with {options.learning_rate_factor:g} times the "
        f"learning rate and fresh random numbers; see {INCIDENTS}."
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
