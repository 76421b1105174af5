"""`deep_sea`: a grid in which only one sequence of N actions finds the treasure.

This is Deep Sea of bsuite (Osband et al., 2020, arXiv 1908.03568). A policy that chooses actions at
random finds the treasure in one of 2^N episodes, and every step towards it costs a little.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.envs.check import whole_number

_COST = 0.01  # Cost of a whole episode of steps to the right.


class DeepSea(Env):
    """A diver sinks by one row in each step, and moves one column to the right or to the left.

    Which of the two actions moves to the right differs from cell to cell. It is fixed by
    `mapping_seed`, so that no policy can generalize over the cells.

    Observation: 'proprio' float32 [size * size], 1 in the cell of the diver and 0 elsewhere.
    Action: int32 [], 0 or 1.
    Reward: -0.01 / size for a step to the right, and 1 for the step that ends at the treasure,
    which is the last one of `size` steps to the right.
    Success (`metrics['success']`): this step found the treasure. The last step terminates the
    episode, which is not a truncation.

    Args:
      size: Number N of rows and of columns, 2 to 100.
      mapping_seed: Seed of the actions that move to the right, at least 0.
    """

    action_kind = "discrete"
    action_size = 2
    backend = "none"

    def __init__(self, size: int = 10, mapping_seed: int = 0):
        self.size = whole_number("size", size, 2, 100)
        self.episode_length = self.size
        generator = np.random.default_rng(whole_number("mapping_seed", mapping_seed, 0))
        self.right = generator.integers(0, 2, (self.size, self.size))

    @property
    def observation_size(self) -> dict[str, Any]:
        return {"proprio": (self.size**2,)}

    def reset(self, rng: jax.Array) -> State:
        zero, cell = jnp.zeros(()), jnp.zeros((), jnp.int32)
        info = {"truncation": zero, "row": cell, "column": cell, "privileged": {}}
        return State(None, self._observe(info), zero, zero, {"success": zero}, info)

    def step(self, state: State, action: jax.Array) -> State:
        row, column = state.info["row"], state.info["column"]
        is_right = action == jnp.asarray(self.right)[row, column]
        found = is_right & (row == self.size - 1) & (column == self.size - 1)
        success = found.astype(jnp.float32)
        column = jnp.clip(column + jnp.where(is_right, 1, -1), 0, self.size - 1)
        done = (row == self.size - 1).astype(jnp.float32)
        info = state.info | {"row": jnp.minimum(row + 1, self.size - 1), "column": column}
        return state.replace(
            obs=self._observe(info),
            reward=success - jnp.where(is_right, _COST / self.size, 0.0),
            done=done,
            metrics=state.metrics | {"success": success},
            info=info,
        )

    def _observe(self, info: dict[str, Any]) -> dict[str, jax.Array]:
        cell = info["row"] * self.size + info["column"]
        return {"proprio": jax.nn.one_hot(cell, self.size**2)}
