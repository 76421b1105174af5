"""The renderer against MuJoCo's software renderer on the same scenes.

Set MMRL_RENDERING_PICTURES to a folder to have the pictures written there side by side.
"""

import ctypes
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.rendering import Camera, Scene, depth_and_index, render

try:
    ctypes.CDLL("libOSMesa.so.8")
    _MISSING = None
except OSError:
    _MISSING = "needs libOSMesa (Debian: libosmesa6) for MuJoCo's software renderer"
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")

SIZE = 160
FOVY = 45.0
FRAMES = 6

# Run apart from the tests: the GL backend is chosen when mujoco is first imported, and software
# GL prints an exception of its own at exit. Arguments: MJCF file, number of frames, seed, number
# of pixels, vertical field of view, what to randomize (scene, state or camera), output file.
_MUJOCO = """
import sys
import mujoco
import numpy as np

mjcf, frames, seed, pixels, fovy, randomise, out = sys.argv[1:]
frames, pixels, rng = int(frames), int(pixels), np.random.default_rng(int(seed))
model = mujoco.MjModel.from_xml_path(mjcf)
model.vis.global_.fovy = float(fovy)
# Nothing may be cut off by the near plane, which is relative to the extent.
model.vis.map.znear = 0.001
model.vis.quality.offsamples = 0
model.vis.quality.numslices = model.vis.quality.numstacks = 80
data = mujoco.MjData(model)
renderer = mujoco.Renderer(model, pixels, pixels)
option = mujoco.MjvOption()
option.geomgroup[:] = 1
option.sitegroup[:] = 0
camera = mujoco.MjvCamera()
keep = {name: [] for name in (
    "position", "matrix", "size", "camera_position", "camera_rotation", "index", "depth", "image")}
for _ in range(frames):
    if randomise == "scene":
        solid = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
        model.geom_size[solid] = rng.uniform(0.08, 0.4, (model.ngeom, 3))[solid]
        mujoco.mj_forward(model, data)
        # In place of the poses in the model, which geoms of the world need not be read from again.
        for geom in np.flatnonzero(solid):
            data.geom_xpos[geom] = rng.uniform([-0.8, -0.8, 0.0], [0.8, 0.8, 1.0])
            quaternion = rng.normal(size=4)
            mujoco.mju_quat2Mat(data.geom_xmat[geom], quaternion / np.linalg.norm(quaternion))
    elif randomise == "camera":
        mujoco.mj_forward(model, data)
    else:
        mujoco.mj_resetData(model, data)
        for joint in range(model.njnt):
            address = model.jnt_qposadr[joint]
            if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE:
                quaternion = rng.normal(size=4) * [1, 0.3, 0.3, 1]
                data.qpos[address + 3:address + 7] = quaternion / np.linalg.norm(quaternion)
                data.qpos[address + 2] += 0.3
            else:
                data.qpos[address] = rng.uniform(*model.jnt_range[joint])
        mujoco.mj_forward(model, data)
    moving = model.geom_bodyid > 0
    if randomise != "state":
        moving = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    camera.lookat[:] = data.geom_xpos[moving].mean(0)
    camera.distance = rng.uniform(2.5, 4.0)
    camera.azimuth = rng.uniform(-180, 180)
    camera.elevation = rng.uniform(-70, -15)
    renderer.update_scene(data, camera, option)
    # Both eyes are the same place; the frustum is symmetric.
    eyes = renderer.scene.camera
    position = (np.asarray(eyes[0].pos) + np.asarray(eyes[1].pos)) / 2
    forward, up = np.asarray(eyes[0].forward), np.asarray(eyes[0].up)
    rotation = np.stack([np.cross(forward, up), up, -forward], axis=-1)
    renderer.enable_segmentation_rendering()
    segmentation = renderer.render().copy()
    renderer.disable_segmentation_rendering()
    renderer.enable_depth_rendering()
    depth = renderer.render().copy()
    renderer.disable_depth_rendering()
    is_geom = segmentation[..., 1] == int(mujoco.mjtObj.mjOBJ_GEOM)
    values = dict(
        position=data.geom_xpos.copy(), matrix=data.geom_xmat.reshape(-1, 3, 3).copy(),
        size=model.geom_size.copy(), camera_position=position, camera_rotation=rotation,
        index=np.where(is_geom, segmentation[..., 0], -1), depth=depth,
        image=renderer.render().copy())
    for name, value in values.items():
        keep[name].append(value)
kind = [mujoco.mjtGeom(int(t)).name[len("mjGEOM_"):].lower() for t in model.geom_type]
np.savez(out, kind=kind, colour=model.geom_rgba[:, :3], **keep)
"""

# One geom of each kind twice, so that they cover each other, on a floor with an edge.
_SHAPES = """
<mujoco>
  <worldbody>
    <light pos="0 0 4"/>
    <geom type="plane" size="3 2 1" rgba=".5 .5 .5 1"/>
    <geom type="sphere" size=".2" rgba="1 0 0 1"/>
    <geom type="capsule" size=".1 .2" rgba="0 1 0 1"/>
    <geom type="box" size=".1 .2 .3" rgba="0 0 1 1"/>
    <geom type="cylinder" size=".1 .2" rgba="1 1 0 1"/>
    <geom type="sphere" size=".2" rgba="1 .5 0 1"/>
    <geom type="capsule" size=".1 .2" rgba="0 1 1 1"/>
    <geom type="box" size=".1 .2 .3" rgba="1 0 1 1"/>
    <geom type="cylinder" size=".1 .2" rgba=".9 .9 .9 1"/>
  </worldbody>
</mujoco>
"""


def compare(mjcf, randomize, folder, seed):
    """Returns the results of both renderers, `[FRAMES, SIZE, SIZE, ...]`, and the kinds."""
    out = folder / "mujoco.npz"
    arguments = [str(a) for a in (mjcf, FRAMES, seed, SIZE, FOVY, randomize, out)]
    result = subprocess.run(
        [sys.executable, "-c", _MUJOCO, *arguments],
        env={**os.environ, "MUJOCO_GL": "osmesa"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.exists(), result.stderr
    theirs = dict(np.load(out))
    kind = tuple(str(k) for k in theirs["kind"])
    scene = Scene(
        kind=kind,
        position=jnp.asarray(theirs["position"], jnp.float32),
        rotation=jnp.asarray(quaternions(theirs["matrix"]), jnp.float32),
        size=jnp.asarray(theirs["size"], jnp.float32),
        color=jnp.asarray(theirs["colour"], jnp.float32),
    )
    camera = Camera(
        position=jnp.asarray(theirs["camera_position"], jnp.float32),
        rotation=jnp.asarray(theirs["camera_rotation"], jnp.float32),
        fovy=jnp.float32(FOVY),
    )
    draw = jax.jit(render, static_argnames=("height", "width"))
    measure = jax.jit(depth_and_index, static_argnames=("height", "width"))
    distance, index = measure(scene, camera, height=SIZE, width=SIZE)
    image = draw(scene, camera, height=SIZE, width=SIZE)
    # MuJoCo's depth is along the optical axis.
    slope = ((np.arange(SIZE) + 0.5) * 2 / SIZE - 1) * np.tan(np.deg2rad(FOVY / 2))
    along_axis = np.asarray(distance) / np.sqrt(1 + slope**2 + slope[:, None] ** 2)
    ours = {"index": np.asarray(index), "depth": along_axis, "image": np.asarray(image)}
    if "MMRL_RENDERING_PICTURES" in os.environ:
        write_pictures(ours, theirs, pathlib.Path(os.environ["MMRL_RENDERING_PICTURES"]), mjcf.stem)
    return ours, theirs, kind


def quaternions(matrix):
    """Unit quaternions `[..., 4]`: the null direction of (what the matrix says) - (what q says),
    the eigenvector of the largest eigenvalue of Bar-Itzhack's symmetric matrix."""
    m = np.asarray(matrix, np.float64)
    k = np.zeros((*m.shape[:-2], 4, 4))
    k[..., 0, 0] = np.trace(m, axis1=-2, axis2=-1)
    skew = [m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]]
    k[..., 0, 1:] = k[..., 1:, 0] = np.stack(skew, axis=-1)
    k[..., 1:, 1:] = m + m.swapaxes(-1, -2) - k[..., :1, :1] * np.eye(3)
    return np.linalg.eigh(k)[1][..., -1]


def write_pictures(ours, theirs, folder, name):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    differ = (ours["index"] != theirs["index"])[..., None] * np.uint8([255, 0, 0])
    rows = [
        np.concatenate(list(images), axis=1)
        for images in (ours["image"], theirs["image"], differ.astype(np.uint8))
    ]
    Image.fromarray(np.concatenate(rows, axis=0)).save(folder / f"mujoco_{name}.png")


def intersection_over_union(ours, theirs):
    return (ours & theirs).sum() / (ours | theirs).sum()


def check(ours, theirs, kind):
    """Checks silhouettes, the order of geoms, and depth; returns text with the errors."""
    is_plane = np.asarray([k == "plane" for k in kind] + [False])  # the last: index -1
    masks = [
        [(frames["index"] >= 0) & ~is_plane[frames["index"]] for frames in (ours, theirs)],
        [is_plane[frames["index"]] for frames in (ours, theirs)],
        [frames["index"] < 0 for frames in (ours, theirs)],
    ]
    figures = {}
    for name, (mine, reference) in zip(("solids", "planes", "nothing"), masks, strict=True):
        # A silhouette of a few hundred pixels is mostly outline.
        ious = [
            intersection_over_union(a, b)
            for a, b in zip(mine, reference, strict=True)
            if b.sum() > 500
        ]
        if ious:
            figures[name] = min(ious)
            assert min(ious) >= 0.95, f"{name}: {ious}"
    # Where surfaces coincide (the ant's links share the balls at their joints) either is in front.
    error = np.abs(ours["depth"] - theirs["depth"])
    either = (ours["index"] >= 0) & (theirs["index"] >= 0) & (error < 0.003)
    index = np.where(either, theirs["index"], ours["index"])
    for g, k in enumerate(kind):
        mine, reference = index == g, theirs["index"] == g
        if reference.sum() > 400:
            figures[f"{g} {k}"] = intersection_over_union(mine, reference)
            assert figures[f"{g} {k}"] >= 0.95, (g, k, figures)
    both = masks[0][0] & masks[0][1]
    assert both.sum() > 2000
    figures["same geom in front"] = (index == theirs["index"])[both].mean()
    assert figures["same geom in front"] >= 0.98
    # Meshes of 80 slices are not round, and pixels at grazing angles jump: a robust figure.
    figures["depth error of solids, m, 95 %"] = np.quantile(error[both], 0.95)
    assert figures["depth error of solids, m, 95 %"] < 0.01
    print({name: round(float(value), 4) for name, value in figures.items()})


def test_shapes_in_random_poses(tmp_path):
    mjcf = tmp_path / "shapes.xml"
    mjcf.write_text(_SHAPES)
    ours, theirs, kind = compare(mjcf, "scene", tmp_path, seed=0)
    check(ours, theirs, kind)
    # Colors, by hue: their light differs. All but the gray ones.
    solid = (theirs["index"] >= 1) & (theirs["index"] < 8) & (ours["index"] == theirs["index"])
    hues = []
    for frames in (ours, theirs):
        rgb = frames["image"][solid].astype(float)
        hues.append(rgb / np.maximum(rgb.max(-1, keepdims=True), 1))
    lit = theirs["image"][solid].max(-1) > 60
    assert (np.abs(hues[0] - hues[1]).max(-1)[lit] < 0.25).mean() > 0.9


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("ant", {"plane", "sphere", "capsule"}),
        ("hopper", {"plane", "capsule"}),
        ("humanoid", {"plane", "sphere", "capsule"}),
    ],
)
def test_brax_bodies_in_random_states(name, kinds, tmp_path):
    brax = pytest.importorskip("brax")
    mjcf = pathlib.Path(brax.__file__).parent / "envs" / "assets" / f"{name}.xml"
    ours, theirs, kind = compare(mjcf, "state", tmp_path, seed=1)
    assert kinds == set(kind)
    check(ours, theirs, kind)


def test_the_reach_scene_from_random_cameras(tmp_path):
    env = envs.create("language_reach", split="train", height=8, width=8, history=1)
    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), 1))
    scene, _ = jax.tree.map(lambda x: np.asarray(x)[0], jax.jit(env.scene)(state))
    geoms = []
    for i, kind in enumerate(scene.kind):
        size = (3, 3, 1) if kind == "plane" else scene.size[i]
        if not size[0]:  # An object that this episode lacks.
            continue
        text = {
            name: " ".join(f"{x:.6f}" for x in values)
            for name, values in (
                ("pos", scene.position[i]),
                ("quat", scene.rotation[i]),
                ("size", np.maximum(size, 1e-4)),
                ("rgba", [*scene.color[i], 1.0]),
            )
        }
        attributes = " ".join(f'{name}="{value}"' for name, value in text.items())
        geoms.append(f'<geom type="{kind}" {attributes}/>')
    mjcf = tmp_path / "reach.xml"
    mjcf.write_text(f"<mujoco><worldbody>{''.join(geoms)}</worldbody></mujoco>")
    ours, theirs, kind = compare(mjcf, "camera", tmp_path, seed=2)
    # The table, the arm of two links with its tip, and three objects at least.
    assert kind[:4] == ("plane", "capsule", "capsule", "sphere") and len(kind) >= 7
    check(ours, theirs, kind)
