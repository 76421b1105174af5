"""Attribution of a target to the features of an observation.

All functions take a `Value`, a function of features [B, ...] to float32 [B] whose samples do not
depend on each other, and return one attribution per feature or per unit.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mmrl_jax.interpretability.targets import Value
from mmrl_jax.interpretability.units import Features, Units


def gradient_times_input(value: Value, inputs: Any, backgrounds: Any) -> Any:
    """Returns the gradient times the distance to the mean background.

    attribution = (x - mean_k b_k) * df(x) / dx   (Shrikumar et al., 2017, without a background)

    Args:
      value: Function that is explained.
      inputs: Features, a pytree of [B, ...].
      backgrounds: Features of K backgrounds, [K, B, ...].

    Returns:
      Attribution of each feature, with the shapes of the features.
    """
    gradient = jax.grad(lambda x: jnp.sum(value(x)))(inputs)
    return jax.tree.map(
        lambda g, x, b: g * (x - jnp.mean(b, axis=0)), gradient, inputs, backgrounds
    )


def integrated_gradients(value: Value, inputs: Any, backgrounds: Any, *, steps: int) -> Any:
    """Returns integrated gradients (Sundararajan et al., 2017), averaged over backgrounds.

    attribution = mean_k (x - b_k) * integral_0^1 df(b_k + a (x - b_k)) / dx da

    The integral is a midpoint sum. With real backgrounds instead of zeros this is the expected
    gradient of Erion et al. (2021), with a fixed set of backgrounds.

    Args:
      value: Function that is explained.
      inputs: Features, a pytree of [B, ...].
      backgrounds: Features of K backgrounds, [K, B, ...].
      steps: Number of points on the path from each background to the inputs.

    Returns:
      Attribution of each feature, with the shapes of the features.
    """
    gradient = jax.grad(lambda x: jnp.sum(value(x)))

    def along_path(background: Any) -> Any:
        def add(total: Any, alpha: jax.Array) -> tuple[Any, None]:
            point = jax.tree.map(lambda x, b: b + alpha * (x - b), inputs, background)
            return jax.tree.map(jnp.add, total, gradient(point)), None

        zeros = jax.tree.map(jnp.zeros_like, inputs)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(steps) + 0.5) / steps)
        return jax.tree.map(lambda g, x, b: g / steps * (x - b), total, inputs, background)

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(along_path, backgrounds))


def occlusion(value: Value, inputs: Features, backgrounds: Features, units: Units) -> jax.Array:
    """Returns the effect of replacing each unit by that of real backgrounds, float32 [B, U].

    attribution_u = f(x) - mean_k f(x with unit u of b_k)   (Zeiler and Fergus, 2014)

    Args:
      value: Function that is explained.
      inputs: Features [B, ...].
      backgrounds: Features of K backgrounds, [K, B, ...].
      units: Units of the features.
    """
    samples = inputs.words.shape[0]

    def without(unit: jax.Array) -> jax.Array:
        keep = jnp.broadcast_to(jnp.arange(units.count) != unit, (samples, units.count))

        def on(background: Features) -> jax.Array:
            return value(units.mix(inputs, background, keep))

        return jnp.mean(jax.lax.map(on, backgrounds), axis=0)

    return value(inputs)[:, None] - jax.lax.map(without, jnp.arange(units.count)).T


def completeness(
    value: Value, inputs: Any, backgrounds: Any, attribution: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the difference that an attribution explains, and by how much it misses it.

    Args:
      value: Function that is explained.
      inputs: Features, a pytree of [B, ...].
      backgrounds: Features of K backgrounds, [K, B, ...].
      attribution: Attribution of each feature, with the shapes of the features.

    Returns:
      difference: Value of the inputs minus the mean value of the backgrounds, float32 [B].
      error: Sum of all attributions minus the difference, float32 [B].
    """
    difference = value(inputs) - jnp.mean(jax.lax.map(value, backgrounds), axis=0)
    sums = [jnp.sum(x.reshape(x.shape[0], -1), axis=1) for x in jax.tree.leaves(attribution)]
    return difference, sum(sums) - difference
