"""A pinhole camera in the convention of MuJoCo and OpenGL."""

from collections.abc import Sequence

import chex
from flax import struct
import jax
import jax.numpy as jnp

# Shorter vectors have no usable direction in float32.
_MIN_LENGTH = 1e-6


@struct.dataclass
class Camera:
    """Where the picture is taken from; any leading batch axes.

    Attributes:
        position: float32 `[..., 3]`, m.
        rotation: float32 `[..., 3, 3]`, orthonormal; its columns are the directions in the world of
            the picture's right, the picture's top, and backward (the camera looks along -z).
        fovy: float32 `[...]`, vertical field of view, degrees in (0, 180).
    """

    position: chex.Array
    rotation: chex.Array
    fovy: chex.Array


def look_at(
    position: jax.typing.ArrayLike | Sequence[float],
    target: jax.typing.ArrayLike | Sequence[float],
    up: jax.typing.ArrayLike | Sequence[float] = (0.0, 0.0, 1.0),
    fovy: jax.typing.ArrayLike = 45.0,
) -> Camera:
    """Places a camera at `position` so that `target` is in the middle of the picture.

    A tracking camera is this function called with the position and target of each step.

    Args:
        position: `[..., 3]`, m.
        target: `[..., 3]`, m. At the camera's own position it stands for a point straight below.
        up: `[..., 3]`, direction that points up in the picture. Where it is parallel to the line of
            sight (a camera that looks straight down) the world's y takes its place, or, where that
            is parallel too, the world's x.
        fovy: `[...]`, vertical field of view, degrees in (0, 180).

    Returns:
        The camera, float32, with the leading axes of the arguments broadcast against each other.
    """
    position, target, up, fovy = (jnp.asarray(x, jnp.float32) for x in (position, target, up, fovy))
    batch = jnp.broadcast_shapes(position.shape[:-1], target.shape[:-1], up.shape[:-1], fovy.shape)
    position, target, up = (jnp.broadcast_to(x, (*batch, 3)) for x in (position, target, up))
    down = jnp.asarray([0.0, 0.0, -1.0])
    backward = -_direction(target - position, fallback=down)
    right = jnp.cross(_direction(up, fallback=-down), backward)
    for other in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        parallel = jnp.linalg.norm(right, axis=-1, keepdims=True) < 1e-4
        right = jnp.where(parallel, jnp.cross(jnp.asarray(other), backward), right)
    right = right / jnp.linalg.norm(right, axis=-1, keepdims=True)
    rotation = jnp.stack([right, jnp.cross(backward, right), backward], axis=-1)
    return Camera(position=position, rotation=rotation, fovy=jnp.broadcast_to(fovy, batch))


def project(camera: Camera, points: chex.Array, aspect: float = 1.0) -> chex.Array:
    """Where world points appear in the picture.

    Args:
        camera: with leading axes [...].
        points: float32 `[..., 3]`, m, in front of the camera.
        aspect: width over height of the picture.

    Returns:
        float32 `[..., 2]`, fractions of the picture's width from the left and of its height from
        the top; in [0, 1] where the point is in view.
    """
    local = jnp.einsum(
        "...ji,...j->...i",
        camera.rotation,
        points - camera.position,
        precision=jax.lax.Precision.HIGHEST,  # GPU and TPU would multiply at ten bits or less.
    )
    half = jnp.tan(jnp.deg2rad(camera.fovy) / 2)
    x, y = local[..., 0] / (-local[..., 2] * half * aspect), local[..., 1] / (-local[..., 2] * half)
    return jnp.stack([(1 + x) / 2, (1 - y) / 2], axis=-1)


def _direction(vector: chex.Array, fallback: chex.Array) -> chex.Array:
    """`vector` `[..., 3]` at length 1; `fallback` `[3]` where it is too short for a direction."""
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    long_enough = length > _MIN_LENGTH
    return jnp.where(long_enough, vector / jnp.where(long_enough, length, 1.0), fallback)
