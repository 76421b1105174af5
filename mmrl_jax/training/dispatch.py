"""Runs several updates in one call: as one compiled program, or with host code in between."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.distributed import multihost
from mmrl_jax.rl import losses
from mmrl_jax.training.stage import Carry, HostUpdate, Update
from mmrl_jax.types import Metrics
from mmrl_jax.workdir import one_line

# Prefixes of metrics of optimizer steps, which are undefined for an update without such steps.
OPTIMIZER_METRICS = ("loss/", "grad/", "policy/", "dpo/")
# Maximum fraction of a dispatch's optimizer steps that may be skipped because they are not finite.
MAX_SKIPPED = 0.5
# Exceptions that may be a temporary outage, for example of a reward server or a file system.
TRANSIENT = (ValueError, RuntimeError, OSError)
# Seconds before each retry of the host's part of an update. They cover the restart of a server. In
# a longer outage the run ends, and the same command resumes it from the last checkpoint.
RETRY_AFTER_S = (1.0, 5.0, 25.0)


class DispatchResult(NamedTuple):
    """Result of a dispatch.

    Attributes:
      carry: Carry after the updates of the dispatch.
      metrics: Metrics of the updates, see `make_dispatch`; None if no update was completed.
      updates: Number of completed updates, which is smaller than requested after an error.
      retries: Number of retries of the host's part of an update.
      error: Error of the host's part of the next update after its last retry; None if all updates
        were completed.
    """

    carry: Carry
    metrics: Metrics | None
    updates: int
    retries: int = 0
    error: Exception | None = None


def make_dispatch(update: Update, updates: int, shardings: Any) -> Any:
    """Returns a jitted function that runs several updates and donates the carry.

    Args:
      update: Update of a stage, see `Stage.update`.
      updates: Number of updates in one call.
      shardings: Shardings of the carry.

    Returns:
      Function (carry, constants) -> (carry, metrics). Metrics are means over the updates. Those of
      'episode/*' are means over the updates in which an episode ended, and those in
      OPTIMIZER_METRICS over the updates with an optimizer step; they are 0 if there is no such
      update. 'counted' has the number of these updates by the name of the metric. 'finite', bool
      [], is True if fewer than MAX_SKIPPED of the optimizer steps were skipped and the variables of
      the policy are finite.
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
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = print,
) -> Callable[[Carry, Any], DispatchResult]:
    """Returns a function that runs several updates of a stage whose update needs the host.

    If the host's part of an update fails, it is retried after the delays of RETRY_AFTER_S. Its
    batch and random numbers depend on the number of the update alone, so that the retry is the same
    update, no update is skipped, and the run is bitwise equal to one without failures.

    Args:
      host: Compiled parts of the update.
      updates: Number of updates in one call.
      carry: Carry whose shapes and shardings are those of all later carries.
      stopping: Returns whether the run is stopping, in which case nothing is retried.
      sleep: Function that waits for a number of seconds before a retry.
      tell: Function that prints a message.

    Returns:
      Function (carry, constants) -> result of the dispatch.
    """

    def summary(variables: Any, rows: list[Metrics]) -> Metrics:
        return _summary(variables, jax.tree.map(lambda *x: jnp.stack(x), *rows))

    variables = carry.learner.without_optimizer()
    summarize = jax.jit(summary).lower(variables, [host.metrics] * updates).compile()

    def dispatch(carry: Carry, constants: Any) -> DispatchResult:
        rows: list[Metrics] = []
        retries, error = 0, None
        while len(rows) < updates and error is None:
            delays = list(RETRY_AFTER_S)
            while True:
                try:
                    batch = host.collect(carry, constants)
                    break
                except Exception as caught:
                    if multihost.is_lost(caught):
                        raise
                    if not delays or not is_transient(caught) or stopping():
                        error = caught
                        break
                    retries += 1
                    tell(f"An update failed, and is retried: {one_line(caught)}")
                    sleep(delays.pop(0))
            if error is None:
                carry, metrics = host.step(carry, constants, batch)
                rows.append(metrics)
        if not rows:
            return DispatchResult(carry, None, 0, retries, error)
        # After an error there are fewer rows than the summary was compiled for.
        summarized = (summarize if error is None else jax.jit(summary))(
            carry.learner.without_optimizer(), rows
        )
        return DispatchResult(carry, summarized, len(rows), retries, error)

    return dispatch


def is_transient(error: Exception) -> bool:
    """Returns whether an error may be a temporary outage rather than one of code or device."""
    if isinstance(error, multihost.OtherProcessFailed):
        return error.transient
    device = isinstance(error, jax.errors.JaxRuntimeError) or multihost.is_lost(error)
    return isinstance(error, TRANSIENT) and not device


def _summary(variables: Any, metrics: Metrics) -> Metrics:
    """Summarizes the metrics of the updates of a dispatch, see `make_dispatch`.

    Args:
      variables: Variables of the policy after the last update.
      metrics: Metrics of the updates, [updates] each.
    """
    leaves_finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(variables)])
    taken, skipped = metrics["optimizer/steps"], metrics["optimizer/skipped_steps"]
    # Skipped spikes are finite. They count as steps here, or a call of spikes alone would seem to
    # have diverged.
    steps = taken + skipped + metrics.get("optimizer/skipped_spikes", 0.0)

    counts = {name: taken > 0 for name in metrics if name.startswith(OPTIMIZER_METRICS)}
    counts |= {name: ~jnp.isnan(x) for name, x in metrics.items() if name.startswith("episode/")}
    means = {
        name: losses.masked_mean(x, counts[name]) if name in counts else jnp.mean(x)
        for name, x in metrics.items()
    }
    finite = jnp.all(leaves_finite) & (jnp.sum(skipped) < MAX_SKIPPED * jnp.sum(steps))
    # A missing mean is 0 and not NaN, because JAX_DEBUG_NANS raises for any NaN that a compiled
    # program returns.
    return means | {"finite": finite, "counted": jax.tree.map(jnp.sum, counts)}
