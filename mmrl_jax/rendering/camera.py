"""A pinhole camera in the convention of MuJoCo and OpenGL."""

from collections.abc import Sequence

import chex
from flax import struct
import jax
import jax.numpy as jnp

# Vectors that are shorter (m) have no usable direction in float32.
_MIN_LENGTH = 1e-6


@struct.dataclass
class Camera:
    """Pose and field of view of a pinhole camera, with any leading batch axes.

    Attributes:
      position: Position in the world in m, float32 `[..., 3]`.
      rotation: Orthonormal matrix, float32 `[..., 3, 3]`, whose columns are the world directions of
        the image's right, the image's top, and backward (the camera looks along -z).
      fovy: Vertical field of view in degrees, in (0, 180), float32 `[...]`.
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
    """Returns a camera at `position` that has `target` at the center of its image.

    A tracking camera calls this function with the position and target of each step.

    Args:
      position: Position of the camera in m, float `[..., 3]`.
      target: Point that the camera looks at in m, float `[..., 3]`. If it equals `position`, the
        camera looks straight down.
      up: Direction that points up in the image, float `[..., 3]`. Where it is parallel to the line
        of sight (as for a camera that looks straight down), the world's y replaces it, or, if that
        is parallel too, the world's x.
      fovy: Vertical field of view in degrees, in (0, 180), float `[...]`.

    Returns:
      The camera in float32, with the leading axes of the arguments broadcast against each other.
    """
    position, target, up, fovy = (jnp.asarray(x, jnp.float32) for x in (position, target, up, fovy))
    batch = jnp.broadcast_shapes(position.shape[:-1], target.shape[:-1], up.shape[:-1], fovy.shape)
    position, target, up = (jnp.broadcast_to(x, (*batch, 3)) for x in (position, target, up))
    down = jnp.asarray([0.0, 0.0, -1.0])
    backward = -_direction(target - position, fallback=down)
    right = jnp.cross(_direction(up, fallback=-down), backward)
    for axis in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        parallel = jnp.linalg.norm(right, axis=-1, keepdims=True) < 1e-4
        right = jnp.where(parallel, jnp.cross(jnp.asarray(axis), backward), right)
    right = right / jnp.linalg.norm(right, axis=-1, keepdims=True)
    rotation = jnp.stack([right, jnp.cross(backward, right), backward], axis=-1)
    return Camera(position=position, rotation=rotation, fovy=jnp.broadcast_to(fovy, batch))


def project(camera: Camera, points: chex.Array, aspect: float = 1.0) -> chex.Array:
    """Projects world points to image coordinates.

    Args:
      camera: Camera with leading axes [...].
      points: Points in m, in front of the camera, float32 `[..., 3]`.
      aspect: Width of the image divided by its height.

    Returns:
      Image coordinates, float32 `[..., 2]`: fractions of the width from the left and of the height
      from the top, both in [0, 1] if the point is in view.
    """
    local = jnp.einsum(
        "...ji,...j->...i",
        camera.rotation,
        points - camera.position,
        precision=jax.lax.Precision.HIGHEST,  # GPU and TPU would multiply with ten bits or less.
    )
    half = jnp.tan(jnp.deg2rad(camera.fovy) / 2)
    x, y = local[..., 0] / (-local[..., 2] * half * aspect), local[..., 1] / (-local[..., 2] * half)
    return jnp.stack([(1 + x) / 2, (1 - y) / 2], axis=-1)


def _direction(vector: chex.Array, fallback: chex.Array) -> chex.Array:
    """Normalizes `vector` `[..., 3]`; returns `fallback` `[3]` where it is too short."""
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    long_enough = length > _MIN_LENGTH
    return jnp.where(long_enough, vector / jnp.where(long_enough, length, 1.0), fallback)
