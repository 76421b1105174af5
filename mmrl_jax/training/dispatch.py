"""Several updates in one call: compiled as a whole, or with the host between compiled programs."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.rl import losses
from mmrl_jax.training.stage import Carry, HostUpdate, Update
from mmrl_jax.types import Metrics
from mmrl_jax.workdir import one_line

# Metrics of optimizer steps: of an update that took none they say nothing.
OF_STEPS = ("loss/", "grad/", "policy/", "dpo/")
# The share of a dispatch's optimizer steps that may be skipped because they are not finite.
MAX_SKIPPED = 0.5
# Seconds before the host's half of an update is called again: a restart of a server is waited for,
# an outage of hours is not, for the same command goes on from what is saved.
RETRY_AFTER_S = (1.0, 5.0, 25.0)


class Dispatched(NamedTuple):
    """What a dispatch has done.

    Attributes:
      carry: after its updates.
      metrics: see `make_dispatch`; None if there was no update.
      updates: done, fewer than asked for after an error.
      retries: how often the host's half of an update failed and was called again.
      error: by which the host's half of the next update failed in the end.
    """

    carry: Carry
    metrics: Metrics | None
    updates: int
    retries: int = 0
    error: Exception | None = None


def make_dispatch(update: Update, updates: int, shardings: Any) -> Any:
    """One compiled call of `updates` updates; the carry is donated.

    Returns:
      (carry, constants) -> (carry, metrics). Metrics are means over the updates; those of
      'episode/*' over the updates in which an episode ended, those in OF_STEPS over the updates
      that took a step, each 0 where there is none: 'counted' has their numbers of updates by the
      metrics' names. 'finite' is a bool []: less than MAX_SKIPPED of the optimizer steps were
      skipped, and what the learner acts with is finite.
    """

    def dispatch(carry: Carry, constants: Any) -> tuple[Carry, Metrics]:
        carry, metrics = jax.lax.scan(
            lambda c, _: update(c, constants), carry, None, length=updates
        )
        return carry, _summary(carry.learner.without_optimizer(), metrics)

    return jax.jit(dispatch, donate_argnums=0, out_shardings=(shardings, None))


def make_host_dispatch(
    host: HostUpdate,
    updates: int,
    carry: Carry,
    *,
    stopping: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = print,
) -> Callable[[Carry, Any], Dispatched]:
    """The same of an update that is called from Python, for carries like this one.

    The host's half of an update that fails is called again, at the times of RETRY_AFTER_S: of the
    same update, for its batch and its random numbers depend on its number alone. A run with such an
    outage is therefore bitwise the run without. No update is passed over.

    Args:
      host: the update.
      updates: of the dispatch.
      carry: whose shapes and shardings the others have.
      stopping: whether not to wait any more.
      tell: prints a message.
    """

    def summary(acts: Any, rows: list[Metrics]) -> Metrics:
        return _summary(acts, jax.tree.map(lambda *x: jnp.stack(x), *rows))

    acts = carry.learner.without_optimizer()
    summarize = jax.jit(summary).lower(acts, [host.metrics] * updates).compile()

    def dispatch(carry: Carry, constants: Any) -> Dispatched:
        rows: list[Metrics] = []
        retries, error = 0, None
        while len(rows) < updates and error is None:
            waits = list(RETRY_AFTER_S)
            while True:
                try:
                    batch = host.collect(carry, constants)
                    break
                except Exception as caught:
                    if not waits or stopping() or not may_pass(caught):
                        error = caught
                        break
                    retries += 1
                    tell(f"An update failed, and is tried again: {one_line(caught)}")
                    _wait(waits.pop(0), stopping)
            if error is None:
                carry, metrics = host.step(carry, constants, batch)
                rows.append(metrics)
        if not rows:
            return Dispatched(carry, None, 0, retries, error)
        # After an error there are fewer rows than the compiled summary takes.
        summarized = (summarize if error is None else jax.jit(summary))(
            carry.learner.without_optimizer(), rows
        )
        return Dispatched(carry, summarized, len(rows), retries, error)

    return dispatch


def may_pass(error: Exception) -> bool:
    """Whether an error of the host's half may be an outage, and none of the code or the device."""
    outside = isinstance(error, (ValueError, RuntimeError, OSError))
    return outside and not isinstance(error, jax.errors.JaxRuntimeError)


def _wait(seconds: float, stopping: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopping():
        time.sleep(min(0.2, seconds))


def _summary(acts: Any, metrics: Metrics) -> Metrics:
    """What a dispatch returns of the metrics of its updates, [updates] each.

    Args:
      acts: what the learner acts with after the last one.
      metrics: of the updates.
    """
    leaves_finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(acts)])
    taken, skipped = metrics["optimizer/steps"], metrics["optimizer/skipped_steps"]

    counts = {name: taken > 0 for name in metrics if name.startswith(OF_STEPS)}
    counts |= {name: ~jnp.isnan(x) for name, x in metrics.items() if name.startswith("episode/")}
    means = {
        name: losses.masked_mean(x, counts[name]) if name in counts else jnp.mean(x)
        for name, x in metrics.items()
    }
    finite = jnp.all(leaves_finite) & (jnp.sum(skipped) < MAX_SKIPPED * jnp.sum(taken + skipped))
    # That there is no mean is no NaN: JAX_DEBUG_NANS takes any in what a program returns for a
    # fault.
    return means | {"finite": finite, "counted": jax.tree.map(jnp.sum, counts)}
