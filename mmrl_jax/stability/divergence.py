"""Detection of a divergence from the metrics of a stage, on the host.

The state is a value that a checkpoint stores, and `observe` a pure function of it and of a row of
metrics. A resumed run therefore detects what an uninterrupted one would have detected, and the
processes of a run, which have the same metrics, decide alike.
"""

from collections.abc import Collection, Mapping
import dataclasses
import math

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, Valid, at_least, between, option

EMA_DECAY = 0.9  # Decay, per row, of the moving averages of loss and return.
WARMUP = 10  # Number of rows with a loss, or a return, before it can trigger anything.
# Smaller averages of the absolute loss count as this one: the loss of a policy gradient is near 0.
MIN_LOSS = 0.05
LOSS, KL, ENTROPY = "loss/total", "policy/approx_kl", "policy/entropy"
RETURNS = ("episode/return", "completion/reward")  # The first that a row has is its return.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollbackOptions:
    """Options of the group `rollback` of a stage."""

    max_retries: int = option(
        0,
        "Number of times that a diverging stage continues from its last good checkpoint, with a "
        "lower learning rate and fresh random numbers; 0 stops the run at the first divergence.",
        NON_NEGATIVE,
    )
    learning_rate_factor: float = option(
        0.5,
        "Factor by which each rollback multiplies the learning rate.",
        Valid(lambda x: 0 < x <= 1, "in (0, 1]"),
    )
    cooldown: int = option(
        20,
        "Number of updates after a rollback in which only numbers that are not finite cause the "
        "next one.",
        NON_NEGATIVE,
    )
    patience: int = option(
        3,
        "Number of rows of metrics in a row in which loss, KL divergence or entropy must be beyond "
        "its limit.",
        at_least(1),
    )
    max_loss_ratio: float | None = option(
        3.0,
        "Largest absolute loss, relative to its moving average; None for no limit.",
        POSITIVE,
    )
    max_kl: float | None = option(
        None,
        "Largest policy/approx_kl, usually ten times the one that is aimed at; None for no limit.",
        POSITIVE,
    )
    min_entropy: float | None = option(None, "Smallest policy/entropy, in nats; None for no limit.")
    min_return_ratio: float | None = option(
        0.5,
        "Smallest moving average of the return, or of the reward of completions, relative to the "
        "best one so far, where that is positive; None for no limit.",
        between(0, 1),
    )
    return_patience: int = option(
        20, "Number of rows in a row in which the return must be below its limit.", at_least(1)
    )


@dataclasses.dataclass(frozen=True)
class Watch:
    """State of the detection, all of whose values can be written as JSON.

    Attributes:
      retries: Number of rollbacks so far.
      quiet_until: Update until which only numbers that are not finite are a divergence.
      losses: Number of rows with a loss so far.
      loss: Moving average of the absolute loss; 0 before the first one.
      returns: Number of rows with a return so far.
      mean_return: Moving average of the return; 0 before the first one.
      best_return: Largest moving average of the return since the warm-up; 0 before.
      beyond: Number of rows in a row in which a metric was beyond its limit, by its trigger.
    """

    retries: int = 0
    quiet_until: int = 0
    losses: int = 0
    loss: float = 0.0
    returns: int = 0
    mean_return: float = 0.0
    best_return: float = 0.0
    beyond: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def suspicious(self) -> bool:
        """Whether a metric is beyond its limit, but not for long enough to be a divergence."""
        return any(self.beyond.values())


def check_metrics(options: RollbackOptions, names: Collection[str], stage: str) -> None:
    """Checks that a stage has the metrics that its limits refer to.

    Args:
      options: Limits of the metrics.
      names: Names of the metrics of an update.
      stage: Name of the stage.

    Raises:
      ValueError: If a limit is set for a metric that the stage does not have.
    """
    limits = {"max_kl": (options.max_kl, KL), "min_entropy": (options.min_entropy, ENTROPY)}
    for key, (limit, name) in limits.items():
        if options.max_retries and limit is not None and name not in names:
            raise ValueError(
                f"{stage}.rollback.{key}={limit}, but an update of {stage!r} has no metric "
                f"{name!r}: set it to None."
            )


def observe(
    watch: Watch, row: Mapping[str, float], update: int, options: RollbackOptions
) -> tuple[Watch, str | None]:
    """Looks for a divergence in the next row of metrics.

    Args:
      watch: State after the row before.
      row: Metrics by their names; those that are absent or not finite are left out.
      update: Number of completed updates.
      options: Limits of the metrics.

    Returns:
      The new state, and a description of the divergence; None if there is none.
    """
    values = {name: x for name, x in row.items() if math.isfinite(x)}
    found = next((values[name] for name in RETURNS if name in values), None)
    high = _limits(watch, values, options)
    # Else the average would follow a loss that diverges.
    if LOSS in values and not high.get("loss", False):
        loss = _average(watch.loss, abs(values[LOSS]), watch.losses)
        watch = dataclasses.replace(watch, loss=loss, losses=watch.losses + 1)
    if found is not None:
        watch = _with_return(watch, found)
        if options.min_return_ratio is not None and watch.best_return > 0:
            high["return"] = watch.mean_return < options.min_return_ratio * watch.best_return
    # A metric that the row does not have says nothing, and its number of rows stays.
    beyond = dict(watch.beyond)
    for name, is_high in high.items():
        beyond[name] = beyond.get(name, 0) + 1 if is_high else 0
    watch = dataclasses.replace(watch, beyond={name: n for name, n in beyond.items() if n})
    if update <= watch.quiet_until:
        return watch, None
    patience = dict.fromkeys(high, options.patience) | {"return": options.return_patience}
    for name, rows in watch.beyond.items():
        if name in high and rows >= patience[name]:
            return watch, _description(name, watch, values, options)
    return watch, None


def after_rollback(watch: Watch, update: int, options: RollbackOptions) -> Watch:
    """Returns the state after a rollback to `update`, from the state of that update."""
    return dataclasses.replace(
        watch, retries=watch.retries + 1, quiet_until=update + options.cooldown, beyond={}
    )


def _limits(watch: Watch, values: Mapping[str, float], options: RollbackOptions) -> dict[str, bool]:
    """Returns whether loss, KL divergence and entropy are beyond their limits, where known."""
    high = {}
    if options.max_loss_ratio is not None and LOSS in values and watch.losses >= WARMUP:
        high["loss"] = abs(values[LOSS]) > options.max_loss_ratio * max(watch.loss, MIN_LOSS)
    if options.max_kl is not None and KL in values:
        high["kl"] = values[KL] > options.max_kl
    if options.min_entropy is not None and ENTROPY in values:
        high["entropy"] = values[ENTROPY] < options.min_entropy
    return high


def _with_return(watch: Watch, value: float) -> Watch:
    """Returns the state after a row with a return."""
    mean = _average(watch.mean_return, value, watch.returns)
    best = max(watch.best_return, mean) if watch.returns >= WARMUP else 0.0
    return dataclasses.replace(watch, returns=watch.returns + 1, mean_return=mean, best_return=best)


def _average(before: float, value: float, count: int) -> float:
    return EMA_DECAY * before + (1 - EMA_DECAY) * value if count else value


def _description(
    name: str, watch: Watch, values: Mapping[str, float], options: RollbackOptions
) -> str:
    """Returns what has diverged, as the end of a sentence."""
    rows = f"for {watch.beyond[name]} rows of metrics"
    return {
        "loss": lambda: (
            f"the absolute loss, now {abs(values[LOSS]):.3g}, was above {options.max_loss_ratio:g} "
            f"times its moving average, {max(watch.loss, MIN_LOSS):.3g}, {rows}"
        ),
        "kl": lambda: f"{KL}, now {values[KL]:.3g}, was above {options.max_kl:g} {rows}",
        "entropy": lambda: (
            f"{ENTROPY}, now {values[ENTROPY]:.3g}, was below {options.min_entropy:g} {rows}"
        ),
        "return": lambda: (
            f"the moving average of the return, now {watch.mean_return:.3g}, was below "
            f"{options.min_return_ratio:g} times the best one, {watch.best_return:.3g}, {rows}"
        ),
    }[name]()
