"""Optimizers and learning-rate schedules, from the options of a config."""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, at_least, between, option
from mmrl_jax.stability import learning_rate, spikes
from mmrl_jax.stability.learning_rate import AdaptiveKLOptions

# Epsilon of Adam in Brax and openpi; with optax's 1e-8 the first steps of a value head are huge.
_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The group `optimizer` of a stage."""

    name: Literal["adam", "adamw", "lion", "sgd"] = option("adam", "Optimizer, as optax names it.")
    learning_rate: float = option(1e-3, "Highest learning rate of the schedule.", POSITIVE)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant",
        "Learning-rate schedule after the warmup; 'linear' and 'cosine' decay to 0 at the last "
        "step of the stage.",
    )
    warmup: float = option(
        0.0,
        "Fraction of the stage's optimizer steps in which the learning rate rises from 0.",
        between(0, 1),
    )
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay of 'adamw' and 'lion', which is multiplied by the learning rate.",
        NON_NEGATIVE,
    )
    max_grad_norm: float = option(1.0, "Global norm that gradients are clipped to.", POSITIVE)
    skip_spikes: float | None = option(
        None,
        "Skips a step whose loss or gradient norm exceeds the mean of the last `spike_window` "
        "steps by more than this number of standard deviations, usually 6; None skips none.",
        POSITIVE,
    )
    spike_window: int = option(
        128,
        "Number of steps with which `skip_spikes` compares a step; none is skipped before half of "
        "them were taken.",
        at_least(4),
    )


class Optimizer(NamedTuple):
    """An optimizer and its learning rate.

    Attributes:
      rate: Learning-rate schedule, a function of the number of optimizer steps taken.
      transformation: The optax transformation, whose state is part of a learner's state.
    """

    rate: optax.Schedule
    transformation: optax.GradientTransformation


def check(options: OptimizerOptions, name: str) -> None:
    """Checks that the options of an optimizer are consistent.

    Args:
      options: Options of the optimizer.
      name: Name of their group in the config, for error messages.

    Raises:
      ValueError: A weight decay is given, but the optimizer has none.
    """
    if options.weight_decay and options.name not in ("adamw", "lion"):
        raise ValueError(
            f"{name}.weight_decay={options.weight_decay}, but {name}.name={options.name!r} decays "
            "no weights: set it to 0, or choose 'adamw' or 'lion'."
        )


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule of a stage of `steps` optimizer steps."""
    warmup = round(options.warmup * steps)
    rest = steps - warmup
    rate = {
        "constant": lambda: optax.constant_schedule(options.learning_rate),
        "linear": lambda: optax.linear_schedule(options.learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(options.learning_rate, max(rest, 1)),
    }[options.schedule]()
    if not warmup:
        return rate
    rising = optax.linear_schedule(0.0, options.learning_rate, warmup)
    return optax.join_schedules([rising, rate], [warmup])


def make(
    options: OptimizerOptions,
    steps: int,
    *,
    is_trained: Callable[[tuple[Any, ...]], bool] | None = None,
    scalable: bool = False,
    adaptive: AdaptiveKLOptions | None = None,
) -> Optimizer:
    """Returns the optimizer of a stage.

    Args:
      options: Options of the optimizer.
      steps: Number of optimizer steps of the stage, which is the length of the schedule.
      is_trained: Predicate on the path of a parameter; parameters that are not trained have no
        updates and no optimizer state. By default all parameters are trained.
      scalable: Whether the learning rate can be lowered in the optimizer state, see
        `stability.learning_rate`.
      adaptive: Options of a learning rate that follows the KL divergence of the policy, which
        `update` then needs, see `learning_rate.scale_by_kl`; None or options without a `desired_kl`
        for the learning rate of the schedule.
    """
    rate = make_schedule(options, steps)
    algorithm = {
        "adam": lambda: optax.adam(rate, eps=_EPS),
        "adamw": lambda: optax.adamw(rate, eps=_EPS, weight_decay=options.weight_decay),
        "lion": lambda: optax.lion(rate, weight_decay=options.weight_decay),
        "sgd": lambda: optax.sgd(rate),
    }[options.name]()
    transformation = optax.chain(optax.clip_by_global_norm(options.max_grad_norm), algorithm)
    if is_trained is not None:
        transformation = _partition(transformation, is_trained)
    if scalable:
        transformation = optax.chain(transformation, learning_rate.scale_by_state())
    if adaptive is not None and adaptive.desired_kl is not None:
        following = learning_rate.scale_by_kl(
            desired_kl=adaptive.desired_kl,
            min_scale=adaptive.min_learning_rate / options.learning_rate,
            max_scale=adaptive.max_learning_rate / options.learning_rate,
        )
        transformation = optax.chain(transformation, following)
    if options.skip_spikes is not None:
        transformation = spikes.skip_spikes(
            transformation, deviations=options.skip_spikes, window=options.spike_window
        )
    return Optimizer(rate, transformation)


def _partition(
    transformation: optax.GradientTransformation, is_trained: Callable[[tuple[Any, ...]], bool]
) -> optax.GradientTransformation:
    """Returns a transformation that has updates and state of the trained parameters only."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if is_trained(path) else "frozen", params
        )

    parts = {"trained": transformation, "frozen": optax.set_to_zero()}
    return optax.partition(parts, labels)
