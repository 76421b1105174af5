"""`language_grid`: walk to the named object on a small grid, one cell a step, seen from above.

Four objects lie on the grid: the named one, one of its color, one of its shape, and another, so
that neither color nor shape alone decides. Walking onto an object ends the episode.

A split differs from 'train' in one respect: 'heldout_pair' names colors and shapes that training
neither names nor shows together, 'heldout_layout' has pairs of first cell and goal that training
never has.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs import instructions
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.envs.check import whole_number
from mmrl_jax.rendering import Camera, Scene, look_at

Split = Literal["train", "heldout_pair", "heldout_layout"]
SPLITS: tuple[str, ...] = get_args(Split)
# Actions as text; the first one is that of a text that is none.
MOVES = ("stay", "up", "down", "left", "right")
_STEPS = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], np.int32)  # Row and column.
COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("ball", "box", "bar")
_RGB = np.array(
    [[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.15, 0.3, 0.95], [0.95, 0.85, 0.1], [0.65, 0.2, 0.75]],
    np.float32,
)
# The renderer's primitive of each shape and its size, in cells.
_PRIMITIVES = ("sphere", "box", "capsule")
_SIZES = np.array([[0.36, 0, 0], [0.32, 0.32, 0.2], [0.14, 0.28, 0]], np.float32)
_UPRIGHT = np.array([1.0, 0, 0, 0], np.float32)
_LYING = np.array([np.sqrt(0.5), 0, np.sqrt(0.5), 0], np.float32)  # The local z along x.
PAIRS = len(COLORS) * len(SHAPES)
HELDOUT_PAIR = np.array([(p // len(SHAPES) + p % len(SHAPES)) % 3 == 0 for p in range(PAIRS)])
OBJECTS = 4
TEMPLATES = instructions.Templates(
    ("go to the {color} {shape}", "walk to the {color} {shape}"),
    {"color": COLORS, "shape": SHAPES},
)
_HEIGHT = 20.0  # Of the camera, in cells: high, so that cells away from the middle look alike.


class LanguageGrid(Env):
    """Walk to the named object, onto no other one.

    Observation: 'instruction', and 'proprio' float32 [1], the fraction of the time that has passed.
    `Pixels` adds 'pixels': the grid fills the picture.
    Action: int32 [], index into `MOVES`; a step off the grid is none.
    Reward: 1 for the named object, else 0. Any object ends the task; time truncates it.
    Success (`metrics['success']`): this step came onto the named object.

    Args:
      split: which cases are drawn.
      rows: edge of the grid, cells, 4 to 8.
      episode_length: steps until truncation.
    """

    action_kind = "discrete"
    actions_as_text = {move: np.int32(i) for i, move in enumerate(MOVES)}

    def __init__(self, split: Split = "train", rows: int = 4, episode_length: int = 10):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {SPLITS}.")
        self.split = split
        self.rows = whole_number("rows", rows, 4, 8)
        self.episode_length = whole_number("episode_length", episode_length, 1)
        self.vocabulary = TEMPLATES.vocabulary

    @property
    def observation_size(self) -> dict[str, Any]:
        length = self.vocabulary.length
        return {"instruction": {"tokens": (length,), "mask": (length,)}, "proprio": (1,)}

    @property
    def action_size(self) -> int:
        return len(MOVES)

    @property
    def backend(self) -> str:
        return "none"

    def reset(self, rng: jax.Array) -> State:
        """Draws objects, places and instruction from key `rng`."""
        cells = self.rows**2
        # One call for all random numbers: on CPU each further one costs compile time.
        u = jax.random.uniform(rng, (cells + PAIRS + 2,))
        order = jnp.argsort(u[:cells])  # Cells; the first one is where one starts.
        goal = 1 + jnp.argmax(self._wanted(order[0], order[1:]))
        others = jnp.argsort(jnp.where(jnp.arange(cells) == goal, cells, jnp.arange(cells)))[1:]
        places = jnp.concatenate([order[goal][None], order[others[: OBJECTS - 1]]])
        pairs = self._draw_pairs(u[cells : cells + PAIRS])
        tokens = TEMPLATES.fill(
            (u[-1] * len(TEMPLATES.sentences)).astype(jnp.int32),
            color=pairs[0] // len(SHAPES),
            shape=pairs[0] % len(SHAPES),
        )
        zero = jnp.zeros(())
        info = {
            "steps": zero,
            "truncation": zero,
            "agent": self._row_column(order[0]),
            "places": self._row_column(places),
            "pairs": pairs,
            "tokens": tokens,
            "privileged": {"target_pixel": self._fraction(self._row_column(places[0]))},
        }
        state = State(None, {}, zero, zero, {"success": zero}, info)
        return state.replace(obs=self._observe(info))

    def step(self, state: State, action: jax.Array) -> State:
        info = state.info
        agent = jnp.clip(info["agent"] + jnp.asarray(_STEPS)[action], 0, self.rows - 1)
        on = jnp.all(agent == info["places"], axis=-1)
        success = on[0].astype(jnp.float32)
        found = jnp.any(on).astype(jnp.float32)
        steps = info["steps"] + 1
        late = (steps >= self.episode_length).astype(jnp.float32)
        info = info | {"steps": steps, "agent": agent, "truncation": late * (1 - found)}
        return state.replace(
            obs=self._observe(info),
            reward=success,
            done=jnp.maximum(found, late),
            metrics=state.metrics | {"success": success},
            info=info,
        )

    def expert(self, state: State, rng: jax.Array) -> jax.Array:
        """Moves int32 [B] of who knows the grids, see `expert_action`; the key is not used."""
        return expert_action(state, rows=self.rows)

    def scene(self, state: State) -> tuple[Scene, Camera]:
        """The grid from above; `state` may have leading batch axes."""
        info, kinds = state.info, len(_PRIMITIVES)
        batch = info["steps"].shape
        shape, color = info["pairs"] % len(SHAPES), info["pairs"] // len(SHAPES)
        # Each object is one primitive of every kind, of which all but one have no size.
        sizes = jax.nn.one_hot(shape, kinds)[..., None] * _SIZES
        places = jnp.repeat(self._world(info["places"]), kinds, axis=-2)

        def behind(floor_and_agent: Any, objects: jax.Array) -> jax.Array:
            first = jnp.asarray(floor_and_agent, jnp.float32)
            first = jnp.broadcast_to(first, (*batch, *first.shape[-2:]))
            return jnp.concatenate([first, objects.reshape(*batch, OBJECTS * kinds, -1)], axis=-2)

        agent = self._world(info["agent"])[..., None, :]
        squares = jnp.array([1.0] + [0.0] * (1 + OBJECTS * kinds))
        rotation = np.stack([_UPRIGHT] * 2 + [_UPRIGHT, _UPRIGHT, _LYING] * OBJECTS)
        scene = Scene(
            kind=("plane", "cylinder", *_PRIMITIVES * OBJECTS),
            position=behind(jnp.concatenate([jnp.zeros_like(agent), agent], -2), places),
            rotation=jnp.broadcast_to(rotation, (*batch, *rotation.shape)),
            size=behind([[0.0, 0.0, 0.0], [0.42, 0.02, 0.0]], sizes),
            color=behind([[0.35] * 3, [1.0] * 3], jnp.repeat(jnp.asarray(_RGB)[color], kinds, -2)),
            checker=jnp.broadcast_to(squares, (*batch, *squares.shape)),
        )
        position = jnp.broadcast_to(jnp.array([0.0, 0.0, _HEIGHT]), (*batch, 3))
        fovy = 2 * np.degrees(np.arctan(self.rows / 2 / _HEIGHT))
        return scene, look_at(position, (0.0, 0.0, 0.0), fovy=fovy)

    def caption(self, state: State) -> str:
        """The instruction of one state, as text."""
        return self.vocabulary.decode(np.asarray(state.info["tokens"]))

    def _observe(self, info: dict[str, Any]) -> dict[str, Any]:
        return {
            "instruction": instructions.instruction(info["tokens"]),
            "proprio": info["steps"][None] / self.episode_length,
        }

    def _row_column(self, cell: jax.Array) -> jax.Array:
        return jnp.stack([cell // self.rows, cell % self.rows], axis=-1).astype(jnp.int32)

    def _fraction(self, place: jax.Array) -> jax.Array:
        """Of the picture's width from the left and of its height from the top, float32 [..., 2]."""
        return (place[..., ::-1] + 0.5) / self.rows

    def _world(self, place: jax.Array) -> jax.Array:
        """The middles of cells, float32 [..., 3]."""
        x, y = jnp.moveaxis(self._fraction(place) - 0.5, -1, 0) * self.rows
        return jnp.stack([x, -y, jnp.zeros_like(x)], axis=-1)

    def _wanted(self, first: jax.Array, goal: jax.Array) -> jax.Array:
        """Whether the split may have these goals, bool [...], with this first cell."""
        held_out = (first + 3 * goal) % 5 == 0
        return held_out if self.split == "heldout_layout" else ~held_out

    def _draw_pairs(self, u: jax.Array) -> jax.Array:
        """Colours and shapes int32 [OBJECTS], the named one first, of numbers float32 [PAIRS]."""
        pairs, known = np.arange(PAIRS), ~HELDOUT_PAIR
        color, shape = pairs // len(SHAPES), pairs % len(SHAPES)
        named = HELDOUT_PAIR if self.split == "heldout_pair" else known

        def first(mask: jax.Array | np.ndarray) -> jax.Array:
            return jnp.argmax(jnp.where(mask, u, -1.0))

        a = first(named)
        same_color = first(known & (color == a // len(SHAPES)) & (pairs != a))
        same_shape = first(known & (shape == a % len(SHAPES)) & (pairs != a))
        other = first(known & (pairs != a) & (pairs != same_color) & (pairs != same_shape))
        return jnp.stack([a, same_color, same_shape, other])


def expert_action(state: State, *, rows: int) -> jax.Array:
    """The first move of a shortest way to the named object around the others, int32 [B].

    'stay' where there is no way, which is so in about one of a hundred grids.
    """

    def one(agent: jax.Array, places: jax.Array) -> jax.Array:
        far = rows**2
        cell = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(rows), indexing="ij"), -1)
        taken = jnp.any(jnp.all(cell[:, :, None] == places[1:], axis=-1), axis=-1)
        goal = jnp.all(cell == places[0], axis=-1)

        def around(distance: jax.Array) -> jax.Array:
            """Of the cells up, down, left and right of each, [4, rows, rows]."""
            edged = jnp.pad(distance, 1, constant_values=far)
            return jnp.stack([edged[:-2, 1:-1], edged[2:, 1:-1], edged[1:-1, :-2], edged[1:-1, 2:]])

        def nearer(_: int, distance: jax.Array) -> jax.Array:
            best = jnp.minimum(distance, 1 + jnp.min(around(distance), axis=0))
            return jnp.where(taken, far, best)

        distance = jax.lax.fori_loop(0, far, nearer, jnp.where(goal, 0, far))
        beside = around(distance)[:, agent[0], agent[1]]
        return jnp.where(jnp.min(beside) < far, 1 + jnp.argmin(beside), 0)

    return jax.vmap(one)(state.info["agent"], state.info["places"]).astype(jnp.int32)
