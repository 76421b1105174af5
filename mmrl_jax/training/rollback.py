"""Rollbacks: a stage that diverges continues from its last good checkpoint.

A rollback is a resume within the process, from the newest checkpoint that was saved on schedule and
while no metric was suspicious. It multiplies the learning rate, and folds its number into the keys
of the carry, without which the bitwise equal updates would diverge again.

    workdir/incidents.jsonl    one JSON object per rollback, see `Incident`

The changed carry is not saved. Instead, each incident says which checkpoint it changed, and whoever
restores this checkpoint changes it in the same way, in this process or in a later one. A run that
is resumed after a rollback is therefore bitwise equal to one that was never stopped.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import math
from typing import Any

import jax
import numpy as np

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.stability import divergence, learning_rate
from mmrl_jax.stability.divergence import RollbackOptions, Watch
from mmrl_jax.training.checkpoint import Checkpointer
from mmrl_jax.training.progress import Counters, Progress
from mmrl_jax.training.stage import Carry

INCIDENTS = "incidents.jsonl"
WATCH = "watch"  # Name of the state of the detection in what a checkpoint stores.
# Added to the number of a rollback that is folded into a key: the numbers of updates and episodes,
# which are folded into the same keys, do not reach it.
RETRIES = 2**31
NOT_FINITE = (
    "a parameter is not finite, or the loss or gradient of at least half of the optimizer steps is "
    "not"
)


class Diverged(FloatingPointError):
    """A stage has diverged.

    Args:
      reason: Description of what has diverged, as the end of a sentence.
      message: Error message if the run ends.
      metrics: Metrics of the dispatch that has diverged.
    """

    def __init__(self, reason: str, message: str, metrics: Mapping[str, float]):
        super().__init__(message)
        self.reason, self.metrics = reason, metrics


@dataclasses.dataclass(frozen=True)
class Incident:
    """A divergence and the rollback that followed.

    Attributes:
      retry: Number of the rollback in the stage, from 1 on.
      update: Last update of the dispatch that diverged.
      reason: Description of what had diverged.
      restored_step: Update after which the restored checkpoint was saved.
      learning_rate: Learning rate of the dispatch that diverged, times the factor of the rollback;
        None if the update logs no 'lr'.
      counters: Counters of the stage at the divergence, see `Counters`. They include the updates
        that were discarded.
      metrics: Metrics of the dispatch that diverged; None stands for a value that is not finite.
    """

    retry: int
    update: int
    reason: str
    restored_step: int
    learning_rate: float | None
    counters: Mapping[str, Any]
    metrics: Mapping[str, float | None]


class Watcher:
    """Looks for divergences in the rows of a stage; it finds none if rollbacks are off.

    Args:
      options: Options of the rollback.

    Attributes:
      options: Options of the rollback.
      enabled: Whether a divergence is followed by a rollback, as long as retries are left.
      state: State of the detection.
    """

    def __init__(self, options: RollbackOptions):
        self.options, self.enabled = options, options.max_retries > 0
        self.state = Watch()

    def observe(self, values: Mapping[str, float], update: int) -> str | None:
        """Returns a description of the divergence at a row of metrics; None if there is none."""
        if not self.enabled:
            return None
        self.state, reason = divergence.observe(self.state, values, update, self.options)
        return reason

    def to_extra(self) -> dict[str, Any]:
        """Returns what a checkpoint stores for `resume`, in addition to the counters."""
        return {WATCH: dataclasses.asdict(self.state)} if self.enabled else {}


def read(workdir: workdir_lib.PathLike) -> list[Incident]:
    """Returns the incidents of a stage; all processes get those that process 0 reads."""
    path = workdir_lib.as_path(workdir) / INCIDENTS
    text = path.read_bytes() if multihost.is_primary() and path.exists() else b""
    lines = bytes(multihost.from_primary(list(text))).splitlines()
    return [Incident(**json.loads(line)) for line in lines]


def write(workdir: workdir_lib.PathLike, incidents: Sequence[Incident]) -> None:
    """Replaces the incidents of a stage atomically; only process 0 writes."""
    path = workdir_lib.as_path(workdir) / INCIDENTS
    if multihost.is_primary() and (incidents or path.exists()):
        lines = (json.dumps(dataclasses.asdict(x), allow_nan=False) for x in incidents)
        workdir_lib.write_text(path, "".join(f"{line}\n" for line in lines))


def resume(
    carry: Carry,
    extra: Mapping[str, Any],
    step: int,
    workdir: workdir_lib.PathLike,
    watcher: Watcher,
) -> tuple[Carry, Counters]:
    """Returns the carry and the counters with which a stage continues from a checkpoint.

    They are those of the checkpoint, changed by the rollbacks to it, if there were any since it was
    saved. Incidents that are no part of the course of the stage up to here are removed: those that
    followed on a later checkpoint, which is gone.

    Args:
      carry: Restored carry, which is donated if there was a rollback.
      extra: Values that were stored with it.
      step: Step of the checkpoint.
      workdir: Working directory of the stage.
      watcher: Watcher for divergences, whose state is restored.
    """
    counters = Counters(**{name: x for name, x in extra.items() if name != WATCH})
    if not watcher.enabled:
        return carry, counters
    watcher.state = Watch(**extra[WATCH])
    incidents = read(workdir)
    known = watcher.state.retries
    count = known + sum(
        1 for _ in itertools.takewhile(lambda x: x.restored_step == step, incidents[known:])
    )
    if count < len(incidents):
        write(workdir, incidents[:count])
    for each in incidents[known:count]:
        carry = _retried(carry, each.retry, watcher.options.learning_rate_factor)
        watcher.state = divergence.after_rollback(watcher.state, step, watcher.options)
        counters = Counters(**each.counters)
    return carry, counters


def roll_back(
    diverged: Diverged,
    like: Carry,
    *,
    workdir: workdir_lib.PathLike,
    checkpointer: Checkpointer,
    watcher: Watcher,
    progress: Progress,
) -> Carry:
    """Takes a stage back to its last good checkpoint, and records the incident.

    Args:
      diverged: The divergence. The carry that has diverged must be released before.
      like: Shapes, dtypes and shardings of the carry.
      workdir: Working directory of the stage.
      checkpointer: Checkpointer of the stage.
      watcher: Watcher for divergences, whose state is changed.
      progress: Progress of the stage, which is set to the checkpoint.

    Returns:
      The carry with which the stage continues.

    Raises:
      Diverged: `diverged`, if no retries are left, or there are none at all.
    """
    if watcher.state.retries >= watcher.options.max_retries:
        raise diverged
    restored = checkpointer.restore_latest(like, rollback=True)
    assert restored is not None  # There is one of step 0.
    carry, extra, step = restored
    # If a damaged checkpoint was left out, this one is from before some of the incidents.
    incidents = [x for x in read(workdir) if x.restored_step <= step]
    rate = diverged.metrics.get("lr")
    incident = Incident(
        retry=len(incidents) + 1,
        update=progress.done,
        reason=diverged.reason,
        restored_step=step,
        learning_rate=None if rate is None else rate * watcher.options.learning_rate_factor,
        counters=dataclasses.asdict(progress.add()),
        metrics={n: x if math.isfinite(x) else None for n, x in diverged.metrics.items()},
    )
    write(workdir, [*incidents, incident])
    carry, progress.counters = resume(carry, extra, step, workdir, watcher)
    progress.done = step
    return carry


def _retried(carry: Carry, retry: int, factor: float) -> Carry:
    """Returns a carry with a lower learning rate and fresh random numbers."""
    number = np.uint32(RETRIES + retry)
    shardings = jax.tree.map(lambda x: x.sharding, carry)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def changed(carry: Carry) -> Carry:
        learner = carry.learner
        learner = learner.replace(
            opt_state=learning_rate.lower(learner.opt_state, factor),
            extras=learning_rate.lower(learner.extras, factor),
        )
        env_state = carry.env_state
        if env_state is not None:  # The key of an environment samples its next episodes.
            keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(env_state.info["key"])
            env_state = env_state.replace(info=env_state.info | {"key": keys})
        return carry.replace(
            learner=learner,
            env_state=env_state,
            rng=jax.random.fold_in(carry.rng, number),
        )

    return changed(carry)
