"""A renderer that casts one ray per pixel, as one elementwise program.

A ray is `camera + depth * d`, `d = x * right + y * up - backward`. `d` has length 1 along the line
of sight, so `depth` is the distance along the optical axis (as in a z-buffer), and
`|d|^2 = 1 + x^2 + y^2` is the same for all scenes. Every quantity that an intersection needs is a
scalar product `v . d` with some vector `v` of the primitive, and therefore
`(v . right) * x + (v . up) * y - v . backward`: three numbers per primitive and two multiply-adds
per pixel. Whatever depends on the primitive alone is computed once per scene (`_Primitive`). The
loop over primitives is unrolled and keeps only the nearest hit so far, so that XLA compiles it to
one loop over the pixels that holds everything in registers: there is no array
`[..., primitives, pixels]` and no gather.

Surfaces are visible from their front only, as with face culling in OpenGL: a camera inside a solid
or behind a plane looks through it. The hot path uses comparisons and selects instead of
`jnp.maximum` and `jnp.minimum`, which cost more because they have to propagate NaN.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.rendering.camera import Camera
from mmrl_jax.rendering.pixels import pack, unpack
from mmrl_jax.rendering.scene import KINDS, Scene

FAR = 1000.0  # Distance along the optical axis in m, beyond which nothing is rendered.
BACKGROUND = (166, 178, 191)  # Red, green and blue of a ray that hits nothing.

# Brightness of a surface with normal n: AMBIENT + HEADLIGHT * cos(n, to the camera)
# + SUN * cos(n, to the sun). The sum of the weights is 1, so that no color overflows. The three
# components of the sun's direction differ, so that the faces of a box have different colors.
AMBIENT, HEADLIGHT, SUN = 0.35, 0.3, 0.35
SUN_DIRECTION = np.asarray([0.36, -0.48, 0.8], np.float32)
_DARK_SQUARE = 0.7  # Relative brightness of the dark squares of a checker.

# Smallest squared sine of the angle between a ray and the axis of a cylinder; float32 resolves
# 1 - cos^2 no better.
_MIN_SIN2 = 1e-7


class _Rays(NamedTuple):
    """Properties of all rays of a camera, all broadcastable to `[..., height, width]`.

    Attributes:
      x: Right component of the ray at depth 1.
      y: Up component of the ray at depth 1.
      square: |d|^2.
      inv_square: 1 / |d|^2.
      inv_length: 1 / |d|.
      sun: Scalar product d . SUN_DIRECTION.
      pixel: Height of a pixel at depth 1.
    """

    x: chex.Array
    y: chex.Array
    square: chex.Array
    inv_square: chex.Array
    inv_length: chex.Array
    sun: chex.Array
    pixel: chex.Array


class _Primitive(NamedTuple):
    """A primitive relative to a camera; every entry is `[..., 1, 1]` or a tuple of such arrays.

    Attributes:
      axes: For each local axis, its (right, up, backward) components, from which `_dot` computes
        `axis . d`.
      origin: Position (x, y, z) of the camera in the local frame.
      offset: (right, up, backward) components of the camera's position relative to the center.
      moment: (right, up, backward) components of that position x local z; its product with d is the
        distance of the ray from the axis, times the sine of the angle between them.
      distance2: Squared distance between the camera and the center.
      size: The three sizes, see `Scene`.
      sun: Direction (x, y, z) of the sun in the local frame.
      sun_origin: The camera's position relative to the center . SUN_DIRECTION.
      checker: Edge of the squares; None if no plane of the scene has squares.
    """

    axes: tuple[tuple[chex.Array, ...], ...]
    origin: tuple[chex.Array, ...]
    offset: tuple[chex.Array, ...]
    moment: tuple[chex.Array, ...]
    distance2: chex.Array
    size: tuple[chex.Array, ...]
    sun: tuple[chex.Array, ...]
    sun_origin: chex.Array
    checker: chex.Array | None


def render(scene: Scene, camera: Camera, *, height: int, width: int) -> chex.Array:
    """Renders the scene with flat colors under a headlight and a fixed sun, without shadows.

    Args:
      scene: Primitives, with any leading batch axes.
      camera: Camera, whose leading axes broadcast against those of the scene.
      height: Height of the image in pixels.
      width: Width of the image in pixels, which are square, so that it determines the horizontal
        field of view.

    Returns:
      Images in red, green and blue, uint8 `[..., height, width, 3]`; row 0 is the top and column 0
      the left.

    Raises:
      ValueError: A kind is unknown, or a shape does not match.
    """
    rays, primitives = _prepare(scene, camera, height, width)
    # One number per pixel holds the three colors, so that a hit selects one value instead of three.
    colors = pack(jnp.round(255.0 * jnp.clip(scene.color, 0.0, 1.0)).astype(jnp.int32))
    nearest, color, light = jnp.float32(FAR), jnp.int32(pack(np.asarray(BACKGROUND))), 1.0
    for g, (kind, primitive) in enumerate(zip(scene.kind, primitives, strict=True)):
        depth, brightness = _INTERSECT[kind](primitive, rays)
        closer = depth < nearest
        nearest = jnp.where(closer, depth, nearest)
        color = jnp.where(closer, colors[..., g, None, None], color)
        light = jnp.where(closer, brightness, light)
    light = jnp.where(light < 1.0, light, 1.0)  # Rounding must not carry into the next channel.
    shape = (*_batch(scene, camera), height, width)
    channels = [
        ((color >> shift & 255).astype(jnp.float32) * light + 0.5).astype(jnp.int32) << shift
        for shift in (0, 8, 16)
    ]
    packed = jnp.broadcast_to(channels[0] | channels[1] | channels[2], shape)
    return unpack(packed)


def depth_and_index(
    scene: Scene, camera: Camera, *, height: int, width: int
) -> tuple[chex.Array, chex.Array]:
    """Finds the first primitive on each ray.

    Args:
      scene: Primitives, with any leading batch axes.
      camera: Camera, whose leading axes broadcast against those of the scene.
      height: Height of the image in pixels.
      width: Width of the image in pixels.

    Returns:
      Distance from the camera along the ray in m, float32 `[..., height, width]`, inf where the ray
      hits nothing, and the index of the primitive in `scene.kind`, int32 `[..., height, width]`, -1
      where the ray hits nothing.

    Raises:
      ValueError: A kind is unknown, or a shape does not match.
    """
    rays, primitives = _prepare(scene, camera, height, width)
    nearest, index = jnp.float32(FAR), jnp.int32(-1)
    for g, (kind, primitive) in enumerate(zip(scene.kind, primitives, strict=True)):
        depth, _ = _INTERSECT[kind](primitive, rays)
        index = jnp.where(depth < nearest, g, index)
        nearest = jnp.where(depth < nearest, depth, nearest)
    distance = jnp.where(index < 0, jnp.inf, nearest * rays.square * rays.inv_length)
    shape = (*_batch(scene, camera), height, width)
    return jnp.broadcast_to(distance, shape), jnp.broadcast_to(index, shape)


def _sphere(p: _Primitive, rays: _Rays) -> tuple[chex.Array, chex.Array]:
    """Returns the smaller root of |origin + depth d|^2 = radius^2; the normal is hit / radius."""
    radius = p.size[0]
    b = _dot(p.offset, rays)
    # Due to rounding, a ray through the center would hit a sphere of size 0.
    c = jnp.where(radius > 0, p.distance2 - radius * radius, jnp.inf)
    disc = b * b - rays.square * c
    root = _root(disc)
    depth = (-b - root) * rays.inv_square
    depth = jnp.where((disc > 0) & (depth > 0), depth, jnp.inf)
    inv_radius = 1.0 / radius
    sun = (p.sun_origin + depth * rays.sun) * inv_radius
    return depth, _light(root * inv_radius * rays.inv_length, sun)


def _capsule(p: _Primitive, rays: _Rays) -> tuple[chex.Array, chex.Array]:
    """Intersects the infinite cylinder, and the cap on the side of a hit beyond the straight part.

    The method is that of Inigo Quilez, "capsule - intersection"
    (iquilezles.org/articles/intersectors). For either part, the normal is (hit - nearest point of
    the axis) / radius, and its product with -d is the root of that part's discriminant / radius.
    """
    radius, half = p.size[0], p.size[1]
    dz, b = _dot(p.axes[2], rays), _dot(p.offset, rays)
    sin2, b_side, disc_side = _infinite_cylinder(p, rays, dz, b)
    root_side = _root(disc_side)
    depth_side = (-b_side - root_side) * (1.0 / sin2)
    z = p.origin[2] + depth_side * dz
    top = z > 0
    b_cap = b - jnp.where(top, half, -half) * dz
    c = p.distance2 + half * half - radius * radius
    shift = 2.0 * half * p.origin[2]
    disc_cap = b_cap * b_cap - rays.square * jnp.where(top, c - shift, c + shift)
    side = jnp.abs(z) < half
    disc = jnp.where(side, disc_side, disc_cap)
    root = jnp.where(side, root_side, _root(disc_cap))
    depth = jnp.where(side, depth_side, (-b_cap - root) * rays.inv_square)
    depth = jnp.where((disc_side > 0) & (disc > 0) & (depth > 0), depth, jnp.inf)
    inv_radius = 1.0 / radius
    axis = jnp.where(side, z, jnp.where(top, half, -half))
    sun = (p.sun_origin + depth * rays.sun - axis * p.sun[2]) * inv_radius
    return depth, _light(root * inv_radius * rays.inv_length, sun)


def _cylinder(p: _Primitive, rays: _Rays) -> tuple[chex.Array, chex.Array]:
    """Intersects the interval inside the infinite cylinder with the interval between the caps."""
    radius, half = p.size[0], p.size[1]
    dz, b = _dot(p.axes[2], rays), _dot(p.offset, rays)
    sin2, b_side, disc = _infinite_cylinder(p, rays, dz, b)
    # A ray that misses has root 0, and therefore an empty interval.
    root = _root(disc)
    inv_sin2 = 1.0 / sin2
    side_in, side_out = (-b_side - root) * inv_sin2, (-b_side + root) * inv_sin2
    cap_in, cap_out, cap_sun = _slab(dz, p.origin[2], half, p.sun[2])
    on_cap = cap_in > side_in
    depth = jnp.where(on_cap, cap_in, side_in)
    leave = jnp.where(cap_out < side_out, cap_out, side_out)
    depth = jnp.where((depth < leave) & (depth > 0), depth, jnp.inf)
    inv_radius = 1.0 / radius
    z = p.origin[2] + depth * dz
    side_sun = (p.sun_origin + depth * rays.sun - z * p.sun[2]) * inv_radius
    facing = jnp.where(on_cap, jnp.abs(dz), root * inv_radius)
    return depth, _light(facing * rays.inv_length, jnp.where(on_cap, cap_sun, side_sun))


def _box(p: _Primitive, rays: _Rays) -> tuple[chex.Array, chex.Array]:
    """Intersects the intervals between the three pairs of faces (the slab method)."""
    dx, dy, dz = (_dot(axis, rays) for axis in p.axes)
    depth, leave, sun = _slab(dx, p.origin[0], p.size[0], p.sun[0])
    facing = jnp.abs(dx)
    for d, origin, half, direction in ((dy, *_at(p, 1)), (dz, *_at(p, 2))):
        enter_i, leave_i, sun_i = _slab(d, origin, half, direction)
        later = enter_i > depth
        depth = jnp.where(later, enter_i, depth)
        sun = jnp.where(later, sun_i, sun)
        facing = jnp.where(later, jnp.abs(d), facing)
        leave = jnp.where(leave_i < leave, leave_i, leave)
    depth = jnp.where((depth < leave) & (depth > 0), depth, jnp.inf)
    return depth, _light(facing * rays.inv_length, sun)


def _plane(p: _Primitive, rays: _Rays) -> tuple[chex.Array, chex.Array]:
    """Returns where the local z is 0, for a camera above the plane and within its extents."""
    dx, dy, dz = (_dot(axis, rays) for axis in p.axes)
    depth = p.origin[2] * (-1.0 / dz)
    x, y = p.origin[0] + depth * dx, p.origin[1] + depth * dy
    half_x, half_y = (jnp.where(half > 0, half, jnp.inf) for half in p.size[:2])
    inside = (jnp.abs(x) < half_x) & (jnp.abs(y) < half_y)
    depth = jnp.where((dz < 0) & (depth > 0) & inside, depth, jnp.inf)
    facing = -dz * rays.inv_length
    light = _light(facing, p.sun[2])
    if p.checker is None:
        return depth, light
    has_checker = p.checker > 0
    inv_edge = jnp.where(has_checker, 1.0 / p.checker, 1.0)
    odd = (jnp.floor(x * inv_edge) + jnp.floor(y * inv_edge)) * 0.5
    sign = jnp.where(odd == jnp.floor(odd), 1.0, -1.0)
    # Where a pixel covers more than half a square, the squares fade to their mean.
    covered = depth * rays.pixel * inv_edge / (facing * rays.inv_length)
    contrast = _positive(1.0 - _positive(covered - 0.5) * 2.0)
    mean, half_step = 0.5 * (1.0 + _DARK_SQUARE), 0.5 * (1.0 - _DARK_SQUARE)
    return depth, light * jnp.where(has_checker, mean + half_step * contrast * sign, 1.0)


_INTERSECT = {
    "sphere": _sphere,
    "capsule": _capsule,
    "box": _box,
    "cylinder": _cylinder,
    "plane": _plane,
}


def _infinite_cylinder(
    p: _Primitive, rays: _Rays, dz: chex.Array, b: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Returns a, b and the discriminant of the equation of the cylinder around the local z.

    `b^2 - a c` is computed as `a radius^2 - (moment . d)^2`, which avoids cancellation.
    """
    sin2 = rays.square - dz * dz
    moment = _dot(p.moment, rays)
    radius2 = p.size[0] * p.size[0]
    disc = sin2 * radius2 - moment * moment
    # A ray parallel to the axis keeps the camera's distance from the axis.
    camera2 = p.origin[0] * p.origin[0] + p.origin[1] * p.origin[1]
    oblique = sin2 > _MIN_SIN2
    disc = jnp.where(oblique, disc, _MIN_SIN2 * (radius2 - camera2))
    return jnp.where(oblique, sin2, _MIN_SIN2), b - p.origin[2] * dz, disc


def _slab(
    d: chex.Array, origin: chex.Array, half: chex.Array, sun: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Returns depths at which a ray enters and leaves |coordinate| < half, and the entry's light.

    The light is the sun's cosine on the face of entry. A ray parallel to the faces (d = 0) gives
    -inf and inf between them, and an empty interval outside. With half = 0 the two depths are
    equal, so that the interval is empty.
    """
    forward = d > 0
    inv = jnp.abs(1.0 / d)
    gap = jnp.where(forward, -origin - half, origin - half)
    # This is a single product because in `gap * inv + 2 * half * inv`, inf - inf would be NaN.
    return gap * inv, (gap + 2.0 * half) * inv, jnp.where(forward, -sun, sun)


def _at(p: _Primitive, axis: int) -> tuple[chex.Array, chex.Array, chex.Array]:
    return p.origin[axis], p.size[axis], p.sun[axis]


def _light(facing: chex.Array, sun: chex.Array) -> chex.Array:
    """Returns the brightness in [AMBIENT, 1] for cosines of the normal to camera and sun."""
    return AMBIENT + HEADLIGHT * facing + SUN * _positive(sun)


def _root(x: chex.Array) -> chex.Array:
    """Returns the square root, or 0 for negative arguments.

    The root is inside the select because XLA's CPU backend does not fuse the inputs of an expensive
    operation that has several users; this way the root has one user, and the select has the others.
    The root of a negative number, although it is not selected, would end a run with JAX_DEBUG_NANS.
    """
    return jnp.where(x > 0, jnp.sqrt(_positive(x)), 0.0)


def _positive(x: chex.Array) -> chex.Array:
    return jnp.where(x > 0, x, 0.0)


def _dot(components: tuple[chex.Array, ...], rays: _Rays) -> chex.Array:
    """Returns `v . d` for the (right, up, backward) components of v."""
    return components[0] * rays.x + (components[1] * rays.y - components[2])


def _prepare(
    scene: Scene, camera: Camera, height: int, width: int
) -> tuple[_Rays, list[_Primitive]]:
    """Returns the rays, and each primitive relative to the camera."""
    _check(scene, camera, height, width)
    high = jax.lax.Precision.HIGHEST  # GPU and TPU would multiply with ten bits or less.
    view = camera.rotation
    local = _matrix(scene.rotation)  # [..., G, 3, 3]; its columns are the local axes.
    offset = camera.position[..., None, :] - scene.position
    offset = jnp.broadcast_to(offset, jnp.broadcast_shapes(offset.shape, local.shape[:-1]))
    origin = jnp.einsum("...gij,...gi->...gj", local, offset, precision=high)
    moment = jnp.cross(offset, local[..., 2])
    axes = jnp.broadcast_to(jnp.moveaxis(local, -1, -2), (*offset.shape[:-1], 3, 3))
    vectors = jnp.concatenate([axes, offset[..., None, :], moment[..., None, :]], axis=-2)
    components = jnp.einsum("...gvi,...ij->...gvj", vectors, view, precision=high)
    sun = jnp.einsum("...gij,i->...gj", local, SUN_DIRECTION, precision=high)
    sun_origin = jnp.einsum("...gi,i->...g", offset, SUN_DIRECTION, precision=high)
    distance2 = jnp.sum(offset * offset, axis=-1)
    sun_view = jnp.einsum("...ij,i->...j", view, SUN_DIRECTION, precision=high)
    tan = jnp.tan(jnp.deg2rad(camera.fovy) * 0.5)

    def scalars(array: chex.Array) -> tuple[chex.Array, ...]:
        return tuple(array[..., i, None, None] for i in range(array.shape[-1]))

    tan = tan[..., None, None]
    x = (np.arange(width, dtype=np.float32) + 0.5) * 2.0 / height - width / height
    y = 1.0 - (np.arange(height, dtype=np.float32)[:, None] + 0.5) * 2.0 / height
    x, y = tan * x, tan * y
    square = 1.0 + x * x + y * y
    inv_length = jax.lax.rsqrt(square)
    s = scalars(sun_view)
    rays = _Rays(
        x=x,
        y=y,
        square=square,
        inv_square=inv_length * inv_length,
        inv_length=inv_length,
        sun=s[0] * x + (s[1] * y - s[2]),
        pixel=tan * (2.0 / height),
    )
    primitives = []
    for g in range(len(scene.kind)):
        vector = [scalars(components[..., g, v, :]) for v in range(5)]
        primitives.append(
            _Primitive(
                axes=tuple(vector[:3]),
                origin=scalars(origin[..., g, :]),
                offset=vector[3],
                moment=vector[4],
                distance2=distance2[..., g, None, None],
                size=scalars(scene.size[..., g, :]),
                sun=scalars(sun[..., g, :]),
                sun_origin=sun_origin[..., g, None, None],
                checker=None if scene.checker is None else scene.checker[..., g, None, None],
            )
        )
    return rays, primitives


def _matrix(quaternion: chex.Array) -> chex.Array:
    """Returns rotation matrices `[..., 3, 3]` of unit quaternions w, x, y, z `[..., 4]`."""
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _batch(scene: Scene, camera: Camera) -> tuple[int, ...]:
    return jnp.broadcast_shapes(
        scene.position.shape[:-2],
        scene.rotation.shape[:-2],
        scene.size.shape[:-2],
        scene.color.shape[:-2],
        () if scene.checker is None else scene.checker.shape[:-1],
        camera.position.shape[:-1],
        camera.rotation.shape[:-2],
        camera.fovy.shape,
    )


def _check(scene: Scene, camera: Camera, height: int, width: int) -> None:
    for kind in scene.kind:
        if kind not in KINDS:
            raise ValueError(f"scene.kind has {kind!r}: use one of {', '.join(KINDS)}.")
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} is {value}: use at least one pixel.")
    count = len(scene.kind)
    expected = {
        "scene.position": (scene.position, (count, 3)),
        "scene.rotation": (scene.rotation, (count, 4)),
        "scene.size": (scene.size, (count, 3)),
        "scene.color": (scene.color, (count, 3)),
        "camera.position": (camera.position, (3,)),
        "camera.rotation": (camera.rotation, (3, 3)),
    }
    if scene.checker is not None:
        expected["scene.checker"] = (scene.checker, (count,))
    for name, (array, shape) in expected.items():
        if tuple(array.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}: its last axes must be {shape} for the "
                f"{count} kinds of the scene."
            )
