"""`language_reach`: a two-link arm, a table of objects, and a sentence that names one of them.

Only the pixels show where the objects are, and only the instruction identifies the target:
proprioception has the arm's joints and tip.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs import instructions
from mmrl_jax.envs.brax_api import PipelineEnv, State, mjcf
from mmrl_jax.envs.check import whole_number
from mmrl_jax.envs.physics import Physics
from mmrl_jax.rendering import Camera, Scene, look_at, project

Split = Literal[
    "train", "heldout_colour_shape", "heldout_paraphrase", "heldout_physics", "heldout_camera"
]
SPLITS: tuple[str, ...] = get_args(Split)

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
RGB = np.array(
    [
        [0.90, 0.10, 0.10],
        [0.10, 0.70, 0.15],
        [0.10, 0.25, 0.95],
        [0.95, 0.85, 0.10],
        [0.65, 0.15, 0.80],
        [0.97, 0.97, 0.97],
    ],
    np.float32,
)
SHAPES = ("ball", "cube", "can")
NOUNS = ("ball", "cube", "can", "sphere", "box", "cylinder")  # Noun i names shape i % 3.
# Pairs of color and shape that no training scene has, one or two for each shape.
HELDOUT = np.zeros((len(COLORS), len(SHAPES)), bool)
HELDOUT[[0, 3, 1, 4, 2], [1, 0, 2, 0, 2]] = True

SENTENCES = (
    "touch the {color} {shape}",
    "reach for the {color} {shape}",
    "go to the {color} {shape}",
    "move to the {shape} that is {color}",
    "find the {color} {shape} and touch it",
    "put your hand on the {color} {shape}",
)
HELDOUT_SENTENCES = (
    "touch the {shape} that is {color}",
    "go and find the {color} {shape}",
    "reach for the {shape} that is {color}",
    "move your hand to the {color} {shape}",
)
TEMPLATES = instructions.Templates(SENTENCES + HELDOUT_SENTENCES, {"color": COLORS, "shape": NOUNS})

LINK = 0.5  # Length of each of the two links in m.
# Sizes in m, in the renderer's convention. A small ball, a big cube and a tall can differ in size
# and outline even at 32 pixels, where shading is hardly visible.
SIZES = np.array([[0.065, 0.0, 0.0], [0.095, 0.095, 0.09], [0.045, 0.2, 0.0]], np.float32)
HEIGHTS = np.array([0.065, 0.09, 0.2], np.float32)  # Heights of the centers above the table in m.
TOUCH = 0.1  # Horizontal distance in m from tip to object below which the tip touches it.
SLOTS_PER_SHAPE = 2
OBJECTS = SLOTS_PER_SHAPE * len(SHAPES)
AREA = np.array([[-0.62, 0.2], [0.62, 0.88]], np.float32)  # Corners of the objects' area in m.
APART = 0.28  # Desired distance between two objects' centers in m.
NEAREST, FARTHEST = 0.38, 0.93  # Range of an object's distance from the shoulder in m.
CAMERA_POSITION = np.array([0.0, -0.35, 1.75], np.float32)
CAMERA_TARGET = np.array([0.0, 0.46, 0.0], np.float32)
FOVY = 42.0  # Vertical field of view in degrees.
TURNS = {"stay": 0.0, "left": 1.0, "right": -1.0}  # Torques as text, relative to the maximum.
MAX_SPEED = 5.0  # Speed of a joint under the maximum torque in rad/s.

# Armature (kg m^2) is the inertia of the motors; without it the damping of a straight arm, which is
# integrated explicitly, is unstable.
XML = """
<mujoco>
  <compiler angle="radian" inertiafromgeom="true"/>
  <option gravity="0 0 0" timestep="0.01"/>
  <custom>
    <numeric data="1.57 1.5" name="init_qpos"/>
    <numeric data="0" name="ang_damping"/>
    <numeric data="0" name="spring_mass_scale"/>
    <numeric data="0" name="spring_inertia_scale"/>
    <numeric data="10" name="matrix_inv_iterations"/>
  </custom>
  <worldbody>
    <body name="upper" pos="0 0 0.12">
      <joint name="shoulder" type="hinge" axis="0 0 1" damping="2" armature="0.05"/>
      <geom type="capsule" fromto="0 0 0 0.5 0 0" size="0.035" mass="0.4"
            contype="0" conaffinity="0"/>
      <body name="lower" pos="0.5 0 0">
        <joint name="elbow" type="hinge" axis="0 0 1" damping="2" armature="0.05"/>
        <geom type="capsule" fromto="0 0 0 0.5 0 0" size="0.03" mass="0.3"
              contype="0" conaffinity="0"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" gear="10" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="elbow" gear="10" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


# Number of candidate positions for each object.
CANDIDATES = 24
# Number of uniform random numbers in [0, 1) that a reset uses for each quantity.
DRAWS = {
    "count": 1,
    "order": OBJECTS,
    "target": 1,
    "place": OBJECTS * CANDIDATES * 2,
    "colour": len(COLORS) * len(SHAPES),
    "yaw": OBJECTS,
    "sentence": 1,
    "noun": 1,
    "physics": 3,
    "camera": 2,
    "arm": 2,
}
_ENDS = np.cumsum(list(DRAWS.values()))


class LanguageReach(PipelineEnv):
    """An arm must touch the named object, and still touch it when the episode ends.

    Observation: 'instruction', and 'proprio' float32 [8]: cosine and sine of the two joint angles,
    joint velocities divided by the maximum speed, and tip x and y in m. `Pixels` adds 'pixels'.
    Action: float32 [2] in [-1, 1], torque of shoulder and elbow divided by the maximum torque;
    because of the joints' friction it acts much like a commanded velocity. An action as text has
    one of `TURNS` for the shoulder and one for the elbow, e.g. 'left stay'. Reward: 'dense', twice
    the progress towards the object in m, plus 0.25 for each step that touches it; 'sparse', 1 for
    each step that touches it. Success (`metrics['success']`): the tip is within 0.1 m of the named
    object after this step.

    Args:
      split: Name of the split, one of `SPLITS`; held-out ones differ from 'train' in one respect.
      reward: Kind of reward, 'dense' or 'sparse'.
      episode_length: Number of control steps (of 0.05 s) until truncation, 16 to 32.
    """

    action_kind = "continuous"
    # Shoulder, then elbow; the first one replaces text that is no action.
    actions_as_text = {
        f"{shoulder} {elbow}": np.array([x, y], np.float32)
        for shoulder, x in TURNS.items()
        for elbow, y in TURNS.items()
    }

    def __init__(
        self,
        split: Split = "train",
        reward: Literal["dense", "sparse"] = "dense",
        episode_length: int = 24,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {SPLITS}.")
        if reward not in ("dense", "sparse"):
            raise ValueError(f"reward={reward!r} is unknown; choose 'dense' or 'sparse'.")
        # The other pipelines do not support all of the factors in `Physics`.
        super().__init__(sys=mjcf.loads(XML), backend="generalized", n_frames=5)
        self.split = split
        self.reward = reward
        self.episode_length = whole_number("episode_length", episode_length, 16, 32)
        self.vocabulary = TEMPLATES.vocabulary

    @property
    def observation_size(self) -> dict[str, Any]:
        length = self.vocabulary.length
        return {"instruction": {"tokens": (length,), "mask": (length,)}, "proprio": (8,)}

    @property
    def action_size(self) -> int:
        return 2

    def reset(self, rng: jax.Array) -> State:
        """Samples objects, instruction, physics, camera and arm with key `rng`."""
        # One call samples all random numbers, since on CPU each further call costs seconds of
        # compile time.
        numbers = jnp.split(jax.random.uniform(rng, (_ENDS[-1],)), _ENDS[:-1])
        u = dict(zip(DRAWS, numbers, strict=True))
        objects, target = self._sample_objects(u)
        tokens = self._sample_instruction(u, objects, target)
        physics = self._sample_physics(u)
        low, high = jnp.array([0.6, 1.4]), jnp.array([2.2, 2.4])
        q = low + (high - low) * u["arm"]
        sys = self._system(physics)
        pipeline_state = self._pipeline.init(sys, q, jnp.zeros(2))
        zero = jnp.zeros(())
        view = self._sample_camera(u)
        info = {
            "steps": zero,
            "truncation": zero,
            "objects": objects,
            "target": target,
            "physics": physics,
            "camera": view,
            "tokens": tokens,
            "privileged": {
                "target_place": objects["position"][target, :2],
                "target_pixel": project(_camera(view), objects["position"][target]),
            },
        }
        state = State(pipeline_state, {}, zero, zero, {"success": zero, "distance": zero}, info)
        distance = self.distance(state)
        return state.replace(
            obs=self._observe(state),
            metrics={"success": (distance < TOUCH).astype(jnp.float32), "distance": distance},
        )

    def step(self, state: State, action: jax.Array) -> State:
        """Applies an action [2] for one control step."""
        sys = self._system(state.info["physics"])

        def substep(pipeline_state: Any, _: None) -> tuple[Any, None]:
            return self._pipeline.step(sys, pipeline_state, action, False), None

        before = self.distance(state)
        pipeline_state, _ = jax.lax.scan(substep, state.pipeline_state, None, self._n_frames)
        state = state.replace(pipeline_state=pipeline_state)
        distance = self.distance(state)
        touch = (distance < TOUCH).astype(jnp.float32)
        reward = touch if self.reward == "sparse" else 2.0 * (before - distance) + 0.25 * touch
        steps = state.info["steps"] + 1
        time_over = (steps >= self.episode_length).astype(jnp.float32)
        return state.replace(
            obs=self._observe(state),
            reward=reward,
            done=time_over,
            metrics=state.metrics | {"success": touch, "distance": distance},
            info=state.info | {"steps": steps, "truncation": time_over},
        )

    def tip(self, state: State) -> jax.Array:
        """Returns x and y of the arm's tip in the world in m, [2]."""
        return forward_kinematics(state.pipeline_state.q)

    def distance(self, state: State) -> jax.Array:
        """Returns the horizontal distance from the tip to the named object in m, []."""
        target = state.info["objects"]["position"][state.info["target"], :2]
        return jnp.linalg.norm(self.tip(state) - target)

    def expert(self, state: State, rng: jax.Array) -> jax.Array:
        """Returns actions float32 [B, 2] of a good expert, see `expert_action`."""
        return expert_action(state, rng, gain=3.0, undershoot=0.0, noise=0.0)

    def scene(self, state: State) -> tuple[Scene, Camera]:
        """Returns scene and camera of `state`, which may have leading batch axes."""
        objects, q = state.info["objects"], state.pipeline_state.q
        batch = q.shape[:-1]
        angle = jnp.stack([q[..., 0], q[..., 0] + q[..., 1]], -1)
        direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)  # [..., 2 links, xy]
        tip = LINK * direction.sum(-2)
        elbow = LINK * direction[..., 0, :]
        middle = jnp.stack([0.5 * elbow, 0.5 * (elbow + tip), tip], -2)
        height = jnp.broadcast_to(jnp.array([0.22, 0.26, 0.26]), (*batch, 3))[..., None]
        # The axis of a capsule is its local z; the quaternion rotates z to the link's direction.
        half = jnp.sqrt(0.5)
        link_rotation = jnp.stack(
            [
                jnp.full_like(angle, half),
                -half * direction[..., 1],
                half * direction[..., 0],
                jnp.zeros_like(angle),
            ],
            -1,
        )
        upright = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), (*batch, 1, 4))
        yaw = objects["yaw"][..., None] / 2
        object_rotation = jnp.concatenate([jnp.cos(yaw), 0 * yaw, 0 * yaw, jnp.sin(yaw)], -1)
        active = objects["active"][..., None]
        object_size = active * SIZES[np.arange(OBJECTS) // SLOTS_PER_SHAPE]
        table = jnp.zeros((*batch, 1, 3))
        arm_size = jnp.array([[0.04, LINK / 2, 0], [0.032, LINK / 2, 0], [0.05, 0, 0]])
        arm_color = jnp.array([[0.25, 0.25, 0.28], [0.35, 0.35, 0.38], [1.0, 0.55, 0.1]])
        expand = lambda x: jnp.broadcast_to(x, (*batch, *x.shape))  # noqa: E731
        scene = Scene(
            kind=("plane", "capsule", "capsule", "sphere")
            + ("sphere",) * SLOTS_PER_SHAPE
            + ("box",) * SLOTS_PER_SHAPE
            + ("cylinder",) * SLOTS_PER_SHAPE,
            position=jnp.concatenate(
                [table, jnp.concatenate([middle, height], -1), objects["position"]], -2
            ),
            rotation=jnp.concatenate([upright, link_rotation, upright, object_rotation], -2),
            size=jnp.concatenate([table, expand(arm_size), object_size], -2),
            color=jnp.concatenate(
                [
                    expand(jnp.array([[0.45, 0.38, 0.30]])),
                    expand(arm_color),
                    jnp.asarray(RGB)[objects["colour"]],
                ],
                -2,
            ),
        )
        return scene, _camera(state.info["camera"])

    def caption(self, state: State) -> str:
        """Returns the instruction of a single state as text."""
        return self.vocabulary.decode(np.asarray(state.info["tokens"]))

    def _observe(self, state: State) -> dict[str, Any]:
        q, qd = state.pipeline_state.q, state.pipeline_state.qd
        return {
            "instruction": instructions.instruction(state.info["tokens"]),
            "proprio": jnp.concatenate(
                [jnp.cos(q), jnp.sin(q), qd / MAX_SPEED, forward_kinematics(q)]
            ),
        }

    def _system(self, physics: Physics) -> Any:
        inertia = self.sys.link.inertia
        return self.sys.tree_replace(
            {
                "link.inertia.mass": inertia.mass * physics.mass,
                "link.inertia.i": inertia.i * physics.mass,
                "dof.damping": self.sys.dof.damping * physics.friction,
                "actuator.gear": self.sys.actuator.gear * physics.gain,
            }
        )

    def _sample_objects(self, u: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        """Samples three to five objects; returns them with the index of the target."""
        count = _integer(u["count"], 3, 6)
        # Object i gets the position rank[i]; objects whose rank is at least `count` are inactive.
        order = u["order"] + 1e-6 * np.arange(OBJECTS)  # The offsets break ties.
        rank = jnp.sum(order[:, None] > order[None], axis=1)
        active = rank < count
        target = jnp.argmax(rank == _integer(u["target"], 0, count))
        shape = jnp.arange(OBJECTS) // SLOTS_PER_SHAPE
        # Two objects of one shape never share a color, so that every name is unambiguous: the
        # first gets the color of the highest priority, the second the next.
        priority = u["colour"].reshape(HELDOUT.T.shape)
        if self.split == "heldout_colour_shape":
            # The named object is a held-out pair. Any other may be one too, so that the target
            # cannot be identified as the only unusual object.
            is_named = np.arange(len(SHAPES)) == shape[target]
            priority = jnp.where(HELDOUT.T & is_named[:, None], 1 + priority, priority)
        else:
            priority = jnp.where(HELDOUT.T, -1.0, priority)
        first = jnp.argmax(priority, axis=1)
        second = jnp.argmax(jnp.where(np.arange(len(COLORS)) == first[:, None], -2, priority), 1)
        color = jnp.stack([first, second], axis=1).reshape(OBJECTS)
        if self.split == "heldout_colour_shape":
            # The named object gets the first color of its shape, whichever slot it has.
            partner = target ^ 1
            color = color.at[target].set(first[shape[target]])
            color = color.at[partner].set(second[shape[target]])
        position = _spread(u["place"].reshape(OBJECTS, CANDIDATES, 2))[rank]
        objects = {
            "active": active.astype(jnp.float32),
            "position": jnp.concatenate([position, jnp.asarray(HEIGHTS)[shape][:, None]], -1),
            "yaw": 2 * jnp.pi * u["yaw"],
            "colour": color,
            "shape": shape,
        }
        return objects, target

    def _sample_instruction(
        self, u: dict[str, jax.Array], objects: dict[str, jax.Array], target: jax.Array
    ) -> jax.Array:
        """Samples the tokens of an instruction that names the target, int32 [L]."""
        count, total = len(SENTENCES), len(TEMPLATES.sentences)
        low, high = (count, total) if self.split == "heldout_paraphrase" else (0, count)
        synonym = _integer(u["noun"], 0, len(NOUNS) // len(SHAPES))
        return TEMPLATES.fill(
            _integer(u["sentence"], low, high),
            color=objects["colour"][target],
            shape=objects["shape"][target] + len(SHAPES) * synonym,
        )

    def _sample_physics(self, u: dict[str, jax.Array]) -> Physics:
        """Samples factors within 10 % of 1; held-out ones change by 40 to 60 % for the worse."""
        jitter = 0.1 * (2 * u["physics"] - 1)
        factor = 1 + jitter
        if self.split == "heldout_physics":
            factor = 1 + jnp.array([0.5, 0.5, -0.5]) + jitter
        return Physics(*factor)

    def _sample_camera(self, u: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Samples the camera's position and target in m, [3] each."""
        position, target = jnp.asarray(CAMERA_POSITION), jnp.asarray(CAMERA_TARGET)
        if self.split == "heldout_camera":
            side, shift = 0.15 + 0.15 * u["camera"]
            position = position + jnp.array([side, shift - 0.2, 0.0])
        return {"position": position, "target": target}


def _camera(view: dict[str, jax.Array]) -> Camera:
    return look_at(view["position"], view["target"], fovy=FOVY)


def forward_kinematics(q: jax.Array) -> jax.Array:
    """Returns x and y of the tip in m, [..., 2], for joint angles q [..., 2] in rad."""
    a, b = q[..., 0], q[..., 0] + q[..., 1]
    return LINK * jnp.stack([jnp.cos(a) + jnp.cos(b), jnp.sin(a) + jnp.sin(b)], -1)


def inverse_kinematics(place: jax.Array) -> jax.Array:
    """Returns joint angles [..., 2] in rad, elbow in [0, pi], of a tip at `place` [..., 2] in m."""
    x, y = place[..., 0], place[..., 1]
    cosine = (x**2 + y**2) / (2 * LINK**2) - 1
    elbow = jnp.arccos(jnp.clip(cosine, -1, 1))
    return jnp.stack([jnp.arctan2(y, x) - elbow / 2, elbow], -1)


def expert_action(
    state: State, rng: jax.Array, *, gain: float, undershoot: float, noise: float
) -> jax.Array:
    """An imperfect scripted expert: a weak proportional controller that stops short of the object.

    It uses the object's position (which no policy observes), but is tuned for a different arm.

    Args:
      state: State of one or a batch of `LanguageReach`.
      rng: Key of the noise.
      gain: Action per rad of error of a joint.
      undershoot: Fraction of the object's distance from the shoulder by which the arm stops short.
      noise: Standard deviation of the Gaussian noise of the action.

    Returns:
      Actions, float32 [..., 2] in [-1, 1].
    """
    goal = inverse_kinematics((1 - undershoot) * state.info["privileged"]["target_place"])
    error = goal - state.pipeline_state.q
    error = jnp.mod(error + jnp.pi, 2 * jnp.pi) - jnp.pi
    action = gain * error + noise * jax.random.normal(rng, error.shape)
    return jnp.clip(action, -1, 1)


def _integer(u: jax.Array, low: int, high: int | jax.Array) -> jax.Array:
    """Maps a uniform number u [1] in [0, 1) to an integer in [low, high), int32 []."""
    return low + jnp.floor(u[0] * (high - low)).astype(jnp.int32)


def _spread(u: jax.Array) -> jax.Array:
    """Returns distant positions [OBJECTS, 2] in m, from u [OBJECTS, CANDIDATES, 2] in [0, 1).

    This is Mitchell's best-candidate sampling with a threshold: it takes the first candidate that
    is at least `APART` from the others, so that not all objects end up at the rim of the table.
    """
    candidates = AREA[0] + u * (AREA[1] - AREA[0])
    radius = jnp.linalg.norm(candidates, axis=-1, keepdims=True)
    candidates = candidates * jnp.clip(radius, NEAREST, FARTHEST) / radius
    positions = [candidates[0, 0]]
    for i in range(1, OBJECTS):
        offsets = candidates[i][:, None] - jnp.stack(positions)
        distance = jnp.linalg.norm(offsets, axis=-1).min(-1)
        positions.append(candidates[i][jnp.argmax(jnp.minimum(distance, APART))])
    return jnp.stack(positions)
