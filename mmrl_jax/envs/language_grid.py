"""`language_grid`: walk to the named object on a small grid, one cell per step, seen from above.

There are four objects on the grid: the named one, one of its color, one of its shape, and another,
so that neither color nor shape alone identifies it. Stepping on an object ends the episode.

A split differs from 'train' in one respect: 'heldout_pair' names pairs of color and shape that
training neither names nor shows, and 'heldout_layout' has pairs of start and goal cells that
training does not have.
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
# Actions as text; the first one replaces text that is no action.
MOVES = ("stay", "up", "down", "left", "right")
_STEPS = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], np.int32)  # Change of row and column.
COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("ball", "box", "bar")
_RGB = np.array(
    [[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.15, 0.3, 0.95], [0.95, 0.85, 0.1], [0.65, 0.2, 0.75]],
    np.float32,
)
# The renderer's primitive for each shape, and its size in cells.
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
_HEIGHT = 20.0  # Height of the camera in cells, large enough that all cells look alike.


class LanguageGrid(Env):
    """An agent must walk to the named object and step on no other one.

    Observation: 'instruction', and 'proprio' float32 [1], the elapsed fraction of the episode.
    `Pixels` adds 'pixels', in which the grid fills the image.
    Action: int32 [], index into `MOVES`; a step off the grid has no effect.
    Reward: 1 for reaching the named object, otherwise 0. Any object terminates the episode, and the
    time limit truncates it.
    Success (`metrics['success']`): this step reached the named object.

    Args:
      split: Name of the split, one of `SPLITS`, from which episodes are sampled.
      rows: Edge of the grid in cells, 4 to 8.
      episode_length: Number of steps until truncation, at least 1.
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
        """Samples objects, positions and instruction with key `rng`."""
        cells = self.rows**2
        # One call samples all random numbers, since on CPU each further call costs compile time.
        u = jax.random.uniform(rng, (cells + PAIRS + 2,))
        order = jnp.argsort(u[:cells])  # Shuffled cells; the first is the agent's start.
        goal = 1 + jnp.argmax(self._is_allowed(order[0], order[1:]))
        others = jnp.argsort(jnp.where(jnp.arange(cells) == goal, cells, jnp.arange(cells)))[1:]
        object_cells = jnp.concatenate([order[goal][None], order[others[: OBJECTS - 1]]])
        pairs = self._sample_pairs(u[cells : cells + PAIRS])
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
            "places": self._row_column(object_cells),
            "pairs": pairs,
            "tokens": tokens,
            "privileged": {"target_pixel": self._fraction(self._row_column(object_cells[0]))},
        }
        state = State(None, {}, zero, zero, {"success": zero}, info)
        return state.replace(obs=self._observe(info))

    def step(self, state: State, action: jax.Array) -> State:
        info = state.info
        agent = jnp.clip(info["agent"] + jnp.asarray(_STEPS)[action], 0, self.rows - 1)
        on_object = jnp.all(agent == info["places"], axis=-1)
        success = on_object[0].astype(jnp.float32)
        terminated = jnp.any(on_object).astype(jnp.float32)
        steps = info["steps"] + 1
        time_over = (steps >= self.episode_length).astype(jnp.float32)
        info = info | {"steps": steps, "agent": agent, "truncation": time_over * (1 - terminated)}
        return state.replace(
            obs=self._observe(info),
            reward=success,
            done=jnp.maximum(terminated, time_over),
            metrics=state.metrics | {"success": success},
            info=info,
        )

    def expert(self, state: State, rng: jax.Array) -> jax.Array:
        """Returns optimal moves int32 [B], see `expert_action`; the key is not used."""
        return expert_action(state, rows=self.rows)

    def scene(self, state: State) -> tuple[Scene, Camera]:
        """Returns the grid and a camera above it; `state` may have leading batch axes."""
        info, kinds = state.info, len(_PRIMITIVES)
        batch = info["steps"].shape
        shape, color = info["pairs"] % len(SHAPES), info["pairs"] // len(SHAPES)
        # Each object is one primitive of every kind, and all but one of them have size 0.
        sizes = jax.nn.one_hot(shape, kinds)[..., None] * _SIZES
        positions = jnp.repeat(self._world(info["places"]), kinds, axis=-2)

        def with_objects(floor_and_agent: Any, objects: jax.Array) -> jax.Array:
            first = jnp.asarray(floor_and_agent, jnp.float32)
            first = jnp.broadcast_to(first, (*batch, *first.shape[-2:]))
            return jnp.concatenate([first, objects.reshape(*batch, OBJECTS * kinds, -1)], axis=-2)

        agent = self._world(info["agent"])[..., None, :]
        squares = jnp.array([1.0] + [0.0] * (1 + OBJECTS * kinds))
        rotation = np.stack([_UPRIGHT] * 2 + [_UPRIGHT, _UPRIGHT, _LYING] * OBJECTS)
        colors = jnp.repeat(jnp.asarray(_RGB)[color], kinds, -2)
        scene = Scene(
            kind=("plane", "cylinder", *_PRIMITIVES * OBJECTS),
            position=with_objects(jnp.concatenate([jnp.zeros_like(agent), agent], -2), positions),
            rotation=jnp.broadcast_to(rotation, (*batch, *rotation.shape)),
            size=with_objects([[0.0, 0.0, 0.0], [0.42, 0.02, 0.0]], sizes),
            color=with_objects([[0.35] * 3, [1.0] * 3], colors),
            checker=jnp.broadcast_to(squares, (*batch, *squares.shape)),
        )
        position = jnp.broadcast_to(jnp.array([0.0, 0.0, _HEIGHT]), (*batch, 3))
        fovy = 2 * np.degrees(np.arctan(self.rows / 2 / _HEIGHT))
        return scene, look_at(position, (0.0, 0.0, 0.0), fovy=fovy)

    def caption(self, state: State) -> str:
        """Returns the instruction of a single state as text."""
        return self.vocabulary.decode(np.asarray(state.info["tokens"]))

    def _observe(self, info: dict[str, Any]) -> dict[str, Any]:
        return {
            "instruction": instructions.instruction(info["tokens"]),
            "proprio": info["steps"][None] / self.episode_length,
        }

    def _row_column(self, cell: jax.Array) -> jax.Array:
        return jnp.stack([cell // self.rows, cell % self.rows], axis=-1).astype(jnp.int32)

    def _fraction(self, cell: jax.Array) -> jax.Array:
        """Maps cells (row, column) [..., 2] to image coordinates in [0, 1], float32 [..., 2]."""
        return (cell[..., ::-1] + 0.5) / self.rows

    def _world(self, cell: jax.Array) -> jax.Array:
        """Maps cells (row, column) [..., 2] to their centers in the world, float32 [..., 3]."""
        x, y = jnp.moveaxis(self._fraction(cell) - 0.5, -1, 0) * self.rows
        return jnp.stack([x, -y, jnp.zeros_like(x)], axis=-1)

    def _is_allowed(self, start: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns whether the split has the pairs of start and goal cells, bool [...]."""
        held_out = (start + 3 * goal) % 5 == 0
        return held_out if self.split == "heldout_layout" else ~held_out

    def _sample_pairs(self, u: jax.Array) -> jax.Array:
        """Returns color-shape pairs int32 [OBJECTS], the target first, from u float32 [PAIRS]."""
        pairs, train = np.arange(PAIRS), ~HELDOUT_PAIR
        color, shape = pairs // len(SHAPES), pairs % len(SHAPES)
        named = HELDOUT_PAIR if self.split == "heldout_pair" else train

        def sample(mask: jax.Array | np.ndarray) -> jax.Array:
            return jnp.argmax(jnp.where(mask, u, -1.0))

        target = sample(named)
        same_color = sample(train & (color == target // len(SHAPES)) & (pairs != target))
        same_shape = sample(train & (shape == target % len(SHAPES)) & (pairs != target))
        other = sample(train & (pairs != target) & (pairs != same_color) & (pairs != same_shape))
        return jnp.stack([target, same_color, same_shape, other])


def expert_action(state: State, *, rows: int) -> jax.Array:
    """Returns the first move of a shortest path to the named object around the others, int32 [B].

    It is 'stay' if there is no path, as in about one percent of the grids.

    Args:
      state: State of B grids of `LanguageGrid`.
      rows: Edge of the grids in cells.
    """

    def move(agent: jax.Array, objects: jax.Array) -> jax.Array:
        far = rows**2
        cell = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(rows), indexing="ij"), -1)
        blocked = jnp.any(jnp.all(cell[:, :, None] == objects[1:], axis=-1), axis=-1)
        goal = jnp.all(cell == objects[0], axis=-1)

        def neighbors(distance: jax.Array) -> jax.Array:
            """Returns the values of the cells up, down, left and right of each, [4, rows, rows]."""
            padded = jnp.pad(distance, 1, constant_values=far)
            up, down = padded[:-2, 1:-1], padded[2:, 1:-1]
            return jnp.stack([up, down, padded[1:-1, :-2], padded[1:-1, 2:]])

        def relax(_: int, distance: jax.Array) -> jax.Array:
            best = jnp.minimum(distance, 1 + jnp.min(neighbors(distance), axis=0))
            return jnp.where(blocked, far, best)

        distance = jax.lax.fori_loop(0, far, relax, jnp.where(goal, 0, far))
        distances = neighbors(distance)[:, agent[0], agent[1]]
        return jnp.where(jnp.min(distances) < far, 1 + jnp.argmin(distances), 0)

    return jax.vmap(move)(state.info["agent"], state.info["places"]).astype(jnp.int32)
