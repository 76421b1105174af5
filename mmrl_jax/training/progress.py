"""Progress of a stage: its completed updates, and counters of its time and its steps."""

import dataclasses
import time

from mmrl_jax.distributed import multihost


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


class Progress:
    """Progress of a stage.

    Args:
      updates: Number of updates after which the stage ends.
      max_seconds: Time of the updates in seconds after which it ends early; None for no limit.
      started: Value of time.perf_counter() when this process began.
      done: Number of completed updates when this process began.
      counters: Counters of the stage when this process began.

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
        if self._max_seconds is None:
            return self.done >= self._updates
        late = multihost.any_process(self.counters.wall_s >= self._max_seconds)
        return late or self.done >= self._updates

    def add(self, **more: float) -> Counters:
        """Adds to the counters, updates the total time, and returns the counters."""
        total = self.earlier_s + time.perf_counter() - self._started
        sums = {name: getattr(self.counters, name) + x for name, x in more.items()}
        self.counters = dataclasses.replace(self.counters, total_s=total, **sums)
        return self.counters
