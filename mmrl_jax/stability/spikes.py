"""Skipping of optimizer steps whose loss or gradient norm is a spike.

A batch with an extreme loss or gradient can undo many updates, although all of its numbers are
finite: even a clipped gradient points in a bad direction, and it enters the moments of Adam. As in
OLMo-core and MaxText (`skip_step_on_spikes`), a step is compared with the last steps that were
taken, and skipped where it exceeds their mean by a number of standard deviations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Smaller standard deviations count as this one. The terms of a policy gradient loss cancel, so that
# its value can be a rounding error, and the spread of rounding errors is no scale for spikes.
MIN_STD = 1e-5
# Number of steps that are skipped one after the other at most. A level that lasts longer is not a
# spike: the next step is taken, and the statistics start anew. Otherwise every further step would
# be skipped, because only steps that are taken enter the statistics.
MAX_IN_A_ROW = 32


class History(NamedTuple):
    """The last W values of each of K quantities, in a ring buffer.

    Attributes:
      values: Values, float32 [K, W]; those that are not recorded yet have no meaning.
      recorded: Number of values of a quantity since the start, int32 [].
    """

    values: jax.Array
    recorded: jax.Array


def empty_history(quantities: int, window: int) -> History:
    """Returns a history of K = `quantities` without values, for W = `window` values of each."""
    return History(jnp.zeros((quantities, window), jnp.float32), jnp.zeros((), jnp.int32))


def record(history: History, values: jax.Array) -> History:
    """Returns the history with new values, float32 [K], in the place of the oldest ones."""
    slot = history.recorded % history.values.shape[1]
    return History(history.values.at[:, slot].set(values), history.recorded + 1)


def mean_and_std(history: History) -> tuple[jax.Array, jax.Array]:
    """Returns means and standard deviations, float32 [K], of the recorded values.

    The standard deviation is the unbiased one, with n - 1 in the denominator, of n values.
    """
    window = history.values.shape[1]
    mask = jnp.arange(window) < history.recorded
    n = jnp.minimum(history.recorded, window)
    mean = jnp.sum(jnp.where(mask, history.values, 0.0), axis=1) / jnp.maximum(n, 1)
    squares = jnp.where(mask, (history.values - mean[:, None]) ** 2, 0.0)
    return mean, jnp.sqrt(jnp.sum(squares, axis=1) / jnp.maximum(n - 1, 1))


def is_spike(history: History, values: jax.Array, deviations: float) -> jax.Array:
    """Returns whether any of K values is a spike, bool [].

    A value is a spike if it exceeds the mean of its history by more than `deviations` standard
    deviations. There are no spikes before half of the window is filled.

    Args:
      history: The last values of each quantity.
      values: New values, float32 [K].
      deviations: Number of standard deviations.
    """
    mean, std = mean_and_std(history)
    high = values > mean + deviations * jnp.maximum(std, MIN_STD)
    return jnp.any(high) & (history.recorded >= max(2, history.values.shape[1] // 2))


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      inner: State of the wrapped optimizer.
      history: Losses and gradient norms of the last steps that were taken.
      in_a_row: Number of steps that were skipped since a step with a gradient was taken, int32 [].
      last_skipped: Whether the last step was skipped, bool [].
    """

    inner: optax.OptState
    history: History
    in_a_row: jax.Array
    last_skipped: jax.Array


def skip_spikes(
    optimizer: optax.GradientTransformation, *, deviations: float, window: int
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it skips the steps whose loss or gradient norm is a spike.

    A skipped step changes neither the parameters nor the state of the wrapped optimizer, and does
    not enter the statistics. Steps without any gradient do not enter them either: where most
    batches have nothing to learn from, the first one that has would look like a spike.

    Args:
      optimizer: Optimizer to wrap.
      deviations: Number of standard deviations above the mean from which on a value is a spike.
      window: Number of steps over which mean and standard deviation are taken.

    Returns:
      A transformation whose `update` needs two further keyword arguments: `loss` and `grad_norm`,
      float32 [] each. They must be finite, or the caller must drop the new state.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> SkipSpikesState:
        history = empty_history(2, window)
        return SkipSpikesState(
            inner.init(params), history, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.bool_)
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        loss: jax.Array,
        grad_norm: jax.Array,
        **extra: Any,
    ) -> tuple[optax.Updates, SkipSpikesState]:
        assert isinstance(state, SkipSpikesState)
        values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
        high = is_spike(state.history, values, deviations)
        lasting = high & (state.in_a_row >= MAX_IN_A_ROW)
        skipped = high & ~lasting
        updates, opt_state = inner.update(
            updates, state.inner, params, loss=loss, grad_norm=grad_norm, **extra
        )
        opt_state = _where(skipped, state.inner, opt_state)
        history = _where(lasting, empty_history(2, window), state.history)
        taken = ~skipped & (grad_norm > 0)
        history = _where(taken, record(history, values), history)
        in_a_row = jnp.where(taken, 0, state.in_a_row + skipped)
        # Adding -0.0 keeps every number bit for bit, also -0.0, which 0.0 would turn into 0.0.
        updates = jax.tree.map(lambda x: jnp.where(skipped, -jnp.zeros_like(x), x), updates)
        return updates, SkipSpikesState(opt_state, history, in_a_row, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def was_skipped(opt_state: optax.OptState) -> jax.Array | None:
    """Returns whether the last step of an optimizer was skipped as a spike, bool [].

    The result is None for an optimizer that is not wrapped in `skip_spikes`.
    """
    return opt_state.last_skipped if isinstance(opt_state, SkipSpikesState) else None


def _where(condition: jax.Array, first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)
