"""The gradient of a loss of several terms, whose conflicts may be resolved."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmrl_jax.config.options import BELOW_ONE, Valid, option
from mmrl_jax.stability import gradient_surgery
from mmrl_jax.types import Metrics, Params

# Function of parameters that returns the weighted terms of a loss by name, [] each, and metrics.
Terms = Callable[[Params], tuple[dict[str, jax.Array], Metrics]]
PARTS = ("policy", "value", "auxiliary", "pointing", "entropy", "bc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurgeryOptions:
    """The options of gradient surgery."""

    gradient_surgery: Literal["none", "pcgrad", "cagrad"] = option(
        "none",
        "How conflicts between the gradients of the parts of the loss are resolved, on the "
        "parameters that they share: 'none' adds the gradients up, 'pcgrad' removes from each its "
        "component against another one, and 'cagrad' improves the part that improves least; each "
        "part costs a backward pass.",
    )
    surgery_parts: tuple[str, ...] = option(
        ("policy", "value", "auxiliary", "pointing", "bc"),
        f"Parts of the loss between which gradient_surgery resolves conflicts, of "
        f"{', '.join(PARTS)}; the gradients of the others are added as they are, and parts that "
        "a stage does not have, or with a coefficient of 0, are ignored.",
        Valid(
            lambda x: set(x) <= set(PARTS) and len(set(x)) == len(x),
            f"different ones of {', '.join(PARTS)}",
        ),
    )
    cagrad_c: float = option(
        0.4,
        "Largest distance of CAGrad's direction from the mean gradient, relative to its norm.",
        BELOW_ONE,
    )


def check(options: SurgeryOptions, present: Sequence[str], name: str) -> None:
    """Checks that there is something between which conflicts can be resolved.

    Args:
      options: Options of gradient surgery.
      present: Names of the parts of the loss whose coefficient is not 0, and which share parameters
        of the network.
      name: Name of the stage, for error messages.

    Raises:
      ValueError: If gradient surgery is on, but there are less than two parts.
    """
    chosen = [part for part in options.surgery_parts if part in present]
    if options.gradient_surgery != "none" and len(chosen) < 2:
        raise ValueError(
            f"{name}.gradient_surgery={options.gradient_surgery!r} needs two parts of the loss "
            f"that share parameters, but of {name}.surgery_parts={tuple(options.surgery_parts)} "
            f"this model with these coefficients has only {chosen}: name more parts, raise their "
            "coefficients, or set it to 'none'."
        )


def total(terms: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the sum of the terms of a loss, []."""
    return functools.reduce(operator.add, terms.values())


def stacked_gradients(
    terms: Terms, params: Params, names: Sequence[Sequence[str]]
) -> tuple[Any, tuple[dict[str, jax.Array], Metrics]]:
    """Returns the gradients of K sums of terms of a loss, and what `terms` returned.

    There is one forward pass, and K backward passes one after the other.

    Args:
      terms: Function of parameters that returns the terms of a loss.
      params: Parameters at which the gradients are taken.
      names: Names of the terms that are added up, of each of the K sums.

    Returns:
      The gradients, a pytree with leaves [K, ...]; and the terms and the metrics.
    """

    def sums(params: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], Metrics]]:
        by_name, metrics = terms(params)
        stacked = jnp.stack([total({name: by_name[name] for name in part}) for part in names])
        return stacked, (by_name, metrics)

    values, backward, result = jax.vjp(sums, params, has_aux=True)
    gradients = jax.lax.map(lambda x: backward(x)[0], jnp.eye(len(names), dtype=values.dtype))
    return gradients, result


def value_and_gradient(
    terms: Terms, params: Params, rng: jax.Array, *, present: Sequence[str], options: SurgeryOptions
) -> tuple[jax.Array, Metrics, Params]:
    """Returns the sum of the terms of a loss, metrics, and the gradient to descend.

    Args:
      terms: Function of parameters that returns the terms of the loss.
      params: Parameters at which the gradient is taken.
      rng: PRNG key of the order in which PCGrad visits the parts.
      present: Names of the terms, all of which `terms` returns with gradient surgery.
      options: Options of gradient surgery.

    Returns:
      The loss, [], the metrics of `terms` and, with gradient surgery, 'grad/min_cosine'; and the
      gradient, which without gradient surgery is that of the loss.

    Raises:
      ValueError: If, with gradient surgery, the terms are not those in `present`.
    """
    if options.gradient_surgery == "none":

        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            by_name, metrics = terms(params)
            return total(by_name), metrics

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, metrics, gradient

    chosen = [name for name in options.surgery_parts if name in present]
    others = [name for name in present if name not in chosen]
    sums = [(name,) for name in chosen] + ([tuple(others)] if others else [])

    def named(params: Params) -> tuple[dict[str, jax.Array], Metrics]:
        by_name, metrics = terms(params)
        if set(by_name) != set(present):
            raise ValueError(
                f"gradient_surgery={options.gradient_surgery!r} with the terms {sorted(by_name)} "
                f"of the loss, but loss_parts={tuple(present)}: a term that it does not name would "
                "lose its gradient; let `loss_parts` of the options name the terms."
            )
        return by_name, metrics

    gradients, (by_name, metrics) = stacked_gradients(named, params, sums)
    if options.gradient_surgery == "pcgrad":
        weights_of = functools.partial(gradient_surgery.pcgrad_weights, rng=rng)
    else:
        weights_of = functools.partial(gradient_surgery.cagrad_weights, c=options.cagrad_c)
    count = len(chosen)
    gradient, conflict = gradient_surgery.weighted_sum(
        jax.tree.map(lambda x: x[:count], gradients), weights_of
    )
    if others:
        gradient = jax.tree.map(lambda x, y: x + y[count], gradient, gradients)
    metrics = metrics | {"grad/min_cosine": jnp.min(conflict.cosines)}
    return total(by_name), metrics, gradient
