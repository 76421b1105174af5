"""A stage of a run, as a problem builds it and the loop runs it."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from mmrl_jax.envs.brax_api import State
from mmrl_jax.types import Metrics


class Carry(struct.PyTreeNode):
    """All that a run needs to go on: a checkpoint of it is a checkpoint of the run.

    Attributes:
      learner: parameters, optimizer, normalizer; `without_optimizer` is what it acts with.
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
    """An update that is called from Python, in two halves that compile nothing any more.

    Attributes:
      collect: (carry, constants) -> what is learned from. It may fail, as an API of rewards does
        that is down for a while, and be called again: it depends on its arguments alone, and
        donates nothing.
      step: (carry, constants, what `collect` gave) -> (carry, metrics), see `Stage`; it may donate
        the carry.
      metrics: their shapes, dtypes and shardings.
    """

    collect: Callable[[Carry, Any], Any]
    step: Callable[[Carry, Any, Any], tuple[Carry, Metrics]]
    metrics: dict[str, jax.ShapeDtypeStruct]


class StageProbe(NamedTuple):
    """Something that is measured now and then during a stage.

    Attributes:
      name: For messages.
      interval: Updates between two calls.
      measure: (learner, update) -> metrics to log; it may write files.
    """

    name: str
    interval: int
    measure: Callable[[Any, int], dict[str, float]]


class Start:
    """Arrays that a fresh carry is made of, kept until it is; None where it needs none.

    A closure over them would keep them beside the carry for as long as the run takes. They may be
    given as shapes: a carry is then made under `jax.eval_shape` alone.
    """

    def __init__(self, arrays: Any):
        self._arrays, self._released = arrays, False

    def __call__(self) -> Any:
        """The arrays.

        Raises:
          RuntimeError: they were released.
        """
        if self._released:
            raise RuntimeError("The carry was made of this stage's start: build another stage.")
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
            self._arrays,
        )

    def release(self) -> None:
        """Lets go of them."""
        self._arrays, self._released = None, self._arrays is not None or self._released


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, as a problem builds it and the loop runs it.

    Attributes:
      name: Name of the stage, for the console and the reports.
      init: Returns a fresh carry.
      update: (carry, constants) -> (carry, metrics), with metrics float32 [], among them
        'optimizer/steps' and 'optimizer/skipped_steps', the optimizer steps taken, and those
        skipped because the loss or its gradient is not finite. 'episode/*' is NaN where no episode
        ended. It is traced, and the updates of a dispatch are one compiled program. None for a
        stage with `on_host`.
      constants: Pytree that is given to every update and never donated; or None.
      num_updates: Update at which the stage ends.
      updates_per_dispatch: Updates in one compiled call; the last one may have fewer.
      env_steps_per_update: Steps of the unroll, resets among them; 0 without environments.
      samples_per_update: Samples that an update learns from, for the rate on the console.
      evaluate: Learner -> metrics to log, before the first update too; or None.
      eval_interval: Updates between two evaluations.
      checkpoint_interval: Updates between two checkpoints.
      max_to_keep: Number of newest checkpoints that are kept beside the best.
      best_metric: Metric by which the best checkpoint is chosen; or None.
      console: Metrics that the console shows.
      shardings: Carry -> shardings of a carry, for the mesh that the stage runs on.
      on_host: Instead of `update`: (carry, constants) -> the compiled programs of an update.
      probes: What else is measured now and then; one that fails is a message.
      loggers: Names of further loggers, see `monitoring.loggers`.
      release: Releases the arrays that `init` begins with, see `Start`; it is called once they are
        in a carry, or are not needed for one.
    """

    name: str
    init: Callable[[], Carry]
    update: Update | None
    constants: Any
    num_updates: int
    updates_per_dispatch: int
    env_steps_per_update: int
    samples_per_update: int
    evaluate: Callable[[Any], dict[str, float]] | None
    eval_interval: int
    checkpoint_interval: int
    max_to_keep: int
    best_metric: str | None
    console: tuple[str, ...]
    shardings: Callable[[Any], Any]
    on_host: Callable[[Carry, Any], HostUpdate] | None = None
    probes: tuple[StageProbe, ...] = ()
    loggers: tuple[str, ...] = ("tensorboard",)
    release: Callable[[], object] = lambda: None
