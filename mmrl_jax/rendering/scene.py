"""What there is to see: a list of colored geometric primitives."""

from typing import Literal, get_args

import chex
from flax import struct

Kind = Literal["sphere", "capsule", "box", "cylinder", "plane"]
KINDS: tuple[str, ...] = get_args(Kind)


@struct.dataclass
class Scene:
    """`G` primitives with their poses, sizes and colors; any leading batch axes.

    The kinds are static, so that each number and order of kinds is a program of its own. To hide a
    primitive inside a program give it size 0: it is then drawn nowhere (planes excepted).

    Attributes:
        kind: static tuple of `G` names out of `KINDS`.
        position: float32 `[..., G, 3]`, center in the world, m.
        rotation: float32 `[..., G, 4]`, unit quaternion w, x, y, z: local frame to world.
        size: float32 `[..., G, 3]`, m, in MuJoCo's convention; entries not named are ignored:
            sphere: radius;
            capsule: radius, half length of the straight part, along the local z;
            cylinder: radius, half length along the local z;
            box: half extents along the local x, y, z;
            plane: half extents along the local x and y, 0 for infinite; its normal is the local z.
        color: float32 `[..., G, 3]`, red, green, blue in [0, 1].
        checker: None, or float32 `[..., G]`, m: edge of the squares on a plane, every other one of
            which is darker; 0 for one color. Ignored for the other kinds.
    """

    kind: tuple[str, ...] = struct.field(pytree_node=False)
    position: chex.Array
    rotation: chex.Array
    size: chex.Array
    color: chex.Array
    checker: chex.Array | None = None
