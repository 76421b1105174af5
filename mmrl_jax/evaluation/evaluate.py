"""Evaluation of a policy: whole episodes, each counted once, and modalities hidden in turn."""

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

Modality = Literal["pixels", "instruction", "proprio"]
MODALITIES: tuple[Modality, ...] = ("pixels", "instruction", "proprio")


@struct.dataclass
class Episodes:
    """One finished episode an environment, float32 [N] each.

    Attributes:
      success: the environment's success metric at the episode's last step; None if it has none.
      episode_return: sum of rewards.
      length: steps.
    """

    success: jax.Array | None
    episode_return: jax.Array
    length: jax.Array


def start(env: Env, rng: jax.Array, *, episodes: int, first: jax.Array | int = 0) -> State:
    """N = `episodes` environments at the start of an episode, from the `first` on.

    The i-th of all does not depend on how many there are.
    """
    numbers = first + jnp.arange(episodes)
    return env.reset(jax.vmap(jax.random.fold_in, (None, 0))(rng, numbers))


def evaluate(env: Env, state: State, policy: PolicyFunction, rng: jax.Array) -> Episodes:
    """Runs environments side by side from the start of an episode, each until that ends.

    An episode whose environment breaks has no success, and the return and length until then.

    Args:
      env: batched, as `envs.create` makes it.
      state: of N environments, see `start`; of any split, for all of them step alike.
      policy: see `rollouts.unroll`.
      rng: key of the policy.
    """
    _, batch = unroll(env, state, policy, rng, env.episode_length)
    done = batch.terminated + batch.truncated
    # No end before step t, and until then not a step that only reset: the environment broke there.
    before = jnp.cumsum(done, axis=0) - done + jnp.cumsum(1 - batch.valid, axis=0)
    running = (before == 0).astype(jnp.float32)
    success = batch.metrics.get("success")
    return Episodes(
        success=None if success is None else jnp.sum(success * done * running, axis=0),
        episode_return=jnp.sum(batch.reward * running, axis=0),
        length=jnp.sum(running, axis=0),
    )


class Evaluator:
    """Evaluates policies of one kind on the splits of an environment, each on the same episodes.

    A split decides what `reset` draws and nothing else, and what a policy is made of is data: one
    compiled program serves all policies, splits and hidden modalities. The environments that step
    together are split over the devices; those that fill up the last ones are not counted.

    Args:
      make_env: split -> batched environment.
      policy: what a policy is made of -> policy function; a learner, say.
      rng: key of the episodes and of the policy.
      episodes: N.
      mesh: whose devices share the work.
      together: the most environments that step at once; None: all.
    """

    def __init__(
        self,
        make_env: Callable[[str], Env],
        policy: Callable[[Any], PolicyFunction],
        rng: jax.Array,
        *,
        episodes: int,
        mesh: Mesh | None = None,
        together: int | None = None,
    ):
        self._make_env, self._policy, self._episodes = make_env, policy, episodes
        self._mesh = mesh or mesh_lib.make_mesh(1)
        self._size = chunk_size(
            episodes, together or episodes, devices=mesh_lib.batch_shards(self._mesh)
        )
        self._start_key, self._policy_key = jax.random.split(rng)
        self._starts: dict[str, Any] = {}
        self._run: Any = None

    def __call__(self, variables: Any, split: str, hidden: Modality | None = None) -> Episodes:
        """Runs the policy on `split`; see `hide` for `hidden`. Returns numpy arrays."""
        if split not in self._starts:
            env = self._make_env(split)
            self._starts[split] = jax.jit(functools.partial(start, env, episodes=self._size))
            self._run = self._run or jax.jit(functools.partial(self._evaluate, env))
        index = jnp.int32(-1 if hidden is None else MODALITIES.index(hidden))
        found = []
        for first in range(0, self._episodes, self._size):
            state = self._starts[split](self._start_key, first=first)
            count = min(self._size, self._episodes - first)
            if hidden is not None:
                _check_hideable(state, hidden, count)
            episodes = self._run(state, variables, self._policy_key, index, jnp.int32(count))
            found.append(jax.device_get(episodes))
        return jax.tree.map(lambda *x: np.concatenate(x)[: self._episodes], *found)

    def _evaluate(
        self,
        env: Env,
        state: State,
        variables: Any,
        rng: jax.Array,
        hidden: jax.Array,
        count: jax.Array,
    ) -> Episodes:
        # XLA replicates arrays without elements, whatever is asked for.
        state = jax.tree.map(
            lambda x: mesh_lib.constrain_batch(x, mesh=self._mesh) if x.size else x, state
        )
        policy = self._policy(variables)
        if self._size > 1:
            for i, modality in enumerate(MODALITIES):
                if modality in state.obs:
                    policy = hide(policy, modality, hidden == i, count)
        return evaluate(env, state, policy, rng)


def describe(episodes: Episodes) -> dict[str, float]:
    """Mean 'success' (where the environment has it), 'return' and 'length' of episodes.

    Of the first two also the ends '<name>_lo' and '<name>_hi' of the 95 % bootstrap interval; NaN
    where an episode's number is not finite.
    """
    described = {}
    for name, values in (("success", episodes.success), ("return", episodes.episode_return)):
        if values is None:
            continue
        interval = (float(np.mean(values)), np.nan, np.nan)
        if np.isfinite(values).all():
            interval = statistics.bootstrap_interval(
                np.asarray(values), confidence=0.95, resamples=10_000, seed=0
            )
        described |= dict(zip((name, f"{name}_lo", f"{name}_hi"), interval, strict=True))
    return described | {"length": float(np.mean(episodes.length))}


def describe_ablations(
    evaluator: Evaluator, variables: Any, split: str, modalities: Collection[str]
) -> dict[str, float]:
    """Returns `describe` of a policy, and of the same with modalities shuffled in turn.

    Args:
      evaluator: Of policies of this kind.
      variables: What the policy acts with.
      split: Of the environment.
      modalities: Those to be shuffled, of MODALITIES; their metrics are named
        'shuffled_<modality>/<metric>'.
    """
    described = describe(evaluator(variables, split))
    for modality in MODALITIES:
        if modality in modalities:
            shuffled = describe(evaluator(variables, split, modality))
            described |= {f"shuffled_{modality}/{name}": x for name, x in shuffled.items()}
    return described


def hide(
    policy: PolicyFunction,
    modality: Modality,
    when: jax.Array | bool = True,
    count: jax.Array | None = None,
) -> PolicyFunction:
    """The policy, given another environment's input for one modality.

    A real input of another episode hides the right one without leaving the distribution of
    inputs, as a blank picture would.

    Args:
      policy: see `rollouts.unroll`.
      modality: the one to hide.
      when: bool [], may be traced: one compiled program then serves with and without.
      count: int32 [], the environments that count; they are the first ones, and are given each
        other's input. None: all.

    Raises:
      ValueError: the observation has no such modality, or the batch no other environment.
    """

    def blind(state: State, rng: jax.Array) -> ActorOutput:
        environments = state.done.shape[0]
        _check_hideable(state, modality, environments)
        other = (jnp.arange(environments) - 1) % (environments if count is None else count)
        right = state.obs[modality]
        given = jax.tree.map(lambda x: jnp.where(when, x[other], x), right)
        return policy(state.replace(obs=state.obs | {modality: given}), rng)

    return blind


def record_video(
    env: Env,
    policy: PolicyFunction,
    rng: jax.Array,
    *,
    episodes: int,
    height: int,
    width: int,
) -> tuple[State, jax.Array]:
    """Pictures of whole episodes, at another resolution than the policy's.

    Returns:
      The first state [N, ...], and frames uint8 [T + 1, N, H, W, 3]; an episode that has ended
      stands still.
    """
    start_key, policy_key = jax.random.split(rng)
    first = start(env, start_key, episodes=episodes)

    def render_state(state: State) -> jax.Array:
        return render(*env.scene(state), height=height, width=width)

    def step(carry: tuple, t: jax.Array) -> tuple:
        state, frame, over = carry
        decision = policy(state, jax.random.fold_in(policy_key, t))
        state = env.step(state, decision.environment_action)
        frame = jnp.where(over[:, None, None, None], frame, render_state(state))
        return (state, frame, over | (state.done > 0)), frame

    frame = render_state(first)
    carry = (first, frame, jnp.zeros(episodes, bool))
    _, frames = jax.lax.scan(step, carry, jnp.arange(env.episode_length))
    return first, jnp.concatenate([frame[None], frames])


def _check_hideable(state: State, modality: Modality, count: int) -> None:
    if modality not in state.obs:
        raise ValueError(f"modality={modality!r} is none of {sorted(state.obs)}.")
    if count < 2:
        raise ValueError(
            f"{modality!r} cannot be hidden in a batch of 1, which has no other environment's "
            f"input: evaluate at least 2 episodes."
        )
