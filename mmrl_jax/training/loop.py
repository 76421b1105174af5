"""The loop of every stage: compile once, dispatch, log, evaluate, checkpoint, resume."""

from collections.abc import Callable
import dataclasses
import pathlib
import signal
import time
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs.brax_api import State
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.training.checkpoint import Checkpointer
from mmrl_jax.training.config import ConfigLike
from mmrl_jax.training.metrics import MetricWriter
from mmrl_jax.types import Metrics

# What a resumed run may change: how long it goes on and how often it reports.
MAY_CHANGE = ("run",)


class Carry(struct.PyTreeNode):
    """All that a run needs to go on: a checkpoint of it is a checkpoint of the run.

    Attributes:
      learner: parameters, optimiser, statistics.
      env_state: of all environments, [B, ...]; None for a stage without environments.
      rng: key of the run; update u uses fold_in(rng, u) and nothing else.
      updates: int32 [], updates done; for demonstrations this is the data position too.
    """

    learner: LearnerState
    env_state: State | None
    rng: jax.Array
    updates: jax.Array


Update = Callable[[Carry, Any], tuple[Carry, Metrics]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, as the factory builds it.

    Attributes:
      name: for the console and the reports.
      init: () -> Carry, fresh.
      update: (carry, data) -> (carry, metrics), metrics float32 [], NaN where there is nothing to
        report.
      data: pytree given to every update, or None; never donated.
      updates: where the stage ends.
      updates_per_dispatch: updates in one compiled call.
      env_steps_per_update: environment steps (0 for a stage without environments).
      samples_per_update: samples learned from in one update, for the rate on the console.
      evaluate: learner -> metrics to log, or None.
      eval_interval: updates between evaluations.
      checkpoint_interval: updates between checkpoints.
      keep: newest checkpoints kept, beside the best.
      best_metric: by which the best is chosen, or None.
      console: metrics to show.
      shardings: carry -> shardings of a carry, for the mesh the stage runs on.
    """

    name: str
    init: Callable[[], Carry]
    update: Update
    data: Any
    updates: int
    updates_per_dispatch: int
    env_steps_per_update: int
    samples_per_update: int
    evaluate: Callable[[LearnerState], dict[str, float]] | None
    eval_interval: int
    checkpoint_interval: int
    keep: int
    best_metric: str | None
    console: tuple[str, ...]
    shardings: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a stage ended.

    Attributes:
      carry: the last one.
      updates: updates done, those before a resume included.
      wall_s: wall time, compile time left out, those before a resume included.
      compile_s: time to compile the dispatch, this time.
      interrupted: a SIGTERM ended it before its time; the checkpoint is saved.
    """

    carry: Carry
    updates: int
    wall_s: float
    compile_s: float
    interrupted: bool


def make_dispatch(update: Update, updates: int, shardings: Any) -> Any:
    """One compiled call of `updates` updates; the carry is donated.

    Returns:
      (carry, data) -> (carry, metrics), metrics averaged over the updates in which they are finite
      numbers (an update in which no episode ended has no episode metrics).
    """

    def dispatch(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        carry, metrics = jax.lax.scan(lambda c, _: update(c, data), carry, None, length=updates)
        return carry, jax.tree.map(_mean_of_numbers, metrics)

    return jax.jit(dispatch, donate_argnums=0, out_shardings=(shardings, None))


def _mean_of_numbers(x: jax.Array) -> jax.Array:
    counted = ~jnp.isnan(x)
    total = jnp.sum(jnp.where(counted, x, 0.0))
    return jnp.where(jnp.any(counted), total / jnp.sum(counted), jnp.nan)


def place(tree: Any, shardings: Any) -> Any:
    """Puts a fresh carry on the devices, as arrays of strong types (so that nothing recompiles)."""
    strong = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
    # A copy: two leaves of a fresh state may be one buffer, which cannot be donated twice.
    return jax.tree.map(jnp.copy, jax.device_put(strong, shardings))


def run(
    stage: Stage,
    *,
    workdir: str | pathlib.Path,
    config: ConfigLike,
    max_seconds: float | None = None,
    log_interval_s: float = 10.0,
) -> Result:
    """Runs a stage to its end in `workdir`, from its newest checkpoint if there is one.

    Args:
      stage: what to run.
      workdir: gets checkpoints, metrics.jsonl and TensorBoard events.
      config: of the run, stored with it; a workdir of another config is refused.
      max_seconds: ends the stage early once its wall time (without compile time) reaches this.
      log_interval_s: least time between two console lines where there is no terminal.

    Raises:
      ValueError: see `Checkpointer`.
      FloatingPointError: the loss or a parameter is not finite.
    """
    compile_start = time.perf_counter()
    fresh = stage.init()
    shardings = stage.shardings(fresh)
    carry = place(fresh, shardings)
    del fresh
    with (
        Checkpointer(
            workdir,
            config=config,
            keep=stage.keep,
            best_metric=stage.best_metric,
            save_interval=stage.checkpoint_interval,
            may_change=MAY_CHANGE,
        ) as checkpointer,
        Terminated() as terminated,
    ):
        restored = checkpointer.restore_latest(carry)
        done, wall_s = 0, 0.0
        if restored is not None:
            carry, extra, done = restored
            wall_s = extra["wall_s"]
        size = min(stage.updates_per_dispatch, max(stage.updates - done, 1))
        compiled = make_dispatch(stage.update, size, shardings).lower(carry, stage.data).compile()
        compile_s = time.perf_counter() - compile_start
        writer = MetricWriter(
            workdir,
            total_steps=stage.updates,
            resume_step=done if restored is not None else None,
            console_names=stage.console,
            console_interval_s=log_interval_s,
            label=stage.name,
            active=jax.process_index() == 0,
        )
        with writer:
            while done + size <= stage.updates and not terminated():
                if max_seconds is not None and wall_s >= max_seconds:
                    break
                started = time.perf_counter()
                with jax.transfer_guard("disallow"):
                    carry, metrics = compiled(carry, stage.data)
                    jax.block_until_ready(carry.updates)
                seconds = time.perf_counter() - started
                wall_s += seconds
                before, done = done, done + size
                values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                values = {k: v for k, v in values.items() if not np.isnan(v)}
                if not np.isfinite(values.get("loss/total", np.nan)):
                    raise FloatingPointError(
                        f"The loss of stage {stage.name!r} is not finite after update {done}. The "
                        f"last checkpoint in {workdir} is intact; lower the learning rate, or look "
                        f"at loss/* and grad/norm in metrics.jsonl."
                    )
                values |= {
                    "time/update_s": seconds / size,
                    "time/compile_s": compile_s,
                    "time/samples_per_s": size * stage.samples_per_update / seconds,
                    "time/wall_s": wall_s,
                    "progress/updates": done,
                    "progress/env_steps": done * stage.env_steps_per_update,
                }
                last = done + size > stage.updates
                if stage.evaluate is not None and (
                    last or done // stage.eval_interval > before // stage.eval_interval
                ):
                    started = time.perf_counter()
                    values |= stage.evaluate(carry.learner)
                    values["time/eval_s"] = time.perf_counter() - started
                writer.write(done, values)
                best = stage.best_metric
                scores = {best: values[best]} if best is not None and best in values else {}
                checkpointer.save(done, carry, extra={"wall_s": wall_s}, metrics=scores, force=last)
            stopped = terminated()
            if done:
                checkpointer.save(done, carry, extra={"wall_s": wall_s}, metrics={}, force=True)
        checkpointer.wait()
    return Result(carry, done, wall_s, compile_s, stopped and done < stage.updates)


class Terminated:
    """Notes a SIGTERM, so that the loop can save and stop between two dispatches."""

    def __enter__(self) -> "Terminated":
        self._seen = False
        try:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # Not the main thread: signals are somebody else's.
            self._previous = None
        return self

    def __exit__(self, *unused: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def __call__(self) -> bool:
        return self._seen

    def _note(self, *unused: object) -> None:
        self._seen = True
