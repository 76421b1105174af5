"""Adapts any Brax or MuJoCo Playground environment, adding an instruction and a camera."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs import instructions, system_scene
from mmrl_jax.envs.brax_api import BACKENDS, Env, State, environment_names, get_environment
from mmrl_jax.envs.check import whole_number
from mmrl_jax.rendering import Camera, Scene, look_at

INSTRUCTIONS = {
    "ant": "run forward",
    "fast": "go fast",
    "halfcheetah": "run forward",
    "hopper": "hop forward",
    "humanoid": "run forward",
    "humanoidstandup": "stand up",
    "inverted_double_pendulum": "balance the poles",
    "inverted_pendulum": "balance the pole",
    "pusher": "push the object to the goal",
    "reacher": "touch the target",
    "swimmer": "swim forward",
    "walker2d": "walk forward",
}
DIRECTION = (0.0, -0.8, 0.6)  # Unit vector from the target to the default camera.
MARGIN = 1.2  # Distance of the default camera, relative to one whose image the bodies just fill.


class _View(NamedTuple):
    """The geometry to render and the camera.

    Attributes:
      geometry: Visible geoms of the model.
      target: Offset from the followed link to the camera's target in m, float [3].
      camera: Offset from the target to the camera in m, float [3].
    """

    geometry: system_scene.Geometry
    target: np.ndarray
    camera: np.ndarray


class FromBrax(Env):
    """Adapts another environment, whose dynamics, reward and metrics stay unchanged.

    Observation: 'proprio' float32 [P], the other environment's flat observation (entry 'state' of a
    dict), and 'instruction', one fixed sentence. info['truncation'] is 1 if the episode limit, and
    not the environment, ends an episode.

    Args:
      env: Name of a registered Brax environment, or an environment object of Brax or of MuJoCo
        Playground (whose state holds MJX data).
      instruction: Sentence of the instruction; None for observations with 'proprio' only.
      backend: Physics pipeline, for an environment given by name.
      episode_length: Number of control steps until truncation, at least 1.
      link: Index of the link that the camera follows; link 0 is usually the torso.
      camera_offset: Offset in m from the camera's target to the camera. The target is the position
        of the followed link at half the height of the moving bodies. None for a camera to the side
        and above that has all of these in its image.
      fovy: Vertical field of view in degrees, in (0, 180).

    Raises:
      ValueError: No environment is registered under the name, it does not run on the backend, an
        argument is invalid, or the observation is neither flat nor a dict with 'state'. `scene`
        raises it if the environment has no geoms that the renderer supports.
    """

    action_kind = "continuous"

    def __init__(
        self,
        env: str | Any,
        *,
        instruction: str | None,
        backend: str = "spring",
        episode_length: int = 1000,
        link: int = 0,
        camera_offset: tuple[float, float, float] | None = None,
        fovy: float = 45.0,
    ):
        self.episode_length = whole_number("episode_length", episode_length, 1)
        _check_view(fovy, camera_offset)
        if instruction is not None and not (isinstance(instruction, str) and instruction.split()):
            raise ValueError(f"instruction={instruction!r} must be a text of at least one word.")
        if isinstance(env, str):
            env = _registered(env, backend)
        self.env = env
        model = _model(env)
        whole_number("link", link, 0, 0 if model is None else model.nbody - 2)
        self._link, self._offset, self._fovy = link, camera_offset, fovy
        self._view: _View | None = None
        self._tokens: np.ndarray | None = None
        if instruction is not None:
            words = instruction.lower().split()
            self.vocabulary = instructions.Vocabulary(
                words=tuple(sorted(set(words))), length=len(words), sentences=(" ".join(words),)
            )
            self._tokens = self.vocabulary.encode(instruction)
        inner = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        # States of Playground have `data` where those of Brax have `pipeline_state`.
        self._physics = "pipeline_state" if hasattr(inner, "pipeline_state") else "data"
        self._size = jax.eval_shape(_flat, inner.obs).shape[0]

    @property
    def observation_size(self) -> dict[str, Any]:
        size: dict[str, Any] = {"proprio": (self._size,)}
        if self._tokens is not None:
            size["instruction"] = {"tokens": self._tokens.shape, "mask": self._tokens.shape}
        return size

    @property
    def action_size(self) -> int:
        return self.env.action_size

    @property
    def backend(self) -> str:
        return getattr(self.env, "backend", "mjx")

    def reset(self, rng: jax.Array) -> State:
        zero = jnp.zeros(())
        return self._wrap(self.env.reset(rng), steps=zero, truncation=zero)

    def step(self, state: State, action: jax.Array) -> State:
        inner = state.info["inner"].replace(**{self._physics: state.pipeline_state})
        inner = self.env.step(inner, action)
        steps = state.info["steps"] + 1
        truncation = (steps >= self.episode_length) * (1 - inner.done.astype(jnp.float32))
        return self._wrap(inner, steps=steps, truncation=truncation)

    def scene(self, state: State) -> tuple[Scene, Camera]:
        """Returns scene and camera of `state`, which may have leading batch axes."""
        self._view = view = self._view or self._make_view()
        physics = state.pipeline_state
        if self._physics == "data":
            scene = system_scene.scene(view.geometry, physics.xpos, physics.xquat)
            link_position = physics.xpos[..., self._link + 1, :]
        else:
            scene = system_scene.link_scene(view.geometry, physics.x)
            link_position = physics.x.pos[..., self._link, :]
        target = link_position + jnp.asarray(view.target)
        return scene, look_at(target + jnp.asarray(view.camera), target, fovy=self._fovy)

    def caption(self, state: State) -> str:
        """Returns the instruction of a single state as text; '' if there is none."""
        return "" if self._tokens is None else self.vocabulary.decode(self._tokens.tolist())

    def _make_view(self) -> _View:
        model = _model(self.env)
        if model is None:
            raise ValueError(
                f"env={type(self.env).__name__} has no bodies to render; use it without pixels: "
                f"height=0 and width=0."
            )
        geometry = system_scene.geometry(model)
        height, radius = system_scene.extent(model, geometry, self._link + 1)
        camera = self._offset
        if camera is None:
            distance = MARGIN * radius / np.sin(np.deg2rad(self._fovy) / 2)
            camera = np.array(DIRECTION) * distance
        return _View(geometry, np.array([0, 0, height]), np.asarray(camera))

    def _wrap(self, inner: Any, *, steps: jax.Array, truncation: jax.Array) -> State:
        # Weak types and Python numbers would change the carry of a scan from one step to the next.
        inner = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.asarray(x).dtype), inner)
        obs: dict[str, Any] = {"proprio": _flat(inner.obs)}
        info = {
            "steps": steps,
            "truncation": truncation,
            "privileged": {},
            "inner": inner.replace(**{self._physics: None}),
        }
        if self._tokens is not None:
            info["tokens"] = jnp.asarray(self._tokens)
            obs["instruction"] = instructions.instruction(info["tokens"])
        return State(
            pipeline_state=getattr(inner, self._physics),
            obs=obs,
            reward=inner.reward.astype(jnp.float32),
            done=jnp.maximum(inner.done.astype(jnp.float32), truncation),
            metrics={k: v.astype(jnp.float32) for k, v in inner.metrics.items()},
            info=info,
        )


def _registered(name: str, backend: str) -> Any:
    """Returns Brax's environment of a name on a physics pipeline."""
    if name not in environment_names():
        raise ValueError(f"env={name!r} must be one of Brax's {environment_names()}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of Brax's {BACKENDS}.")
    try:
        return get_environment(name, backend=backend)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"backend={backend!r} cannot run Brax's {name!r} ({error}); choose another one of "
            f"{BACKENDS}."
        ) from error


def _check_view(fovy: Any, camera_offset: Any) -> None:
    """Raises ValueError for an impossible camera."""
    if not _is_number(fovy) or not 0 < fovy < 180:
        raise ValueError(f"fovy={fovy!r} must be an angle between 0 and 180 degrees.")
    is_sequence = isinstance(camera_offset, (tuple, list, np.ndarray))
    if camera_offset is not None and not (
        is_sequence and len(camera_offset) == 3 and all(map(_is_number, camera_offset))
    ):
        raise ValueError(f"camera_offset={camera_offset!r} must be three finite numbers in m.")


def _is_number(x: Any) -> bool:
    real = isinstance(x, (int, float, np.number)) and not isinstance(x, bool)
    return real and abs(x) < 1e9  # This excludes infinity and NaN.


def _model(env: Any) -> Any:
    """Returns MuJoCo's model of an environment, or None for one without bodies."""
    return getattr(getattr(env, "sys", env), "mj_model", None)


def playground(name: str) -> Any:
    """Returns MuJoCo Playground's environment `name`, on MJX in JAX.

    Raises:
      ValueError: Playground is not installed, or has no environment of this name.
    """
    try:
        from mujoco_playground import registry
    except ImportError as error:
        raise ValueError(
            f"name='playground:{name}' needs MuJoCo Playground: pip install playground."
        ) from error
    if name not in registry.ALL_ENVS:
        raise ValueError(f"env={name!r} must be one of MuJoCo Playground's {registry.ALL_ENVS}.")
    return registry.load(name, config_overrides={"impl": "jax"})


def _flat(obs: Any) -> jax.Array:
    """Returns the flat observation, float32 [P]."""
    if isinstance(obs, dict):
        if "state" not in obs:
            raise ValueError(f"The observation has entries {sorted(obs)}, but no 'state'.")
        obs = obs["state"]
    if obs.ndim != 1:
        raise ValueError(f"The observation has shape {obs.shape}, but must be flat, [P].")
    return obs.astype(jnp.float32)
