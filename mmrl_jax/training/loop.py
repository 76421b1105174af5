"""The loop of every stage: compile once, dispatch, log, evaluate, checkpoint, resume."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
import pathlib
import signal
import time
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from mmrl_jax import envs
from mmrl_jax.envs.brax_api import State
from mmrl_jax.rl import losses
from mmrl_jax.training.alarms import Alarms
from mmrl_jax.training.checkpoint import Checkpointer
from mmrl_jax.training.config import ConfigLike
from mmrl_jax.training.metrics import JSONL_NAME, MetricWriter, read_jsonl
from mmrl_jax.training.settings import check_settings
from mmrl_jax.types import Metrics

# What a resumed run may change: how long it goes on and how often it reports.
MAY_CHANGE = ("run",)
# Metrics of optimiser steps: of an update that took none they say nothing.
OF_STEPS = ("loss/", "grad/", "policy/")
# The share of a dispatch's optimiser steps that may be skipped because they are not finite.
MAX_SKIPPED = 0.5


class Carry(struct.PyTreeNode):
    """All that a run needs to go on: a checkpoint of it is a checkpoint of the run.

    Attributes:
      learner: parameters, optimiser, statistics; `without_optimiser` is what it acts with.
      env_state: of all environments, [B, ...]; None for a stage without environments.
      rng: key of the run; update u uses fold_in(rng, u) and nothing else.
      updates: int32 [], updates done; for demonstrations this is the data position too.
    """

    learner: Any  # A LearnerState or a TokenState.
    env_state: State | None
    rng: jax.Array
    updates: jax.Array


Update = Callable[[Carry, Any], tuple[Carry, Metrics]]


class HostUpdate(NamedTuple):
    """An update that is called from Python, with what the host does between compiled programs.

    Attributes:
      update: (carry, data) -> (carry, metrics), see `Stage`; it compiles nothing any more, and may
        donate the carry.
      metrics: their shapes, dtypes and shardings.
    """

    update: Update
    metrics: dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, as the factory builds it.

    Attributes:
      name: for the console and the reports.
      init: () -> Carry, fresh.
      update: (carry, data) -> (carry, metrics), metrics float32 [], among them 'update/steps' and
        'update/skipped', the optimiser steps taken, and those skipped because the loss or its
        gradient is not finite. 'episode/*' is NaN where no episode ended. It is traced, and the
        updates of a dispatch are one compiled program. None for a stage with `on_host`.
      data: pytree given to every update, or None; never donated.
      updates: where the stage ends.
      updates_per_dispatch: updates in one compiled call; the last one may have fewer.
      env_steps_per_update: steps of the unroll, resets among them (0 without environments).
      samples_per_update: samples learned from in one update, for the rate on the console.
      evaluate: learner -> metrics to log, or None.
      eval_interval: updates between evaluations.
      checkpoint_interval: updates between checkpoints.
      keep: newest checkpoints kept, beside the best.
      best_metric: by which the best is chosen, or None.
      console: metrics to show.
      shardings: carry -> shardings of a carry, for the mesh the stage runs on.
      on_host: instead of `update`: compiles the programs of an update for a carry and the data.
    """

    name: str
    init: Callable[[], Carry]
    update: Update | None
    data: Any
    updates: int
    updates_per_dispatch: int
    env_steps_per_update: int
    samples_per_update: int
    evaluate: Callable[[Any], dict[str, float]] | None
    eval_interval: int
    checkpoint_interval: int
    keep: int
    best_metric: str | None
    console: tuple[str, ...]
    shardings: Callable[[Any], Any]
    on_host: Callable[[Carry, Any], HostUpdate] | None = None


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a stage counts on the host; it is stored with the checkpoints and goes on from there.

    Attributes:
      wall_s: time of the updates; initialisation, compilation and evaluations are left out.
      compile_s: time of initialisation and compilation, of all processes.
      total_s: all the time in `run`, of all processes.
      env_steps: decisions taken in environments; a step that only resets is none.
    """

    wall_s: float = 0.0
    compile_s: float = 0.0
    total_s: float = 0.0
    env_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """How a stage ended.

    Attributes:
      carry: the last one.
      updates: updates done, those before a resume included.
      counters: see there; those before a resume included.
      earlier_s: the part of counters.total_s that was spent before this process resumed the stage.
      interrupted: a SIGTERM or SIGINT came, even if only in the last update: nothing more should
        be started. The checkpoint is saved.
    """

    carry: Carry
    updates: int
    counters: Counters
    earlier_s: float
    interrupted: bool

    @property
    def wall_s(self) -> float:
        """Time of the updates."""
        return self.counters.wall_s


def make_dispatch(update: Update, updates: int, shardings: Any) -> Any:
    """One compiled call of `updates` updates; the carry is donated.

    Returns:
      (carry, data) -> (carry, metrics). Metrics are means over the updates; those of 'episode/*'
      over the updates in which an episode ended, those in OF_STEPS over the updates that took a
      step, each 0 where there is none: 'counted' has their numbers of updates by the metrics'
      names. 'sound' is a bool []: less than MAX_SKIPPED of the optimiser steps were skipped, and
      what the learner acts with is finite.
    """

    def dispatch(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        carry, metrics = jax.lax.scan(lambda c, _: update(c, data), carry, None, length=updates)
        return carry, _summary(carry.learner.without_optimiser(), metrics)

    return jax.jit(dispatch, donate_argnums=0, out_shardings=(shardings, None))


def make_host_dispatch(host: HostUpdate, updates: int, carry: Carry) -> Update:
    """The same of an update that is called from Python, for carries like this one."""

    def summary(acts: Any, rows: list[Metrics]) -> Metrics:
        return _summary(acts, jax.tree.map(lambda *x: jnp.stack(x), *rows))

    acts = carry.learner.without_optimiser()
    summarise = jax.jit(summary).lower(acts, [host.metrics] * updates).compile()

    def dispatch(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        rows = []
        for _ in range(updates):
            carry, metrics = host.update(carry, data)
            rows.append(metrics)
        return carry, summarise(carry.learner.without_optimiser(), rows)

    return dispatch


def _summary(acts: Any, metrics: Metrics) -> Metrics:
    """What a dispatch returns of the metrics of its updates, [updates] each.

    Args:
      acts: what the learner acts with after the last one.
      metrics: of the updates.
    """
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(acts)])
    taken, skipped = metrics["update/steps"], metrics["update/skipped"]

    counts = {name: taken > 0 for name in metrics if name.startswith(OF_STEPS)}
    counts |= {name: ~jnp.isnan(x) for name, x in metrics.items() if name.startswith("episode/")}
    means = {
        name: losses.masked_mean(x, counts[name]) if name in counts else jnp.mean(x)
        for name, x in metrics.items()
    }
    sound = jnp.all(finite) & (jnp.sum(skipped) < MAX_SKIPPED * jnp.sum(taken + skipped))
    # That there is no mean is no NaN: JAX_DEBUG_NANS takes any in what a program returns for a
    # fault.
    return means | {"sound": sound, "counted": jax.tree.map(jnp.sum, counts)}


def start(stage: Stage) -> tuple[Carry, Any]:
    """A fresh carry on the stage's devices, and its shardings.

    Its arrays are of strong types, so that nothing recompiles.

    Raises:
      InvalidEnvironment: see `envs.check_started`.
    """
    fresh = stage.init()
    if fresh.env_state is not None:
        envs.check_started(fresh.env_state)
    shardings = stage.shardings(fresh)
    strong = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), fresh)
    # A copy: two leaves of a fresh state may be one buffer, which cannot be donated twice.
    return jax.tree.map(jnp.copy, jax.device_put(strong, shardings)), shardings


def run(
    stage: Stage,
    *,
    workdir: str | pathlib.Path,
    config: ConfigLike,
    max_seconds: float | None = None,
    log_interval_s: float = 10.0,
) -> Result:
    """Runs a stage to its end in `workdir`, from its newest checkpoint if there is one.

    The stage ends at exactly `stage.updates`, or at the first dispatch after `max_seconds`, with an
    evaluation and a checkpoint; one that had ended before is returned as it is. Each evaluation
    that gives the best metric is followed by a checkpoint, so that the best can be restored.

    Args:
      stage: what to run.
      workdir: gets checkpoints, metrics.jsonl and TensorBoard events.
      config: of the run, stored with it; a workdir of another config is refused.
      max_seconds: ends the stage early once its updates have taken this long.
      log_interval_s: least time between two console lines where there is no terminal.

    Raises:
      ValueError: see `check_settings` and `Checkpointer`.
      InvalidEnvironment: see `start`; or all steps of a dispatch's environments are broken, see
        `AutoReset`.
      FloatingPointError: a parameter is not finite, or too many steps of a dispatch were skipped
        because their loss or gradient is not; nothing of that dispatch is saved.
    """
    check_settings()
    started = time.perf_counter()
    carry, shardings = start(stage)
    init_s = time.perf_counter() - started
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
        done, counters = 0, Counters()
        if restored is not None:
            carry, extra, done = restored
            counters = Counters(**extra)
        earlier_s = counters.total_s

        def over() -> bool:
            late = max_seconds is not None and counters.wall_s >= max_seconds
            return late or done >= stage.updates

        def add(**more: float) -> Counters:
            total = earlier_s + time.perf_counter() - started
            sums = {name: getattr(counters, name) + x for name, x in more.items()}
            return dataclasses.replace(counters, total_s=total, **sums)

        if over():
            return Result(carry, done, counters, earlier_s, terminated())
        counters = add(compile_s=init_s)
        programs: dict[int, Update] = {}
        compiled = _compiler(stage, shardings)
        alarms = _alarms_until(workdir, done)
        with MetricWriter(
            workdir,
            total_steps=stage.updates,
            max_wall_s=max_seconds,
            resume_step=done if restored is not None else None,
            console_names=stage.console,
            console_interval_s=log_interval_s,
            label=stage.name,
            active=jax.process_index() == 0,
        ) as writer:
            while not (over() or terminated()):
                size = min(stage.updates_per_dispatch, stage.updates - done)
                if size not in programs:
                    writer.message(f"{stage.name}: compiling ...")
                    compile_start = time.perf_counter()
                    programs[size] = compiled(size, carry)
                    compile_s = time.perf_counter() - compile_start
                    counters = add(compile_s=compile_s)
                    writer.message(f"{stage.name}: compiled in {compile_s:.0f} s")
                    continue  # A signal may have come meanwhile.
                update_start = time.perf_counter()
                with jax.transfer_guard("disallow"):
                    carry, metrics = programs[size](carry, stage.data)
                    jax.block_until_ready(carry.updates)
                seconds = time.perf_counter() - update_start
                before, done = done, done + size
                metrics = jax.device_get(metrics)
                sound, counted = bool(metrics.pop("sound")), metrics.pop("counted")
                valid = float(metrics.get("rollout/valid_fraction", 1.0))
                steps = size * stage.env_steps_per_update * valid
                counters = add(wall_s=seconds, env_steps=round(steps) if sound else 0)
                values = _row(metrics, counted, counters, done) | {
                    "time/update_s": seconds / size,
                    "time/samples_per_s": size * stage.samples_per_update / seconds,
                }
                if valid == 0.0 and metrics["rollout/broken"] > 0:
                    writer.write(done, values)
                    raise envs.InvalidEnvironment(_all_broken(before, done))
                if not sound:
                    writer.write(done, values)
                    raise FloatingPointError(_diverged(stage.name, workdir, before, done))
                last = over()
                if stage.evaluate is not None and (
                    last or done // stage.eval_interval > before // stage.eval_interval
                ):
                    eval_start = time.perf_counter()
                    values |= stage.evaluate(carry.learner)
                    values["time/eval_s"] = time.perf_counter() - eval_start
                for text in alarms.see(values).values():
                    writer.message(f"{stage.name}: alarm at update {done}: {text}")
                values |= {f"alarm/{name}": 1.0 for name in alarms.raised}
                writer.write(done, values)
                best = stage.best_metric
                scores = {best: values[best]} if best is not None and best in values else {}
                checkpointer.save(
                    done,
                    carry,
                    extra=dataclasses.asdict(add()),
                    metrics=scores,
                    force=last or bool(scores),
                )
            if done:
                checkpointer.save(
                    done, carry, extra=dataclasses.asdict(add()), metrics={}, force=True
                )
        checkpointer.wait()
        return Result(carry, done, add(), earlier_s, terminated())


def _compiler(stage: Stage, shardings: Any) -> Callable[[int, Carry], Update]:
    """(number of updates, a carry) -> the compiled dispatch of so many."""
    host: list[HostUpdate] = []  # Its programs serve dispatches of every size.

    def compiled(size: int, carry: Carry) -> Update:
        if stage.on_host is None:
            assert stage.update is not None
            dispatch = make_dispatch(stage.update, size, shardings)
            return dispatch.lower(carry, stage.data).compile()
        if not host:
            host.append(stage.on_host(carry, stage.data))
        return make_host_dispatch(host[0], size, carry)

    return compiled


def _row(
    metrics: Mapping[str, Any], counted: Mapping[str, int], counters: Counters, done: int
) -> dict[str, float]:
    """What is logged of a dispatch that ended at update `done`; for `counted` see `make_dispatch`.

    Metrics of episodes are left out where none ended, those of optimiser steps are NaN where none
    was taken.
    """
    absent = {name for name, count in counted.items() if not count}
    values = {name: math.nan if name in absent else float(x) for name, x in metrics.items()}
    return {n: x for n, x in values.items() if n not in absent or n.startswith(OF_STEPS)} | {
        "time/compile_s": counters.compile_s,
        "time/wall_s": counters.wall_s,
        "progress/updates": done,
        "progress/env_steps": counters.env_steps,
    }


def _alarms_until(workdir: str | pathlib.Path, done: int) -> Alarms:
    """Alarms that have seen what was logged up to `done` updates."""
    alarms, path = Alarms(), pathlib.Path(workdir) / JSONL_NAME
    for row in read_jsonl(path) if path.is_file() else []:
        if row["step"] <= done:
            alarms.see(row)
    return alarms


def _diverged(name: str, workdir: str | pathlib.Path, before: int, done: int) -> str:
    return (
        f"Stage {name!r} diverged in updates {before + 1} to {done}: a parameter is not finite, or "
        f"the loss or gradient of half of the optimiser steps or more is not. Nothing of them is "
        f"saved. The same command would come to the same point again: start in a fresh workdir "
        f"with a lower learning rate, or look at update/skipped, loss/* and grad/norm in "
        f"{pathlib.Path(workdir) / JSONL_NAME}."
    )


def _all_broken(before: int, done: int) -> str:
    return (
        f"No step of any environment in updates {before + 1} to {done} gave finite numbers alone, "
        "so that there is nothing to learn from: state.obs, reward, done, metrics, "
        "info['truncation'] and info['privileged'] must stay finite under actions in [-1, 1]."
    )


class Terminated:
    """Notes a SIGTERM or SIGINT, so that the loop can save and stop between two dispatches.

    A SIGINT after that raises KeyboardInterrupt: who presses Ctrl-C twice does not want to wait.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "Terminated":
        self._seen = False
        self._previous: dict[int, Any] = {}
        try:
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # Not the main thread: signals are somebody else's.
            pass
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._seen

    def _note(self, number: int, _: object) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = True
        # Not print: the signal may have come inside of one.
        os.write(2, b"\nStopping after the updates under way; Ctrl-C to stop at once.\n")
