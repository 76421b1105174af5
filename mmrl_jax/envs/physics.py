"""Physical parameters that vary between episodes."""

from typing import NamedTuple

import jax


class Physics(NamedTuple):
    """Factors on the nominal body, float32 [], sampled per episode and never compiled as constants.

    Attributes:
      mass: Factor on masses and inertias.
      friction: Factor on friction.
      gain: Factor on the torque of the actuators.
    """

    mass: jax.Array
    friction: jax.Array
    gain: jax.Array
