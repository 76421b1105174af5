"""What an episode's physics may differ in."""

from typing import NamedTuple

import jax


class Physics(NamedTuple):
    """Per-episode factors on the nominal body, float32 []; data, never constants of the program."""

    mass: jax.Array
    friction: jax.Array
    gain: jax.Array
