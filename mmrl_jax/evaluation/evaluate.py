"""Evaluation of a control policy on complete episodes, and with one modality shuffled at a time."""

from collections.abc import Callable, Collection
import functools
from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.chunks import chunk_size
from mmrl_jax.rendering import render
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction, unroll
from mmrl_jax.types import Transition

Modality = Literal["pixels", "instruction", "proprio"]
MODALITIES: tuple[Modality, ...] = ("pixels", "instruction", "proprio")


@struct.dataclass
class Episodes:
    """Results of one finished episode in each of N environments.

    Attributes:
      success: Success metric of the environment at the last step of the episode, float32 [N]. None
        if the environment has no success metric.
      episode_return: Sum of the rewards of the episode, float32 [N].
      length: Number of steps of the episode, float32 [N].
    """

    success: jax.Array | None
    episode_return: jax.Array
    length: jax.Array


def start(env: Env, rng: jax.Array, *, episodes: int, first: jax.Array | int = 0) -> State:
    """Resets N = `episodes` environments, whose episodes are numbered from `first` on.

    The initial state of an episode depends on `rng` and its number, but not on how many episodes
    there are.

    Args:
      env: Batched environment.
      rng: PRNG key of all episodes.
      episodes: Number of environments N.
      first: Number of the first episode.

    Returns:
      Initial states, with leaves [N, ...].
    """
    numbers = first + jnp.arange(episodes)
    return env.reset(jax.vmap(jax.random.fold_in, (None, 0))(rng, numbers))


def evaluate(env: Env, state: State, policy: PolicyFunction, rng: jax.Array) -> Episodes:
    """Runs one episode in each of N environments in parallel, from its start to its end.

    If the state of an environment becomes non-finite, its episode counts as no success, with the
    return and length up to that step.

    Args:
      env: Batched environment, as `envs.create` makes it.
      state: Initial states of N environments, see `start`. They may be of any split, because all
        splits have the same dynamics.
      policy: Policy function, see `rollouts.unroll`.
      rng: PRNG key for sampling actions.
    """
    return results(unroll(env, state, policy, rng, env.episode_length)[1])


def results(batch: Transition) -> Episodes:
    """Returns the results of the first episode of each of N environments.

    Args:
      batch: Transitions [T, N, ...] from the start of the episodes to their end, see `evaluate`.
    """
    done = batch.terminated + batch.truncated
    # A step counts if no episode has ended before it, and no step so far was invalid: an invalid
    # step resets an environment whose state became non-finite.
    before = jnp.cumsum(done, axis=0) - done + jnp.cumsum(1 - batch.valid, axis=0)
    running = (before == 0).astype(jnp.float32)
    success = batch.metrics.get("success")
    return Episodes(
        success=None if success is None else jnp.sum(success * done * running, axis=0),
        episode_return=jnp.sum(batch.reward * running, axis=0),
        length=jnp.sum(running, axis=0),
    )


class Evaluator:
    """Evaluates policies with one network on splits of an environment, always on the same episodes.

    A split affects only what `reset` samples, and the variables of a policy are an argument, so
    that one compiled program serves all variables, splits and shuffled modalities. The environments
    of a batch are split over the devices. Environments that pad the last batch are not counted.

    Args:
      make_env: Returns the batched environment of a split by its name.
      policy: Returns the policy function for given variables, for example those of a learner.
      rng: PRNG key of the episodes and of the sampled actions.
      episodes: Number of episodes N in each split.
      mesh: Device mesh over which the environments are split; None uses one device.
      max_batch: Maximum number of environments that step in parallel; None for all N.
    """

    def __init__(
        self,
        make_env: Callable[[str], Env],
        policy: Callable[[Any], PolicyFunction],
        rng: jax.Array,
        *,
        episodes: int,
        mesh: Mesh | None = None,
        max_batch: int | None = None,
    ):
        self._make_env, self._policy, self._episodes = make_env, policy, episodes
        self._mesh = mesh or mesh_lib.make_mesh(1)
        self._size = chunk_size(
            episodes, max_batch or episodes, devices=mesh_lib.batch_shards(self._mesh)
        )
        self._start_key, self._policy_key = jax.random.split(rng)
        self._starts: dict[str, Any] = {}
        self._run: Any = None

    def __call__(self, variables: Any, split: str, shuffled: Modality | None = None) -> Episodes:
        """Evaluates a policy on one split.

        Args:
          variables: Variables of the policy.
          split: Name of the split.
          shuffled: Modality that is replaced by that of another environment, see
            `shuffle_modality`; None to shuffle nothing.

        Returns:
          The results of all episodes, as numpy arrays [N].
        """
        if split not in self._starts:
            env = self._make_env(split)
            self._starts[split] = jax.jit(functools.partial(start, env, episodes=self._size))
            self._run = self._run or jax.jit(functools.partial(self._evaluate, env))
        index = jnp.int32(-1 if shuffled is None else MODALITIES.index(shuffled))
        batches = []
        for first in range(0, self._episodes, self._size):
            state = self._starts[split](self._start_key, first=first)
            state = mesh_lib.put(state, mesh_lib.env_shardings(state, self._mesh))
            count = min(self._size, self._episodes - first)
            if shuffled is not None:
                _check_shuffleable(state, shuffled, count)
            episodes = self._run(state, variables, self._policy_key, index, jnp.int32(count))
            batches.append(mesh_lib.get(episodes))
        return jax.tree.map(lambda *x: np.concatenate(x)[: self._episodes], *batches)

    def _evaluate(
        self,
        env: Env,
        state: State,
        variables: Any,
        rng: jax.Array,
        shuffled: jax.Array,
        count: jax.Array,
    ) -> Episodes:
        # XLA replicates arrays without elements and rejects a constraint on them.
        state = jax.tree.map(
            lambda x: mesh_lib.constrain_batch(x, mesh=self._mesh) if x.size else x, state
        )
        policy = self._policy(variables)
        if self._size > 1:
            for i, modality in enumerate(MODALITIES):
                if modality in state.obs:
                    policy = shuffle_modality(policy, modality, shuffled == i, count)
        return evaluate(env, state, policy, rng)


def describe(episodes: Episodes) -> dict[str, float]:
    """Returns the mean 'success' (if the environment has it), 'return' and 'length' of episodes.

    '<name>_lo' and '<name>_hi' are the bounds of the 95 % interval: for success the Wilson score
    interval, for the return a bootstrap interval. They are NaN if the value of any episode is not
    finite.
    """
    described = {}
    for name, values in (("success", episodes.success), ("return", episodes.episode_return)):
        if values is None:
            continue
        interval = (float(np.mean(values)), np.nan, np.nan)
        if np.isfinite(values).all():
            values = np.asarray(values)
            # An environment may also report a success between 0 and 1.
            interval = (
                statistics.rate_interval(values, confidence=0.95)
                if name == "success" and np.isin(values, (0.0, 1.0)).all()
                else statistics.bootstrap_interval(
                    values, confidence=0.95, resamples=10_000, seed=0
                )
            )
        described |= dict(zip((name, f"{name}_lo", f"{name}_hi"), interval, strict=True))
    return described | {"length": float(np.mean(episodes.length))}


def describe_ablations(
    evaluator: Evaluator, variables: Any, split: str, modalities: Collection[str]
) -> dict[str, float]:
    """Evaluates a policy, and evaluates it again with each of the given modalities shuffled.

    Args:
      evaluator: Evaluator of the policy.
      variables: Variables of the policy.
      split: Name of the split.
      modalities: Modalities to shuffle, a subset of MODALITIES.

    Returns:
      The metrics of `describe`, and for each modality 'shuffled_<modality>/<metric>'.
    """
    described = describe(evaluator(variables, split))
    for modality in MODALITIES:
        if modality in modalities:
            shuffled = describe(evaluator(variables, split, modality))
            described |= {f"shuffled_{modality}/{name}": x for name, x in shuffled.items()}
    return described


def shuffle_modality(
    policy: PolicyFunction,
    modality: Modality,
    when: jax.Array | bool = True,
    count: jax.Array | None = None,
) -> PolicyFunction:
    """Wraps a policy so that one modality of its observation comes from another environment.

    An input from another episode removes the information of the modality but stays in the
    distribution of inputs, which a blank image would not.

    Args:
      policy: Policy function, see `rollouts.unroll`.
      modality: Modality of the observation that is shuffled.
      when: Whether to shuffle, bool []. It may be traced, so that one compiled program serves both
        cases.
      count: Number of environments, int32 [], among which the modality is exchanged. They are the
        first of the batch. None for the whole batch.

    Raises:
      ValueError: If the observation has no such modality, or the batch has only one environment.
    """

    def shuffled_policy(state: State, rng: jax.Array) -> ActorOutput:
        environments = state.done.shape[0]
        _check_shuffleable(state, modality, environments)
        other = (jnp.arange(environments) - 1) % (environments if count is None else count)
        inputs = jax.tree.map(lambda x: jnp.where(when, x[other], x), state.obs[modality])
        return policy(state.replace(obs=state.obs | {modality: inputs}), rng)

    return shuffled_policy


def record_video(
    env: Env,
    policy: PolicyFunction,
    rng: jax.Array,
    *,
    episodes: int,
    height: int,
    width: int,
) -> tuple[State, jax.Array]:
    """Records videos of complete episodes, whose resolution may differ from the policy's input.

    Args:
      env: Batched environment with a `scene`.
      policy: Policy function, see `rollouts.unroll`.
      rng: PRNG key of the episodes and of the sampled actions.
      episodes: Number of episodes N.
      height: Height H of the frames in pixels.
      width: Width W of the frames in pixels.

    Returns:
      The initial states [N, ...], and frames uint8 [T + 1, N, H, W, 3]. After the end of an
      episode, its last frame is repeated.
    """
    start_key, policy_key = jax.random.split(rng)
    first = start(env, start_key, episodes=episodes)

    def render_frame(state: State) -> jax.Array:
        return render(*env.scene(state), height=height, width=width)

    def step(carry: tuple, t: jax.Array) -> tuple:
        state, frame, ended = carry
        output = policy(state, jax.random.fold_in(policy_key, t))
        state = env.step(state, output.environment_action)
        frame = jnp.where(ended[:, None, None, None], frame, render_frame(state))
        return (state, frame, ended | (state.done > 0)), frame

    frame = render_frame(first)
    carry = (first, frame, jnp.zeros(episodes, bool))
    _, frames = jax.lax.scan(step, carry, jnp.arange(env.episode_length))
    return first, jnp.concatenate([frame[None], frames])


def _check_shuffleable(state: State, modality: Modality, count: int) -> None:
    if modality not in state.obs:
        raise ValueError(f"modality={modality!r} is not one of {sorted(state.obs)}.")
    if count < 2:
        raise ValueError(
            f"{modality!r} cannot be shuffled in a batch of 1, which has no other environment: "
            f"evaluate at least 2 episodes."
        )
