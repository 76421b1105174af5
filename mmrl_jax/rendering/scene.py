"""Scenes: lists of colored geometric primitives."""

from typing import Literal, get_args

import chex
from flax import struct

Kind = Literal["sphere", "capsule", "box", "cylinder", "plane"]
KINDS: tuple[str, ...] = get_args(Kind)


@struct.dataclass
class Scene:
    """`G` primitives with their poses, sizes and colors, and any leading batch axes.

    The kinds are static, so each number and order of kinds compiles to a separate program. A
    primitive of size 0 is not rendered (except for planes), which hides it without recompilation.

    Attributes:
      kind: Kinds of the primitives, a static tuple of `G` names out of `KINDS`.
      position: Centers in the world in m, float32 `[..., G, 3]`.
      rotation: Rotations from the local frame to the world, as unit quaternions w, x, y, z, float32
        `[..., G, 4]`.
      size: Sizes in m in MuJoCo's convention, float32 `[..., G, 3]`; further entries are ignored:
        sphere: radius;
        capsule: radius and half length of the straight part along the local z;
        cylinder: radius and half length along the local z;
        box: half extents along the local x, y and z;
        plane: half extents along the local x and y, 0 for infinite; the normal is the local z.
      color: Red, green and blue in [0, 1], float32 `[..., G, 3]`.
      checker: Edge in m of the squares on a plane, of which every other one is darker, float32
        `[..., G]`; 0 for a plain color. It is ignored for other kinds. None for no squares at all.
    """

    kind: tuple[str, ...] = struct.field(pytree_node=False)
    position: chex.Array
    rotation: chex.Array
    size: chex.Array
    color: chex.Array
    checker: chex.Array | None = None
