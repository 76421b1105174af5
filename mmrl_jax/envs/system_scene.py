"""The appearance of a MuJoCo model: its geoms at the poses of its bodies, as a `Scene`.

A Brax `System` holds the MuJoCo model from which it was made (`sys.mj_model`), and every physics
backend computes the world transforms of its links, which are that model's bodies except the world.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from mmrl_jax.rendering import KINDS, Scene

_KIND = {int(getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}")): kind for kind in KINDS}
_DEFAULT_RGBA = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # MuJoCo's default color of a geom.
_HIDDEN_GROUP = 3  # MuJoCo's own viewer shows groups 0 to 2, and collision geoms have group 3.


class Geometry(NamedTuple):
    """The visible geoms of a model, as NumPy arrays, which are constants of a compiled program.

    Attributes:
      kind: Kinds of the geoms, a tuple of G names out of `rendering.KINDS`.
      body: Index of the body of each geom, int [G]; 0 is the world.
      position: Positions in the body's frame in m, float32 [G, 3].
      rotation: Rotations in the body's frame as unit quaternions w, x, y, z, float32 [G, 4].
      size: Sizes in m in MuJoCo's convention, float32 [G, 3].
      color: Red, green and blue in [0, 1], float32 [G, 3].
      geom: Index of each geom in the model, int [G].
    """

    kind: tuple[str, ...]
    body: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    size: np.ndarray
    color: np.ndarray
    geom: np.ndarray


def geometry(model: mujoco.MjModel) -> Geometry:
    """Returns the geoms of `model` that MuJoCo's viewer would show.

    Geoms with an alpha of 0 and those of groups 3 and above are omitted. The mean color of a
    texture replaces it, and translucent geoms become opaque.

    Raises:
      ValueError: A visible geom is of a kind that the renderer does not support, such as a mesh.
    """
    rgba = np.array([_rgba(model, g) for g in range(model.ngeom)]).reshape(-1, 4)
    shown = [
        g for g in range(model.ngeom) if rgba[g, 3] > 0 and model.geom_group[g] < _HIDDEN_GROUP
    ]
    for g in shown:
        if int(model.geom_type[g]) not in _KIND:
            kind = mujoco.mjtGeom(int(model.geom_type[g])).name.removeprefix("mjGEOM_").lower()
            raise ValueError(
                f"Geom {g} ({model.geom(g).name!r}) is of kind {kind!r}; the renderer supports "
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
    """Returns a scene with the geoms at the poses of their bodies.

    Args:
      shown: Geoms of the model.
      position: Positions of the N bodies in the world in m, float32 [..., N, 3]; body 0 is the
        world itself.
      rotation: Rotations of the bodies as unit quaternions w, x, y, z, float32 [..., N, 4].
      checker: Edge in m of the squares on planes, without which motion would be invisible; 0 for
        plain planes.

    Returns:
      The scene, with the leading axes of `position`.
    """
    batch, count = position.shape[:-2], len(shown.kind)
    body_position, body_rotation = position[..., shown.body, :], rotation[..., shown.body, :]
    return Scene(
        kind=shown.kind,
        position=body_position + _rotate(body_rotation, jnp.asarray(shown.position)),
        rotation=_multiply(body_rotation, jnp.asarray(shown.rotation)),
        size=jnp.broadcast_to(shown.size, (*batch, count, 3)),
        color=jnp.broadcast_to(shown.color, (*batch, count, 3)),
        checker=jnp.full((*batch, count), checker, jnp.float32),
    )


def link_scene(shown: Geometry, x: Any, *, checker: float = 1.0) -> Scene:
    """Returns `scene` for link transforms `x` of Brax (pos [..., L, 3], rot [..., L, 4])."""
    batch = x.pos.shape[:-2]
    identity = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (*batch, 1, 4))
    return scene(
        shown,
        jnp.concatenate([jnp.zeros((*batch, 1, 3)), x.pos], -2),
        jnp.concatenate([identity, x.rot], -2),
        checker=checker,
    )


def extent(model: mujoco.MjModel, shown: Geometry, body: int) -> tuple[float, float]:
    """Returns the extent of the moving part of a model around `body` in the model's rest pose.

    Args:
      model: MuJoCo model.
      shown: Visible geoms of the model.
      body: Index of the body, in the model's numbering.

    Returns:
      Height in m of the center of the moving part above `body` (negative if below), and the
      distance in m from that point to the farthest point of a geom.
    """
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    moving = shown.geom[(shown.body > 0) & (model.geom_rbound[shown.geom] > 0)]
    if not moving.size:
        return 0.0, 1.0
    offset, bound = data.geom_xpos[moving] - data.xpos[body], model.geom_rbound[moving]
    height = (np.max(offset[:, 2] + bound) + np.min(offset[:, 2] - bound)) / 2
    radius = np.max(np.linalg.norm(offset - [0, 0, height], axis=-1) + bound)
    return float(height), float(radius)


def _rgba(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Returns the color [4] of a geom, or of its material if it has the default color."""
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
    """Returns the product of quaternions w, x, y, z [..., 4]: rotation b followed by a."""
    aw, av, bw, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    real = aw * bw - jnp.sum(av * bv, axis=-1, keepdims=True)
    return jnp.concatenate([real, aw * bv + bw * av + jnp.cross(av, bv)], axis=-1)


def _rotate(rotation: jax.Array, vector: jax.Array) -> jax.Array:
    """Rotates `vector` [..., 3] by the unit quaternion `rotation` [..., 4]."""
    w, v = rotation[..., :1], rotation[..., 1:]
    twice = 2 * jnp.cross(v, jnp.broadcast_to(vector, v.shape))
    return vector + w * twice + jnp.cross(v, twice)
