"""Frames a second of the reach scene, which has every kind of primitive.

The peer is MuJoCo's software renderer (libOSMesa; Debian: libosmesa6) on as many shapes of the same
kinds; without the library its columns stay empty.
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
# An interpreter of its own: the GL backend is chosen when mujoco is first imported.
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
model.vis.quality.offsamples = 0  # Ours does not smooth edges either.
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
    """Measures two sizes, and what one more primitive of each kind costs."""
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
        more = 4
        longer = rate(BATCH, frames(64), repeated(scene, kind, more), camera)
        row = compare("", longer, rate(BATCH, frames(64), scene, camera), unit="", runs=runs)
        assert row.peer is not None
        added = 1e6 * (1 / row.ours - 1 / row.peer) / more
        yield Row(f"one more {kind}, 64x64", added, None, None, "us/frame", runs, hardware())


def frames(size: int) -> jax.stages.Wrapped:
    """The compiled renderer of square pictures."""
    return jax.jit(functools.partial(render, height=size, width=size))


def repeated(scene: Scene, kind: str, more: int) -> Scene:
    """The scene with `more` copies of its first primitive of a kind, each a little further away."""
    first = scene.kind.index(kind)

    def extend(x: jax.Array, shift: float = 0.0) -> jax.Array:
        copies = [x[:, first : first + 1] + shift * (i + 1) for i in range(more)]
        return jnp.concatenate([x, *copies], axis=1)

    return Scene(
        kind=scene.kind + (kind,) * more,
        position=extend(scene.position, 0.03),
        rotation=extend(scene.rotation),
        size=extend(scene.size),
        color=extend(scene.color),
    )


def mujoco(size: int) -> Measure | None:
    """Frames a second of MuJoCo's software renderer, None without libOSMesa."""
    try:
        ctypes.CDLL("libOSMesa.so.8")
    except OSError:
        return None

    def measure() -> float:
        # Software GL raises at exit, after all is printed.
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
