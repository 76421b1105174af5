"""One PPO update of flat observations, against Brax's own PPO.

The same environment, batch, unroll, epochs, minibatches and hidden layers. Both are counted in
decisions a second; a step in which our environments only reset is none.
"""

from collections.abc import Iterator
import functools
import queue
import threading
from typing import Any

from brax import envs as brax_envs
from brax.training.agents.ppo import train as brax_ppo
import jax
import jax.numpy as jnp

from configs import mlp_ppo
from experiments.benchmarks.harness import Measure, Row, compare, seconds
from mmrl_jax.training import factory, loop

ENVIRONMENTS = {"inverted_pendulum": "spring", "reacher": "spring", "fast": None}
ENVS, UNROLL, MINIBATCHES, EPOCHS, UPDATES = 1024, 10, 16, 4, 5


def rows(runs: int) -> Iterator[Row]:
    """Measures environment after environment."""
    for name, backend in ENVIRONMENTS.items():
        with BraxPPO(name, backend) as peer:
            ours = our_updates(name, backend)
            yield compare(f"{name} / Brax's PPO", ours, peer, unit="env steps/s", runs=runs)


def our_updates(name: str, backend: str | None) -> Measure:
    """Env steps a second of UPDATES updates."""
    config = mlp_ppo.get_config(name)
    config.env.options = {"episode_length": 1000} | ({"backend": backend} if backend else {})
    config.ppo.num_envs, config.ppo.unroll = ENVS, UNROLL
    config.ppo.minibatches, config.ppo.epochs = MINIBATCHES, EPOCHS
    factory.check(config)
    stage = factory.ppo_stage(config, factory.make_mesh(config))
    carry, shardings = loop.start(stage)
    dispatch = loop.make_dispatch(stage.update, UPDATES, shardings)
    metrics: dict[str, jax.Array] = {}

    def run() -> jax.Array:
        nonlocal carry, metrics
        carry, metrics = dispatch(carry, None)
        return carry.updates

    def measure() -> float:
        took = seconds(run)
        return UPDATES * ENVS * UNROLL * float(metrics["rollout/valid_fraction"]) / took

    return measure


class BraxPPO:
    """Env steps a second of UPDATES updates of Brax's trainer, which waits between two calls."""

    def __init__(self, name: str, backend: str | None):
        self._rates: queue.Queue[Any] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._stopped = False
        options = {"backend": backend} if backend else {}
        train = functools.partial(
            brax_ppo.train,
            environment=brax_envs.get_environment(name, **options),
            num_timesteps=1000 * UPDATES * ENVS * UNROLL,
            num_evals=1001,  # Calls progress_fn after every UPDATES updates.
            run_evals=False,
            max_devices_per_host=1,
            num_envs=ENVS,
            episode_length=1000,
            unroll_length=UNROLL,
            batch_size=ENVS // MINIBATCHES,
            num_minibatches=MINIBATCHES,
            num_updates_per_batch=EPOCHS,
            normalize_observations=True,
            progress_fn=self._progress,
        )
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)

    def __enter__(self) -> "BraxPPO":
        # Gone from jax, but all that Brax's trainer wants of it on one device is a new axis.
        jax.device_put_replicated = lambda tree, devices: jax.tree.map(
            lambda x: jnp.stack([x] * len(devices)), tree
        )
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

    def _run(self, train: Any) -> None:
        self._go.acquire()
        try:
            train()
        except _Stop:
            pass
        except BaseException as error:  # Raised again where it is waited for.
            self._rates.put(error)

    def _progress(self, _: int, metrics: dict[str, Any]) -> None:
        self._rates.put(float(metrics["training/sps"]))
        self._go.acquire()
        if self._stopped:
            raise _Stop


class _Stop(Exception):
    """Ends Brax's trainer."""
