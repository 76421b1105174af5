"""`language_locomotion`: Brax's ant with an instruction that gives its direction and speed.

Only the instruction specifies the commanded velocity: proprioception has the ant's joints, height,
orientation and velocities.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs import instructions, system_scene
from mmrl_jax.envs.brax_api import PipelineEnv, State, get_environment
from mmrl_jax.envs.check import whole_number
from mmrl_jax.envs.physics import Physics
from mmrl_jax.rendering import Camera, Scene, look_at

Split = Literal[
    "train", "heldout_direction_speed", "heldout_paraphrase", "heldout_physics", "heldout_camera"
]
SPLITS: tuple[str, ...] = get_args(Split)

# Direction i points 45 i degrees from the world's x axis (east) towards its y axis (north).
DIRECTIONS = tuple("east northeast north northwest west southwest south southeast".split())
SPEEDS = np.array([1.0, 2.0, 3.0], np.float32)  # m/s
PACES = ("walk", "trot", "run")  # Word i commands SPEEDS[i],
MANNERS = ("slowly", "steadily", "quickly")  # and so does word i of these.
# Pairs of direction and speed that no training episode commands, two for each speed.
HELDOUT = np.zeros((len(DIRECTIONS), len(SPEEDS)), bool)
HELDOUT[[0, 1, 2, 4, 5, 7], [2, 0, 1, 0, 2, 1]] = True

SENTENCES = (
    "{pace} {direction}",
    "{pace} to the {direction}",
    "{pace} {manner} to the {direction}",
    "go {direction} {manner}",
    "head {manner} towards the {direction}",
    "move to the {direction} {manner}",
)
HELDOUT_SENTENCES = (
    "{manner} head {direction}",
    "{pace} towards the {direction}",
    "go {manner} to the {direction}",
    "{pace} {direction} {manner}",
)
TEMPLATES = instructions.Templates(
    SENTENCES + HELDOUT_SENTENCES,
    {"direction": DIRECTIONS, "pace": PACES, "manner": MANNERS},
)

HEALTHY_HEIGHT = (0.2, 1.0)  # Height of a healthy torso in m; outside it the ant has fallen.
HEALTHY_REWARD = 1.0
CONTROL_COST = 0.1
SMOOTHING = 0.1  # Weight of a control step in the mean velocity, whose memory is about 0.5 s.
TOLERANCE = 0.3  # Error of the velocity at success, relative to the commanded speed.
CAMERA_OFFSET = np.array([0.0, -2.4, 2.0], np.float32)  # From the ground under the torso, in m.
CAMERA_HEIGHT = 0.4  # Height of the camera's target above the ground in m.
FOVY = 45.0  # Vertical field of view in degrees.
# Brax's dark brown on dark gray has too little contrast at 32 pixels, so these are brighter.
FLOOR_RGB, ANT_RGB = np.array([[0.55, 0.62, 0.6], [0.95, 0.5, 0.15]], np.float32)


class LanguageLocomotion(PipelineEnv):
    """An ant must run in the named direction at the named speed.

    Observation: 'instruction', and 'proprio' float32 [27], as in Brax's ant: height, orientation
    (quaternion), 8 joint angles, and the velocities of all of these. `Pixels` adds 'pixels' of a
    camera that follows the torso without rotating, so that north is up in the image.
    Action: float32 [8] in [-1, 1], joint torques divided by the maximum torque.
    Reward per control step: |u| - |v - u|, for the torso's horizontal velocity v and the commanded
    velocity u in m/s (|u| if it runs as commanded, 0 if it does not move), plus 1 if it has not
    fallen, minus 0.1 |action|^2.
    Success (`metrics['success']`): the mean velocity of about the last 0.5 s differs from the
    commanded velocity by less than 30 % of the commanded speed, and the ant has not fallen.

    A fall terminates an episode, and the time limit truncates it.

    Args:
      split: Name of the split, one of `SPLITS`; held-out ones differ from 'train' in one respect.
      episode_length: Number of control steps (of 0.05 s) until truncation, at least 1.
    """

    action_kind = "continuous"

    def __init__(self, split: Split = "train", episode_length: int = 200):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {SPLITS}.")
        ant = get_environment("ant", backend="spring")
        super().__init__(sys=_with_true_mass(ant.sys), backend="spring", n_frames=ant._n_frames)
        self.split = split
        self.episode_length = whole_number("episode_length", episode_length, 1)
        self.vocabulary = TEMPLATES.vocabulary
        geometry = system_scene.geometry(self.sys.mj_model)
        floor = np.array(geometry.kind)[:, None] == "plane"
        self._geometry = geometry._replace(color=np.where(floor, FLOOR_RGB, ANT_RGB))
        self._commands = np.argwhere(HELDOUT == (split == "heldout_direction_speed"))

    @property
    def observation_size(self) -> dict[str, Any]:
        length = self.vocabulary.length
        proprio = self.sys.q_size() - 2 + self.sys.qd_size()
        return {"instruction": {"tokens": (length,), "mask": (length,)}, "proprio": (proprio,)}

    def reset(self, rng: jax.Array) -> State:
        """Samples command, instruction, physics, camera and the ant's pose with key `rng`."""
        k_command, k_sentence, k_physics, k_camera, k_q, k_qd = jax.random.split(rng, 6)
        index = jax.random.randint(k_command, (), 0, len(self._commands))
        direction, speed = jnp.asarray(self._commands)[index]
        tokens = TEMPLATES.fill(
            self._sample_sentence(k_sentence), direction=direction, pace=speed, manner=speed
        )
        physics = self._sample_physics(k_physics)
        # Initial poses and velocities have the distribution of Brax's ant.
        q = self.sys.init_q + jax.random.uniform(k_q, (self.sys.q_size(),), minval=-0.1, maxval=0.1)
        qd = 0.1 * jax.random.normal(k_qd, (self.sys.qd_size(),))
        angle = direction * (2 * jnp.pi / len(DIRECTIONS))
        command = jnp.asarray(SPEEDS)[speed] * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        zero = jnp.zeros(())
        info = {
            "steps": zero,
            "truncation": zero,
            "direction": direction,
            "speed": speed,
            "command": command,
            "velocity": jnp.zeros(2),
            "physics": physics,
            "camera": self._sample_camera(k_camera),
            "tokens": tokens,
            "privileged": {"command": command / SPEEDS[-1]},
        }
        pipeline_state = self._pipeline.init(self._system(physics), q, qd)
        metrics = {"success": zero, "velocity_error": jnp.linalg.norm(command), "speed": zero}
        state = State(pipeline_state, {}, zero, zero, metrics, info)
        return state.replace(obs=self._observe(state))

    def step(self, state: State, action: jax.Array) -> State:
        """Applies an action [8] for one control step."""
        sys, command = self._system(state.info["physics"]), state.info["command"]

        def substep(pipeline_state: Any, _: None) -> tuple[Any, None]:
            return self._pipeline.step(sys, pipeline_state, action, False), None

        pipeline_state, _ = jax.lax.scan(substep, state.pipeline_state, None, self._n_frames)
        before, after = state.pipeline_state.x.pos[0], pipeline_state.x.pos[0]
        velocity = (after - before)[:2] / self.dt
        smooth = (1 - SMOOTHING) * state.info["velocity"] + SMOOTHING * velocity
        speed = jnp.linalg.norm(command)
        low, high = HEALTHY_HEIGHT
        fallen = ((after[2] < low) | (after[2] > high)).astype(jnp.float32)
        steps = state.info["steps"] + 1
        truncation = (steps >= self.episode_length) * (1 - fallen)
        error = jnp.linalg.norm(smooth - command)
        progress = speed - jnp.linalg.norm(velocity - command)
        state = state.replace(
            pipeline_state=pipeline_state,
            reward=progress + HEALTHY_REWARD * (1 - fallen) - CONTROL_COST * jnp.sum(action**2),
            done=jnp.maximum(fallen, truncation),
            metrics=state.metrics
            | {
                "success": (error < TOLERANCE * speed) * (1 - fallen),
                "velocity_error": error,
                "speed": jnp.dot(velocity, command) / speed,
            },
            info=state.info | {"steps": steps, "truncation": truncation, "velocity": smooth},
        )
        return state.replace(obs=self._observe(state))

    def scene(self, state: State) -> tuple[Scene, Camera]:
        """Returns scene and camera of `state`, which may have leading batch axes."""
        x = state.pipeline_state.x
        ground = x.pos[..., 0, :] * jnp.array([1.0, 1.0, 0.0])
        camera = look_at(
            ground + state.info["camera"], ground + jnp.array([0, 0, CAMERA_HEIGHT]), fovy=FOVY
        )
        return system_scene.link_scene(self._geometry, x), camera

    def caption(self, state: State) -> str:
        """Returns the instruction of a single state as text."""
        return self.vocabulary.decode(np.asarray(state.info["tokens"]).tolist())

    def _observe(self, state: State) -> dict[str, Any]:
        q, qd = state.pipeline_state.q, state.pipeline_state.qd
        return {
            "instruction": instructions.instruction(state.info["tokens"]),
            "proprio": jnp.concatenate([q[2:], qd]),
        }

    def _system(self, physics: Physics) -> Any:
        inertia = self.sys.link.inertia
        return self.sys.tree_replace(
            {
                "link.inertia.mass": inertia.mass * physics.mass,
                "link.inertia.i": inertia.i * physics.mass,
                "geom_friction": self.sys.geom_friction * physics.friction,
                "actuator.gear": self.sys.actuator.gear * physics.gain,
            }
        )

    def _sample_sentence(self, rng: jax.Array) -> jax.Array:
        """Samples the index of a template, int []."""
        count = len(SENTENCES)
        if self.split == "heldout_paraphrase":
            return jax.random.randint(rng, (), count, count + len(HELDOUT_SENTENCES))
        return jax.random.randint(rng, (), 0, count)

    def _sample_physics(self, rng: jax.Array) -> Physics:
        """Samples factors within 10 % of 1; held-out ants are heavier, more slippery and weaker."""
        factor = 1 + 0.1 * jax.random.uniform(rng, (3,), minval=-1, maxval=1)
        if self.split == "heldout_physics":
            factor = factor + jnp.array([0.5, -0.5, -0.4])
        return Physics(*factor)

    def _sample_camera(self, rng: jax.Array) -> jax.Array:
        """Samples the camera's offset in m, [3]; held-out ones rotate it by 20 to 40 degrees."""
        offset = jnp.asarray(CAMERA_OFFSET)
        if self.split == "heldout_camera":
            k_angle, k_side = jax.random.split(rng)
            angle = jnp.deg2rad(jax.random.uniform(k_angle, (), minval=20.0, maxval=40.0))
            angle = angle * jax.random.rademacher(k_side, (), dtype=jnp.float32)
            cosine, sine = jnp.cos(angle), jnp.sin(angle)
            rotation = jnp.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
            offset = jnp.matmul(rotation, offset, precision=jax.lax.Precision.HIGHEST)
        return offset


def _with_true_mass(sys: Any) -> Any:
    """Returns a system with the same dynamics in which masses and inertias have their true values.

    The spring pipeline uses mass^(1 - spring_mass_scale) as the mass, and Brax's ant has a scale of
    1, so that it behaves as if each mass were 1 kg, whatever its value.
    """
    inertia = sys.link.inertia
    mass = inertia.mass ** (1 - sys.spring_mass_scale)
    diagonal = jnp.diagonal(inertia.i, axis1=-2, axis2=-1) ** (1 - sys.spring_inertia_scale)
    return sys.tree_replace(
        {
            "link.inertia.mass": mass,
            "link.inertia.i": diagonal[..., None] * jnp.eye(3),
            "spring_mass_scale": jnp.zeros(()),
            "spring_inertia_scale": jnp.zeros(()),
        }
    )
