"""Frames per second of the reach scene, which has every kind of primitive.

The peer is MuJoCo's software renderer (libOSMesa; Debian: libosmesa6) with as many shapes of the
same kinds. Without the library, its columns are empty.
"""

from collections.abc import Iterator
import ctypes
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from experiments.benchmarks.harness import Measure, Row, compare, hardware, rate
from mmrl_jax.envs.language_reach import LanguageReach
from mmrl_jax.rendering import Scene, render

BATCH = 512
# The script runs in a new interpreter, because mujoco chooses the GL backend when it is imported.
MUJOCO = """
import sys, time, mujoco
pixels, frames = int(sys.argv[1]), 100
shapes = ["capsule"] * 2 + ["sphere"] * 3 + ["box"] * 2 + ["cylinder"] * 2
geoms = "".join(
    f'<geom type="{kind}" size=".07 .07 .07" pos="{0.2 * i - 0.8} 0.5 0.1" rgba="1 0 0 1"/>'
    for i, kind in enumerate(shapes))
model = mujoco.MjModel.from_xml_string(
    f'<mujoco><worldbody><light pos="0 0 3"/><geom type="plane" size="2 2 1"/>{geoms}'
    '<camera name="eye" pos="0 -0.35 1.75" xyaxes="1 0 0 0 0.9 0.4"/></worldbody></mujoco>')
model.vis.quality.offsamples = 0  # No antialiasing, as in our renderer.
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, pixels, pixels)
for i in range(frames + 10):
    if i == 10:
        start = time.perf_counter()
    renderer.update_scene(data, "eye")
    renderer.render()
print(frames / (time.perf_counter() - start))
"""


def rows(runs: int) -> Iterator[Row]:
    """Measures two image sizes, and the cost of an additional primitive of each kind."""
    env = LanguageReach()
    keys = jax.random.split(jax.random.PRNGKey(0), BATCH)
    scene, camera = jax.jit(lambda k: env.scene(jax.vmap(env.reset)(k)))(keys)
    for size in (64, 32):
        yield compare(
            f"{size}x{size}, {len(scene.kind)} primitives / MuJoCo, software",
            rate(BATCH, frames(size), scene, camera),
            mujoco(size),
            unit="frames/s",
            runs=runs,
        )
    for kind in dict.fromkeys(scene.kind):
        copies = 4
        larger = rate(BATCH, frames(64), repeated(scene, kind, copies), camera)
        row = compare("", larger, rate(BATCH, frames(64), scene, camera), unit="", runs=runs)
        assert row.peer is not None
        cost = 1e6 * (1 / row.ours - 1 / row.peer) / copies
        yield Row(f"one more {kind}, 64x64", cost, None, None, "us/frame", runs, hardware())


def frames(size: int) -> jax.stages.Wrapped:
    """Returns the jitted renderer of square images."""
    return jax.jit(functools.partial(render, height=size, width=size))


def repeated(scene: Scene, kind: str, copies: int) -> Scene:
    """Returns the scene with shifted copies of its first primitive of a kind."""
    first = scene.kind.index(kind)

    def extend(x: jax.Array, shift: float = 0.0) -> jax.Array:
        added = [x[:, first : first + 1] + shift * (i + 1) for i in range(copies)]
        return jnp.concatenate([x, *added], axis=1)

    return Scene(
        kind=scene.kind + (kind,) * copies,
        position=extend(scene.position, 0.03),
        rotation=extend(scene.rotation),
        size=extend(scene.size),
        color=extend(scene.color),
    )


def mujoco(size: int) -> Measure | None:
    """Returns a measurement of the frames per second of MuJoCo; None without libOSMesa."""
    try:
        ctypes.CDLL("libOSMesa.so.8")
    except OSError:
        return None

    def measure() -> float:
        # The exit code is ignored, because software GL raises at exit, after the result is printed.
        result = subprocess.run(
            [sys.executable, "-c", MUJOCO, str(size)],
            env={**os.environ, "MUJOCO_GL": "osmesa"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not result.stdout:
            raise RuntimeError(f"MuJoCo's software renderer failed:\n{result.stderr}")
        return float(result.stdout.splitlines()[0])

    return measure
