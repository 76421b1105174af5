"""Definition of a stage of a run, which a problem builds and the loop runs."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from mmrl_jax.envs.brax_api import State
from mmrl_jax.stability.divergence import RollbackOptions
from mmrl_jax.types import Metrics


class Carry(struct.PyTreeNode):
    """Complete state of a run, so that a checkpoint of it is sufficient to resume.

    Attributes:
      learner: State of the learner: parameters, optimizer state and normalizer. Its
        `without_optimizer` returns the variables of the policy.
      env_state: State of all environments, with leaves [B, ...]; None for a stage without
        environments.
      rng: PRNG key of the run. Update u uses fold_in(rng, u) and no other key; a rollback replaces
        it, see `training.rollback`.
      updates: Number of completed updates, int32 []. It is also the position in the data of
        demonstrations.
      in_flight: Completions of which the next update learns, if they were sampled during the last
        update, with leaves [B, ...]; they have no meaning before the first update. None if an
        update samples its own experience.
    """

    learner: Any  # A LearnerState or a TokenState.
    env_state: State | None
    rng: jax.Array
    updates: jax.Array
    in_flight: Any = None


Update = Callable[[Carry, Any], tuple[Carry, Metrics]]


class HostUpdate(NamedTuple):
    """The two compiled parts of an update that needs the host, for example for reward functions.

    Attributes:
      collect: (carry, constants) -> batch. It may fail, for example while a reward server is down,
        and is then retried: it must depend on its arguments alone and donate nothing. With several
        processes it must fail in all of them or in none, see `multihost.on_all`.
      step: (carry, constants, batch) -> (carry, metrics), see `Stage.update`. It may donate the
        carry.
      metrics: Shapes, dtypes and shardings of the metrics by their names.
    """

    collect: Callable[[Carry, Any], Any]
    step: Callable[[Carry, Any, Any], tuple[Carry, Metrics]]
    metrics: dict[str, jax.ShapeDtypeStruct]


class StageProbe(NamedTuple):
    """A measurement that is taken at intervals during a stage.

    Attributes:
      name: Name of the probe, for messages.
      interval: Number of updates between two measurements.
      measure: (learner, number of completed updates) -> metrics to log. It may also write files.
    """

    name: str
    interval: int
    measure: Callable[[Any, int], dict[str, float]]


class Start:
    """Holds the initial arrays of a carry until the carry is created.

    A closure over the arrays would keep them in memory in addition to the carry for the whole run.

    Args:
      arrays: Pytree of arrays, or None if the carry needs no initial arrays. It may also have the
        shapes of arrays, for a carry that is only made under `jax.eval_shape`.
    """

    def __init__(self, arrays: Any):
        self._arrays, self._released = arrays, False

    def __call__(self) -> Any:
        """Returns the arrays.

        Raises:
          RuntimeError: If the arrays were released.
        """
        if self._released:
            raise RuntimeError(
                "The initial arrays of this stage were released when its carry was created: build "
                "a new stage."
            )
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
            self._arrays,
        )

    def release(self) -> None:
        """Drops the references to the arrays."""
        self._arrays, self._released = None, self._arrays is not None or self._released


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: Name of the stage, for the console and the reports.
      init: Returns a new carry.
      update: (carry, constants) -> (carry, metrics). It is traced, and the updates of a dispatch
        form one compiled program. Metrics are float32 []. They include 'optimizer/steps', the
        number of optimizer steps, and 'optimizer/skipped_steps', the number of steps that were
        skipped because the loss or its gradient is not finite; 'optimizer/skipped_spikes' counts
        those that were skipped as spikes, if any can be. 'episode/*' is NaN if no episode ended.
        None for a stage with `on_host`.
      constants: Pytree that is passed to every update and never donated; or None.
      num_updates: Number of updates after which the stage ends.
      updates_per_dispatch: Number of updates in one compiled call; the last call may have fewer.
      env_steps_per_update: Number of environment steps in an update, including resets; 0 without
        environments.
      samples_per_update: Number of samples in an update, for the rate on the console.
      evaluate: Learner -> metrics to log, also before the first update; or None.
      eval_interval: Number of updates between two evaluations.
      checkpoint_interval: Number of updates between two checkpoints.
      max_to_keep: Number of newest checkpoints that are kept in addition to the best.
      best_metric: Metric by which the best checkpoint is chosen; or None.
      console: Names of the metrics that the console shows.
      shardings: Returns the shardings of a carry on the mesh of the stage.
      on_host: (carry, constants) -> compiled parts of an update that needs the host; None for a
        stage with `update`.
      rollback: Whether and how a divergence is followed by a rollback, see `training.rollback`. The
        optimizer then ends with `learning_rate.scale_by_state`.
      probes: Further measurements. A probe that fails causes a message and does not end the run.
      loggers: Names of further loggers, see `monitoring.loggers`.
      inspect: Called with the traced program of the first dispatch and the carry, before it is
        compiled. It may raise an error that ends the run.
      release: Releases the initial arrays of `init`, see `Start`. It is called after a carry was
        created or restored.
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
    rollback: RollbackOptions = RollbackOptions()
    probes: tuple[StageProbe, ...] = ()
    loggers: tuple[str, ...] = ("tensorboard",)
    inspect: Callable[[Any, Carry], None] = lambda program, carry: None
    release: Callable[[], object] = lambda: None
