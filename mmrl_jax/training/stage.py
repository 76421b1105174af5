"""A stage of a run, as a factory builds it and the loop runs it."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import struct
import jax

from mmrl_jax.envs.brax_api import State
from mmrl_jax.types import Metrics


class Carry(struct.PyTreeNode):
    """All that a run needs to go on: a checkpoint of it is a checkpoint of the run.

    Attributes:
      learner: parameters, optimizer, statistics; `without_optimizer` is what it acts with.
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


class Start:
    """Arrays that a fresh carry is made of, kept until it is; None where it needs none.

    A closure over them would keep them beside the carry for as long as the run takes.
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
        return self._arrays

    def release(self) -> None:
        """Lets go of them."""
        self._arrays, self._released = None, self._arrays is not None or self._released


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, as the factory builds it.

    Attributes:
      name: for the console and the reports.
      init: () -> Carry, fresh.
      update: (carry, constants) -> (carry, metrics), metrics float32 [], among them 'update/steps'
        and 'optimizer/skipped_steps', the optimizer steps taken, and those skipped because the loss
        or its gradient is not finite. 'episode/*' is NaN where no episode ended. It is traced, and
        the updates of a dispatch are one compiled program. None for a stage with `on_host`.
      constants: pytree given to every update, or None; never donated.
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
      on_host: instead of `update`: compiles the programs of an update for a carry and the
        constants.
      release: lets go of the arrays that `init` begins with, see `Start`; called once they are in a
        carry, or are not needed for one.
    """

    name: str
    init: Callable[[], Carry]
    update: Update | None
    constants: Any
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
    release: Callable[[], object] = lambda: None
