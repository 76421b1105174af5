"""Evaluation of a policy: whole episodes, each counted once, and modalities hidden in turn."""

from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.evaluation import statistics
from mmrl_jax.rendering import render
from mmrl_jax.rollouts.unroll import Decision, PolicyFunction, unroll

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


def evaluate(env: Env, policy: PolicyFunction, rng: jax.Array, *, episodes: int) -> Episodes:
    """Runs N = `episodes` environments side by side, each until its first episode ends.

    Args:
      env: batched, as `envs.create` makes it.
      policy: see `rollouts.unroll`.
      rng: key; environment i starts from fold_in(rng, i) whatever the number of episodes.
      episodes: N.
    """
    start_key, policy_key = jax.random.split(rng)
    _, batch = unroll(
        env, env.reset(_keys(start_key, episodes)), policy, policy_key, env.episode_length
    )
    done = batch.terminated + batch.truncated
    before = jnp.cumsum(done, axis=0) - done  # Ends before step t.
    running = (before == 0).astype(jnp.float32)
    success = batch.metrics.get("success")
    return Episodes(
        success=None if success is None else jnp.sum(success * done * running, axis=0),
        episode_return=jnp.sum(batch.reward * running, axis=0),
        length=jnp.sum(running, axis=0),
    )


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


def hide(
    policy: PolicyFunction, modality: Modality, when: jax.Array | bool = True
) -> PolicyFunction:
    """The policy, given another environment's input for one modality.

    A real input of another episode hides the right one without leaving the distribution of
    inputs, as a blank picture would.

    Args:
      policy: see `rollouts.unroll`.
      modality: the one to hide.
      when: bool [], may be traced: one compiled program then serves with and without.

    Raises:
      ValueError: the observation has no such modality, or the batch no other environment.
    """

    def blind(state: State, rng: jax.Array) -> Decision:
        if modality not in state.obs:
            raise ValueError(f"modality={modality!r} is none of {sorted(state.obs)}.")
        right = state.obs[modality]
        if jax.tree.leaves(right)[0].shape[0] < 2:
            raise ValueError(
                f"{modality!r} cannot be hidden in a batch of 1, which has no other environment's "
                f"input: evaluate at least 2 episodes."
            )
        given = jax.tree.map(lambda x: jnp.where(when, jnp.roll(x, 1, axis=0), x), right)
        return policy(state.replace(obs=state.obs | {modality: given}), rng)

    return blind


def film(
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
    first = env.reset(_keys(start_key, episodes))

    def picture(state: State) -> jax.Array:
        return render(*env.scene(state), height=height, width=width)

    def step(carry: tuple, t: jax.Array) -> tuple:
        state, frame, over = carry
        decision = policy(state, jax.random.fold_in(policy_key, t))
        state = env.step(state, decision.environment_action)
        frame = jnp.where(over[:, None, None, None], frame, picture(state))
        return (state, frame, over | (state.done > 0)), frame

    start = picture(first)
    carry = (first, start, jnp.zeros(episodes, bool))
    _, frames = jax.lax.scan(step, carry, jnp.arange(env.episode_length))
    return first, jnp.concatenate([start[None], frames])


def _keys(rng: jax.Array, episodes: int) -> jax.Array:
    """Keys [N, 2] of N environments; the i-th does not depend on N."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(episodes))
