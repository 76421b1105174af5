"""A factor of the learning rate that is part of the optimizer state.

The factor can be lowered between two updates without compiling the update again, and a checkpoint
restores it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LearningRateScale(NamedTuple):
    """State of `scale_by_state`.

    Attributes:
      scale: Factor of the learning rate, float32 [].
    """

    scale: jax.Array


def scale_by_state() -> optax.GradientTransformation:
    """Returns a transformation that multiplies updates by the factor in its state, at first 1.

    It is the last one of an optimizer, whose updates are proportional to the learning rate. A
    factor of 1 leaves them bitwise as they are.
    """

    def init(params: optax.Params) -> LearningRateScale:
        del params
        return LearningRateScale(jnp.ones((), jnp.float32))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LearningRateScale]:
        del params
        assert isinstance(state, LearningRateScale)
        return jax.tree.map(lambda x: x * state.scale.astype(x.dtype), updates), state

    return optax.GradientTransformation(init, update)


def lower(opt_state: Any, factor: float) -> Any:
    """Returns an optimizer state whose factor of the learning rate is multiplied by `factor`."""
    return jax.tree.map(
        lambda x: LearningRateScale(x.scale * factor) if _is_scale(x) else x,
        opt_state,
        is_leaf=_is_scale,
    )


def scale_of(opt_state: Any) -> jax.Array | None:
    """Returns the factor of the learning rate, float32 []; None if the optimizer has none."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_scale)
    return next((x.scale for x in leaves if _is_scale(x)), None)


def _is_scale(node: Any) -> bool:
    return isinstance(node, LearningRateScale)
