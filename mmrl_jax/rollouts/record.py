"""Episodes of policies in an environment of ours, as records for files."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.data.records import Episode, Invalid, Provenance, Quarantine, check, schema_of
from mmrl_jax.envs.brax_api import Env, State
from mmrl_jax.rollouts.unroll import (
    ActorOutput,
    PolicyFunction,
    deterministic_output,
    unroll,
)


class Recorded(NamedTuple):
    """Episodes of one rollout.

    Attributes:
      episodes: Episodes, in the order of their numbers.
      quarantine: Episodes that were set aside, because a number in them is not finite.
    """

    episodes: list[Episode]
    quarantine: Quarantine


class Recorder:
    """Records complete episodes in compiled rollouts, each with one of several policies.

    The initial state of an episode depends on the key and its number alone. Random actions also
    depend on the first number of the rollout and on the number of episodes in it.

    Args:
      env: Batched environment.
      policies: Policies that act, by their names.
      rng: PRNG key of the episodes and of the policies.
      seed: Seed of the key, for the provenance.
      split: Split of the environment, for the provenance.
      history: Number of frames of an observation, of which the newest is recorded.
      default_instruction: Instruction of an environment without instructions.
    """

    def __init__(
        self,
        env: Env,
        policies: dict[str, PolicyFunction],
        rng: jax.Array,
        *,
        seed: int,
        split: str,
        history: int,
        default_instruction: str,
    ):
        self._env, self._names = env, tuple(policies)
        self._seed, self._split, self._history = seed, split, history
        self._instruction = default_instruction
        self._keys = jax.random.split(rng)
        self._run = jax.jit(lambda *x: _rollout(env, tuple(policies.values()), *x))

    def __call__(
        self, numbers: Sequence[int], which: Sequence[int] | np.ndarray, *, keep: int
    ) -> Recorded:
        """Records B episodes.

        Args:
          numbers: Numbers of the B episodes.
          which: Index of the policy of each episode.
          keep: Number of episodes from the front that are returned.
        """
        arrays = self._run(
            self._keys, jnp.asarray(numbers, jnp.int32), jnp.asarray(which, jnp.int32)
        )
        arrays = jax.device_get(arrays)
        episodes: list[Episode] = []
        quarantine = Quarantine()
        for i, number in enumerate(numbers[:keep]):
            try:
                episode = self._episode(arrays, i, int(number), self._names[which[i]])
                check(episode, schema_of(episode))
            except Invalid as error:
                quarantine.add(f"episode {number}", error)
            else:
                episodes.append(episode)
        return Recorded(episodes, quarantine)

    def _episode(self, arrays: dict[str, Any], i: int, number: int, policy: str) -> Episode:
        """Returns the episode of environment i.

        Raises:
          Invalid: If the state of the environment became non-finite.
        """
        done = arrays["terminated"][:, i] + arrays["truncated"][:, i] > 0
        # The limit of the environment ends episodes; one that it does not end is truncated here.
        actions = int(np.argmax(done)) + 1 if done.any() else len(done)
        if not arrays["valid"][:actions, i].all():
            step = int(np.argmin(arrays["valid"][:actions, i]))
            raise Invalid(
                "non-finite observation",
                f"the state of the environment is not finite after step {step}.",
            )
        steps = actions + 1
        observation = jax.tree.map(lambda x: x[:steps, i], arrays["observation"])
        tokens = observation.pop("instruction", None)
        if self._history > 1:
            observation = {name: x[:, -1] for name, x in observation.items()}
        has_action = np.arange(steps) < actions
        terminal = bool(arrays["terminated"][actions - 1, i] > 0)
        reward = np.zeros(steps, np.float32)
        reward[:actions] = arrays["reward"][:actions, i]
        action = np.zeros((steps, *arrays["action"].shape[2:]), arrays["action"].dtype)
        action[:actions] = arrays["action"][:actions, i]
        last = np.arange(steps) == actions
        success = arrays["success"]
        return Episode(
            observation=observation,
            action=action,
            reward=reward,
            discount=np.where(terminal & (np.arange(steps) >= actions - 1), 0, 1).astype(
                np.float32
            ),
            is_first=np.arange(steps) == 0,
            is_last=last,
            is_terminal=last & terminal,
            language_instruction=self._texts(tokens, steps),
            privileged={name: x[:steps, i] for name, x in arrays["privileged"].items()},
            final_observation=True,
            provenance=Provenance(
                policy=policy,
                seed=self._seed,
                split=self._split,
                number=number,
                episode_return=float(np.sum(reward[has_action], dtype=np.float64)),
                success=math.nan if success is None else float(success[actions - 1, i] > 0),
            ),
        )

    def _texts(self, tokens: dict[str, np.ndarray] | None, steps: int) -> list[str]:
        if tokens is None:
            return [self._instruction] * steps
        decode: Callable[[np.ndarray], str] = self._env.vocabulary.decode
        return [decode(row) for row in tokens["tokens"]]


def _rollout(
    env: Env,
    policies: Sequence[PolicyFunction],
    keys: jax.Array,
    numbers: jax.Array,
    which: jax.Array,
) -> dict[str, Any]:
    """Runs B environments for the longest episode, and returns arrays [T, B, ...] by name.

    Those of 'observation' and 'privileged' are [T + 1, B, ...].
    """

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        outputs = [
            act(state, jax.random.fold_in(rng, i)).environment_action
            for i, act in enumerate(policies)
        ]
        return deterministic_output(jnp.stack(outputs)[which, jnp.arange(len(which))])

    state = env.reset(jax.vmap(jax.random.fold_in, (None, 0))(keys[0], numbers))
    rng = jax.random.fold_in(keys[1], numbers[0])
    last, batch = unroll(env, state, policy, rng, env.episode_length)

    def with_last(x: Any, end: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), x, end)

    return {
        "observation": with_last(batch.observation, last.obs),
        "privileged": with_last(batch.privileged, last.info["privileged"]),
        "action": batch.action,
        "reward": batch.reward,
        "terminated": batch.terminated,
        "truncated": batch.truncated,
        "valid": batch.valid,
        "success": batch.metrics.get("success"),
    }


def random_policy(kind: str, size: int) -> PolicyFunction:
    """Returns a policy of uniformly random actions.

    Args:
      kind: Kind of the actions, 'continuous' or 'discrete'.
      size: Number of dimensions, or of discrete actions.
    """

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        count = state.done.shape[0]
        if kind == "discrete":
            return deterministic_output(jax.random.randint(rng, (count,), 0, size))
        return deterministic_output(jax.random.uniform(rng, (count, size), minval=-1.0, maxval=1.0))

    return policy


def with_noise(policy: PolicyFunction, noise: float, kind: str, size: int) -> PolicyFunction:
    """Returns a policy with noisy actions.

    Args:
      policy: Policy function.
      noise: Standard deviation of Gaussian noise on continuous actions, which are then clipped to
        [-1, 1]; or probability of a random action instead of a discrete one.
      kind: Kind of the actions, 'continuous' or 'discrete'.
      size: Number of dimensions, or of discrete actions.
    """
    random = random_policy(kind, size)

    def noisy(state: State, rng: jax.Array) -> ActorOutput:
        act_key, noise_key, random_key = jax.random.split(rng, 3)
        action = policy(state, act_key).environment_action
        if kind == "discrete":
            replaced = jax.random.bernoulli(noise_key, noise, action.shape)
            other = random(state, random_key).environment_action
            return deterministic_output(jnp.where(replaced, other, action))
        noisy = action + noise * jax.random.normal(noise_key, action.shape)
        return deterministic_output(jnp.clip(noisy, -1.0, 1.0))

    return noisy
