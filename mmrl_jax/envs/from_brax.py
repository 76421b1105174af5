"""Any Brax or MuJoCo Playground environment, given an instruction and something to look at."""

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
DIRECTION = (0.0, -0.8, 0.6)  # To the camera by default, length 1.
MARGIN = 1.2  # Room around the bodies in the default picture.


class _View(NamedTuple):
    """What is drawn; m, [3]: the camera's target from the followed link, the camera from that."""

    geometry: system_scene.Geometry
    target: np.ndarray
    camera: np.ndarray


class FromBrax(Env):
    """A core environment made of another one, which keeps its dynamics, reward and metrics.

    Observation: 'proprio' float32 [P], the other environment's flat observation (entry 'state' of
    a dict), and 'instruction', one fixed sentence. Where the episode limit and not the environment
    ends an episode, info['truncation'] is 1.

    Args:
      env: name of a registered Brax environment, or an environment: Brax's, or MuJoCo Playground's
        (whose state holds MJX data).
      instruction: the sentence; None for a flat observation, 'proprio' alone.
      backend: physics pipeline, of an environment given by name.
      episode_length: control steps until truncation.
      link: index of the link that the camera follows, the torso of most.
      camera_offset: m, to the camera from what it looks at: the followed link's place, at half the
        height of the moving bodies; None for where it takes in all of these, from the side and
        above.
      fovy: vertical field of view, degrees.

    Raises:
      ValueError: no environment is registered under the name, it does not run on the backend, an
        argument is impossible, or its observation is neither flat nor a dict with 'state'; from
        `scene`, if it has no geoms that the renderer can draw.
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
            raise ValueError(f"instruction={instruction!r} must be a text of one word or more.")
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
        # Playground's states call `data` what Brax's call `pipeline_state`.
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
        """What there is to see in `state`, which may have leading batch axes."""
        self._view = view = self._view or self._look()
        physics = state.pipeline_state
        if self._physics == "data":
            scene = system_scene.scene(view.geometry, physics.xpos, physics.xquat)
            place = physics.xpos[..., self._link + 1, :]
        else:
            scene = system_scene.link_scene(view.geometry, physics.x)
            place = physics.x.pos[..., self._link, :]
        target = place + jnp.asarray(view.target)
        return scene, look_at(target + jnp.asarray(view.camera), target, fovy=self._fovy)

    def caption(self, state: State) -> str:
        """The instruction of one state, as text; '' without one."""
        return "" if self._tokens is None else self.vocabulary.decode(self._tokens.tolist())

    def _look(self) -> _View:
        model = _model(self.env)
        if model is None:
            raise ValueError(
                f"env={type(self.env).__name__} has no bodies to draw; use it without pixels, "
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
        # Weak types and Python numbers would change a scan's carry from one step to the next.
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
    """Brax's environment of a name, on a physics pipeline."""
    if name not in environment_names():
        raise ValueError(f"env={name!r} is none of Brax's {environment_names()}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of Brax's {BACKENDS}.")
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
    listed = isinstance(camera_offset, (tuple, list, np.ndarray))
    if camera_offset is not None and not (
        listed and len(camera_offset) == 3 and all(map(_is_number, camera_offset))
    ):
        raise ValueError(f"camera_offset={camera_offset!r} must be three finite numbers, in m.")


def _is_number(x: Any) -> bool:
    real = isinstance(x, (int, float, np.number)) and not isinstance(x, bool)
    return real and abs(x) < 1e9  # Neither infinite nor NaN.


def _model(env: Any) -> Any:
    """MuJoCo's model of an environment; None for one without bodies."""
    return getattr(getattr(env, "sys", env), "mj_model", None)


def playground(name: str) -> Any:
    """MuJoCo Playground's environment `name`, on MJX in JAX.

    Raises:
      ValueError: Playground is not installed, or has no such environment.
    """
    try:
        from mujoco_playground import registry
    except ImportError as error:
        raise ValueError(
            f"name='playground:{name}' needs MuJoCo Playground: pip install playground."
        ) from error
    if name not in registry.ALL_ENVS:
        raise ValueError(f"env={name!r} is none of MuJoCo Playground's {registry.ALL_ENVS}.")
    return registry.load(name, config_overrides={"impl": "jax"})


def _flat(obs: Any) -> jax.Array:
    """The flat observation float32 [P]."""
    if isinstance(obs, dict):
        if "state" not in obs:
            raise ValueError(f"The observation has entries {sorted(obs)}, but no 'state'.")
        obs = obs["state"]
    if obs.ndim != 1:
        raise ValueError(f"The observation has shape {obs.shape}; a flat one, [P], is needed.")
    return obs.astype(jnp.float32)
