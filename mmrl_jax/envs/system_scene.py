"""What a MuJoCo model looks like: its geoms, carried along by its bodies, as a `Scene`.

A Brax `System` holds the MuJoCo model that it was made from (`sys.mj_model`), and every physics
backend gives the world transforms of its links, which are that model's bodies without the world.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from mmrl_jax.rendering import KINDS, Scene

_KIND = {int(getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}")): kind for kind in KINDS}
_DEFAULT_RGBA = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # What MuJoCo gives a geom without one.
_HIDDEN_GROUP = 3  # MuJoCo's own viewer shows groups 0 to 2: collision geoms are in 3.


class Geometry(NamedTuple):
    """The visible geoms of a model; static, so that it is a constant of the program.

    Attributes:
      kind: tuple of G names out of `rendering.KINDS`.
      body: int [G], the body that carries the geom; 0 is the world.
      position: float32 [G, 3], m, in the body's frame.
      rotation: float32 [G, 4], unit quaternion w, x, y, z, in the body's frame.
      size: float32 [G, 3], m, MuJoCo's convention.
      color: float32 [G, 3] in [0, 1].
      geom: int [G], of the geoms in the model.
    """

    kind: tuple[str, ...]
    body: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    size: np.ndarray
    color: np.ndarray
    geom: np.ndarray


def geometry(model: mujoco.MjModel) -> Geometry:
    """Takes the geoms of `model` that MuJoCo's viewer would show.

    Left out are geoms with an alpha of 0 and those of groups 3 and above. A texture is drawn as
    its mean color, and a translucent geom as an opaque one.

    Raises:
      ValueError: a visible geom is of a kind that the renderer does not draw, such as a mesh.
    """
    rgba = np.array([_rgba(model, g) for g in range(model.ngeom)]).reshape(-1, 4)
    shown = [
        g for g in range(model.ngeom) if rgba[g, 3] > 0 and model.geom_group[g] < _HIDDEN_GROUP
    ]
    for g in shown:
        if int(model.geom_type[g]) not in _KIND:
            kind = mujoco.mjtGeom(int(model.geom_type[g])).name.removeprefix("mjGEOM_").lower()
            raise ValueError(
                f"Geom {g} ({model.geom(g).name!r}) is of kind {kind!r}; the renderer draws "
                f"{KINDS}. Replace it by one of these, or hide it with an alpha of 0."
            )
    return Geometry(
        kind=tuple(_KIND[int(model.geom_type[g])] for g in shown),
        body=np.asarray(model.geom_bodyid[shown]),
        position=np.asarray(model.geom_pos[shown], np.float32),
        rotation=np.asarray(model.geom_quat[shown], np.float32),
        size=np.asarray(model.geom_size[shown], np.float32),
        color=rgba[shown, :3].astype(np.float32),
        geom=np.asarray(shown),
    )


def scene(
    shown: Geometry, position: jax.Array, rotation: jax.Array, *, checker: float = 1.0
) -> Scene:
    """Puts the geoms where the bodies are.

    Args:
      shown: of the model.
      position: float32 [..., N, 3], m, of the N bodies in the world; body 0 is the world itself.
      rotation: float32 [..., N, 4], unit quaternions w, x, y, z.
      checker: m, edge of the squares on planes, without which no motion is seen; 0 for none.

    Returns:
      The scene, with the leading axes of `position`.
    """
    batch, count = position.shape[:-2], len(shown.kind)
    carried, turned = position[..., shown.body, :], rotation[..., shown.body, :]
    return Scene(
        kind=shown.kind,
        position=carried + _rotate(turned, jnp.asarray(shown.position)),
        rotation=_multiply(turned, jnp.asarray(shown.rotation)),
        size=jnp.broadcast_to(shown.size, (*batch, count, 3)),
        color=jnp.broadcast_to(shown.color, (*batch, count, 3)),
        checker=jnp.full((*batch, count), checker, jnp.float32),
    )


def link_scene(shown: Geometry, x: Any, *, checker: float = 1.0) -> Scene:
    """`scene` of a Brax pipeline state's link transforms `x` (pos [..., L, 3], rot [..., L, 4])."""
    batch = x.pos.shape[:-2]
    still = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (*batch, 1, 4))
    return scene(
        shown,
        jnp.concatenate([jnp.zeros((*batch, 1, 3)), x.pos], -2),
        jnp.concatenate([still, x.rot], -2),
        checker=checker,
    )


def extent(model: mujoco.MjModel, shown: Geometry, body: int) -> tuple[float, float]:
    """How large the moving part of a model is about `body`, in the model's rest pose.

    Returns:
      Height, m, of its middle above `body` (negative: below), and the distance, m, from that point
      to its farthest geom.
    """
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    moving = shown.geom[(shown.body > 0) & (model.geom_rbound[shown.geom] > 0)]
    if not moving.size:
        return 0.0, 1.0
    away, bound = data.geom_xpos[moving] - data.xpos[body], model.geom_rbound[moving]
    height = (np.max(away[:, 2] + bound) + np.min(away[:, 2] - bound)) / 2
    radius = np.max(np.linalg.norm(away - [0, 0, height], axis=-1) + bound)
    return float(height), float(radius)


def _rgba(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Colour [4] of a geom: its own, or its material's where it has none of its own."""
    own, material = model.geom_rgba[geom], model.geom_matid[geom]
    if material < 0 or not np.array_equal(own, _DEFAULT_RGBA):
        return own
    rgba = model.mat_rgba[material].copy()
    texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
    if texture >= 0:
        start, channels = model.tex_adr[texture], model.tex_nchannel[texture]
        count = model.tex_height[texture] * model.tex_width[texture] * channels
        texels = model.tex_data[start : start + count].reshape(-1, channels)
        rgba[:3] *= texels[:, :3].mean(axis=0) / 255
    return rgba


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of quaternions w, x, y, z [..., 4]: the rotation b, then a."""
    aw, av, bw, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    real = aw * bw - jnp.sum(av * bv, axis=-1, keepdims=True)
    return jnp.concatenate([real, aw * bv + bw * av + jnp.cross(av, bv)], axis=-1)


def _rotate(rotation: jax.Array, vector: jax.Array) -> jax.Array:
    """`vector` [..., 3] turned by the unit quaternion `rotation` [..., 4]."""
    w, v = rotation[..., :1], rotation[..., 1:]
    twice = 2 * jnp.cross(v, jnp.broadcast_to(vector, v.shape))
    return vector + w * twice + jnp.cross(v, twice)
