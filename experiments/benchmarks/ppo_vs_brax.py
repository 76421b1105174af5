"""PPO updates with flat observations, compared with Brax's PPO.

Both sides use the same environment, batch size, unroll, epochs, minibatches and hidden layers, and
are measured in environment steps per second. Steps that only reset an environment do not count.
"""

from collections.abc import Iterator
import queue
import threading
from typing import Any

import jax
import ml_collections

from experiments.benchmarks.harness import Measure, Row, compare, seconds
from experiments.brax_ppo import trainer
from mmrl_jax import problems
from mmrl_jax.configs import mlp_ppo
from mmrl_jax.training import loop

ENVIRONMENTS = {"inverted_pendulum": "spring", "reacher": "spring", "fast": None}
NUM_ENVS = 1024
UPDATES = 5


def rows(runs: int) -> Iterator[Row]:
    """Measures one environment after another."""
    for name, backend in ENVIRONMENTS.items():
        config = mlp_ppo.get_config(name)
        config.env.options = {"episode_length": 1000} | ({"backend": backend} if backend else {})
        config.ppo.num_envs, config.ppo.optimizer.schedule = NUM_ENVS, "constant"
        config.mesh.data = 1
        with BraxPPO(config) as peer:
            ours = our_updates(config)
            yield compare(f"{name} / Brax's PPO", ours, peer, unit="env steps/s", runs=runs)


def our_updates(config: ml_collections.ConfigDict) -> Measure:
    """Returns a measurement of the environment steps per second of UPDATES updates."""
    stage = problems.make(config).stage("ppo")
    carry, shardings = loop.start(stage)
    dispatch = loop.make_dispatch(stage.update, UPDATES, shardings)
    metrics: dict[str, jax.Array] = {}

    def run() -> jax.Array:
        nonlocal carry, metrics
        carry, metrics = dispatch(carry, stage.constants)
        return carry.updates

    def measure() -> float:
        duration = seconds(run)
        return UPDATES * _batch(config) * float(metrics["rollout/valid_fraction"]) / duration

    return measure


class BraxPPO:
    """Measures the environment steps per second of UPDATES updates of Brax's trainer.

    The trainer runs in a thread, which waits between two measurements.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        self._rates: queue.Queue[Any] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(config,), daemon=True)

    def __enter__(self) -> "BraxPPO":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()

    def __call__(self) -> float:
        self._go.release()
        result = self._rates.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, config: ml_collections.ConfigDict) -> None:
        self._go.acquire()
        if self._stopped:  # Our side failed before the first measurement of the peer.
            return
        try:
            trainer(config)(
                num_timesteps=1000 * UPDATES * _batch(config),
                num_evals=1001,  # Calls progress_fn after every UPDATES updates.
                progress_fn=self._progress,
            )
        except _Stop:
            pass
        except BaseException as error:  # It is raised again in `__call__`.
            self._rates.put(error)

    def _progress(self, _: int, metrics: dict[str, Any]) -> None:
        self._rates.put(float(metrics["training/sps"]))
        self._go.acquire()
        if self._stopped:
            raise _Stop


def _batch(config: ml_collections.ConfigDict) -> int:
    return config.ppo.num_envs * config.ppo.unroll_length


class _Stop(Exception):
    """Raised in Brax's trainer to end it."""
