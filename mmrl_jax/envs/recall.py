"""`recall`: an object is visible in the first step only and must be named in the last.

This is the smallest task that needs memory: with a history of four frames the object is in the
observation at the last step; with one frame it is not, and no policy is better than chance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs import instructions
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.rendering import Camera, Scene, look_at

RGB = np.array(
    [[0.9, 0.1, 0.1], [0.1, 0.7, 0.15], [0.1, 0.25, 0.95], [0.95, 0.85, 0.1]], np.float32
)
INSTRUCTION = "name the colour that you saw"


class Recall(Env):
    """An agent must choose the action for the color of the ball that is visible at step 0.

    Observation: 'instruction', one fixed sentence, and 'proprio' float32 [1], the elapsed fraction
    of the episode. `Pixels` adds 'pixels': the ball at step 0, later an empty floor.
    Action: int32 [], 0 to 3, the index of a color.
    Reward: 1 for the correct action at the last step, otherwise 0; earlier actions have no effect.
    The last action terminates the episode, which is not a truncation.
    """

    action_kind = "discrete"
    episode_length = 4

    def __init__(self) -> None:
        words = INSTRUCTION.split()
        self.vocabulary = instructions.Vocabulary(
            words=tuple(sorted(words)), length=len(words), sentences=(INSTRUCTION,)
        )

    @property
    def observation_size(self) -> dict[str, Any]:
        length = self.vocabulary.length
        return {"instruction": {"tokens": (length,), "mask": (length,)}, "proprio": (1,)}

    @property
    def action_size(self) -> int:
        """Number of actions, one for each color."""
        return len(RGB)

    @property
    def backend(self) -> str:
        return "none"

    def reset(self, rng: jax.Array) -> State:
        cue = jax.random.randint(rng, (), 0, len(RGB))
        zero = jnp.zeros(())
        info = {
            "steps": zero,
            "truncation": zero,
            "cue": cue,
            "tokens": jnp.asarray(self.vocabulary.encode(INSTRUCTION)),
            "privileged": {"cue": jax.nn.one_hot(cue, len(RGB))},
        }
        state = State(None, {}, zero, zero, {"success": zero}, info)
        return state.replace(obs=self._observe(info))

    def step(self, state: State, action: jax.Array) -> State:
        steps = state.info["steps"] + 1
        ended = (steps >= self.episode_length).astype(jnp.float32)
        correct = (action == state.info["cue"]) * ended
        info = state.info | {"steps": steps}
        return state.replace(
            obs=self._observe(info),
            reward=correct,
            done=ended,
            metrics=state.metrics | {"success": correct},
            info=info,
        )

    def scene(self, state: State) -> tuple[Scene, Camera]:
        """Returns the ball (at step 0) on a floor, and a camera; leading batch axes are allowed."""
        steps, cue = state.info["steps"], state.info["cue"]
        batch = steps.shape
        radius = jnp.where(steps == 0, 0.4, 0.0)[..., None, None]
        floor = jnp.full((*batch, 1, 3), 0.5)
        scene = Scene(
            kind=("plane", "sphere"),
            position=jnp.broadcast_to(jnp.array([[0, 0, 0], [0, 0, 0.4]]), (*batch, 2, 3)),
            rotation=jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), (*batch, 2, 4)),
            size=radius * jnp.array([[0.0, 0, 0], [1, 0, 0]]),
            color=jnp.concatenate([floor, jnp.asarray(RGB)[cue][..., None, :]], -2),
        )
        position = jnp.broadcast_to(jnp.array([0.0, -1.0, 1.4]), (*batch, 3))
        return scene, look_at(position, (0.0, 0.0, 0.4))

    def caption(self, state: State) -> str:
        """Returns the instruction of a single state as text."""
        return INSTRUCTION

    def _observe(self, info: dict[str, Any]) -> dict[str, Any]:
        return {
            "instruction": instructions.instruction(info["tokens"]),
            "proprio": info["steps"][None] / self.episode_length,
        }
