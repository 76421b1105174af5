"""Wrappers with Brax's Env interface."""

from typing import Any

import jax
import jax.numpy as jnp

from mmrl_jax.envs.brax_api import Env, State, Wrapper
from mmrl_jax.envs.check import with_float_numbers
from mmrl_jax.rendering import render


def where(condition: jax.Array, x: Any, y: Any) -> Any:
    """Selects x where `condition` [B] holds, and y elsewhere, for pytrees of leaves [B, ...]."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(pick, x, y)


def _finite(tree: Any) -> jax.Array:
    """Returns whether all numbers of each environment are finite, bool [B], for leaves [B, ...]."""
    leaves = [jnp.isfinite(x.reshape(x.shape[0], -1)).all(axis=1) for x in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all(axis=0)


def _numbers(state: State) -> Any:
    """Returns all numbers of a state that are used in learning or logged."""
    targets = state.info["truncation"], state.info["privileged"]
    return state.obs, state.reward, state.done, state.metrics, targets


class AutoReset(Wrapper):
    """A batch of environments, each of which resets itself in the step after its episode's end.

    `reset` takes keys [B, 2]. Environment i samples its episode n with fold_in(key_i, n), so that
    the sample depends neither on the other environments nor on the device that holds it.

    The last state of an episode is returned unchanged (done = 1). The next step ignores the action
    and returns the first state of a new episode with reward 0 and `info['was_reset']` = 1. The
    value of a truncated state can thus be computed without rendering it twice.
    `metrics['episode_return']` and `['episode_length']` are the totals of the episode so far.

    If an observation, reward, done flag, metric or privileged target of an environment becomes
    non-finite, its step immediately returns the first state of a new episode, marked as a reset,
    with `metrics['broken']` = 1. That episode has no end, and the other environments are not
    affected.
    """

    INFO = ("key", "episode", "was_reset")
    METRICS = ("episode_return", "episode_length", "broken")

    def reset(self, rng: jax.Array) -> State:
        """Resets B environments with keys [B, 2]."""
        episode = jnp.zeros(rng.shape[0], jnp.int32)
        state = self._start(rng, episode)
        return self._mark(state, rng, episode, was_reset=jnp.zeros(rng.shape[0]))

    def step(self, state: State, action: jax.Array) -> State:
        """Steps the B environments with actions [B, A], or resets those whose episode has ended."""
        ended = state.done > 0
        inner = state.replace(
            info={k: v for k, v in state.info.items() if k not in self.INFO},
            metrics={k: v for k, v in state.metrics.items() if k not in self.METRICS},
        )
        stepped = with_float_numbers(jax.vmap(self.env.step)(inner, action))
        episode_return = state.metrics["episode_return"] + stepped.reward
        episode_length = state.metrics["episode_length"] + 1
        broken = ~(_finite(inner.obs) & _finite(_numbers(stepped))) & ~ended
        restart = ended | broken
        rng, episode = state.info["key"], state.info["episode"] + restart
        state = where(restart, self._start(rng, episode), stepped)
        return self._mark(
            state,
            rng,
            episode,
            was_reset=restart.astype(jnp.float32),
            episode_return=jnp.where(restart, 0.0, episode_return),
            episode_length=jnp.where(restart, 0.0, episode_length),
            broken=broken.astype(jnp.float32),
        )

    def _mark(
        self,
        state: State,
        rng: jax.Array,
        episode: jax.Array,
        *,
        was_reset: jax.Array,
        episode_return: jax.Array | float = 0.0,
        episode_length: jax.Array | float = 0.0,
        broken: jax.Array | float = 0.0,
    ) -> State:
        zero = jnp.zeros(rng.shape[0])
        metrics = (zero + episode_return, zero + episode_length, zero + broken)
        return state.replace(
            info=state.info | dict(zip(self.INFO, (rng, episode, was_reset), strict=True)),
            metrics=state.metrics | dict(zip(self.METRICS, metrics, strict=True)),
        )

    def _start(self, rng: jax.Array, episode: jax.Array) -> State:
        keys = jax.vmap(jax.random.fold_in)(rng, episode)
        return with_float_numbers(jax.vmap(self.env.reset)(keys))


class Pixels(Wrapper):
    """Adds obs['pixels'], uint8 [..., H, W, 3], rendered from `env.scene(state)`.

    It wraps a single environment or a batch; outside `AutoReset` each frame is rendered only once.

    Args:
      env: Environment with a method `scene`.
      height: Height H of the images in pixels.
      width: Width W of the images in pixels.
    """

    def __init__(self, env: Env, *, height: int, width: int):
        super().__init__(env)
        self.height, self.width = height, width

    @property
    def observation_size(self) -> dict[str, Any]:
        return dict(self.env.observation_size) | {"pixels": (self.height, self.width, 3)}

    def reset(self, rng: jax.Array) -> State:
        return self._add_pixels(self.env.reset(rng))

    def step(self, state: State, action: jax.Array) -> State:
        obs = {k: v for k, v in state.obs.items() if k != "pixels"}
        return self._add_pixels(self.env.step(state.replace(obs=obs), action))

    @jax.named_scope("render")
    def _add_pixels(self, state: State) -> State:
        scene, camera = self.env.scene(state)
        pixels = render(scene, camera, height=self.height, width=self.width)
        return state.replace(obs=state.obs | {"pixels": pixels})


class History(Wrapper):
    """Stacks the last K frames of obs['pixels'] and obs['proprio'], oldest first.

    Pixels [..., H, W, 3] become [..., K, H, W, 3] and proprioception [..., P] becomes [..., K, P].
    The first observation of an episode fills all K frames, so that nothing of the previous episode
    remains. The wrapper therefore goes outside `AutoReset`, whose `info['was_reset']` it reads, and
    outside `Pixels`.

    Args:
      env: Environment to wrap.
      frames: Number K of frames, at least 1.
    """

    AXES = {"pixels": -4, "proprio": -2}

    def __init__(self, env: Env, *, frames: int):
        super().__init__(env)
        if frames < 1:
            raise ValueError(f"frames={frames} must be at least 1.")
        self.frames = frames

    @property
    def observation_size(self) -> dict[str, Any]:
        size = dict(self.env.observation_size)
        return size | {k: (self.frames, *size[k]) for k in self.AXES if k in size}

    def reset(self, rng: jax.Array) -> State:
        state = self.env.reset(rng)
        return state.replace(obs=state.obs | self._fill(state.obs))

    def step(self, state: State, action: jax.Array) -> State:
        axes = {k: axis for k, axis in self.AXES.items() if k in state.obs}
        old = {k: state.obs[k] for k in axes}
        last = {k: jnp.take(x, -1, axis=axes[k]) for k, x in old.items()}
        state = self.env.step(state.replace(obs=state.obs | last), action)
        filled, frames = self._fill(state.obs), {}
        for k, axis in axes.items():
            previous = jax.lax.slice_in_dim(old[k], 1, None, axis=axis)
            newest = jnp.expand_dims(state.obs[k], axis)
            frames[k] = jnp.concatenate([previous, newest], axis)
        if "was_reset" in state.info:
            frames = where(state.info["was_reset"] > 0, filled, frames)
        return state.replace(obs=state.obs | frames)

    def _fill(self, obs: dict[str, Any]) -> dict[str, jax.Array]:
        """Returns the entries with an axis of K frames, all equal to the frame in `obs`."""
        return {
            k: jnp.repeat(jnp.expand_dims(obs[k], axis), self.frames, axis)
            for k, axis in self.AXES.items()
            if k in obs
        }
