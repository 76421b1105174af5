"""Exact Shapley values of a few named players, for example the modalities of an observation.

A coalition is the set of players whose true input the policy receives; the other players' inputs
come from another episode at the same time step, so that they stay in the distribution of inputs.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.interpretability.targets import Value
from mmrl_jax.types import Observation

MAX_PLAYERS = 8  # With more players, 2^n coalitions no longer fit into one batch.


def coalitions(players: int) -> np.ndarray:
    """Returns all coalitions of n players, bool [2^n, n]; coalition i has the bits of i.

    Raises:
      ValueError: If there is no player, or there are more than MAX_PLAYERS.
    """
    if not 1 <= players <= MAX_PLAYERS:
        raise ValueError(
            f"players={players}, but exact Shapley values need 1 to {MAX_PLAYERS} players: join "
            "some of them."
        )
    return (np.arange(2**players)[:, None] >> np.arange(players)) % 2 == 1


def shapley_values(values: jax.Array) -> jax.Array:
    """Returns the Shapley values of all players (Shapley, 1953).

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * [v(S + i) - v(S)]

    They sum to v(all) - v(none).

    Args:
      values: Value v of each coalition in the order of `coalitions`, float32 [2^n, ...].

    Returns:
      float32 [n, ...].
    """
    n = _players(values)
    weights = np.zeros((n, 2**n), np.float64)
    for s, row in enumerate(coalitions(n)):
        size = int(row.sum())
        for i in range(n):
            if row[i]:
                weights[i, s] = math.factorial(size - 1) * math.factorial(n - size)
            else:
                weights[i, s] = -math.factorial(size) * math.factorial(n - size - 1)
    return _combine(weights / math.factorial(n), values)


def interactions(values: jax.Array) -> jax.Array:
    """Returns the Shapley interaction index of all pairs (Grabisch and Roubens, 1999).

    I_ij = sum over S without i and j of |S|! (n - |S| - 2)! / (n - 1)!
           * [v(S + i + j) - v(S + i) - v(S + j) + v(S)]

    It is above 0 for players that are worth more together (synergy), and below 0 for players that
    say the same (redundancy).

    Args:
      values: Value v of each coalition in the order of `coalitions`, float32 [2^n, ...].

    Returns:
      float32 [n, n, ...], symmetric, with 0 on the diagonal.
    """
    n = _players(values)
    weights = np.zeros((n, n, 2**n), np.float64)
    for s, row in enumerate(coalitions(n)):
        for i in range(n):
            for j in range(n):
                if i != j:
                    rest = int(row.sum()) - int(row[i]) - int(row[j])
                    sign = 1 if row[i] == row[j] else -1
                    weights[i, j, s] = sign * (math.factorial(rest) * math.factorial(n - rest - 2))
    return _combine(weights / math.factorial(n - 1), values)


def shares(phi: jax.Array) -> jax.Array:
    """Returns the share of each player, mean |phi_i| / sum over players, float32 [n].

    This is the measure of MM-SHAP (Parcalabescu and Frank, 2023), with modalities as players.

    Args:
      phi: Shapley values of n players in B samples, float32 [n, B].

    Returns:
      Shares that sum to 1, or zeros if all Shapley values are 0.
    """
    size = jnp.mean(jnp.abs(phi), axis=1)
    total = jnp.sum(size)
    return jnp.where(total > 0, size / jnp.where(total > 0, total, 1.0), 0.0)


def coalition_values(
    value: Value, mix: Callable[[jax.Array], Any], players: int, samples: int
) -> jax.Array:
    """Returns the values of all coalitions, which are evaluated in one batch, float32 [2^n, B].

    Args:
      value: Function of inputs [2^n * B, ...].
      mix: Returns the inputs [B, ...] of a coalition, bool [n].
      players: Number n of players.
      samples: Number B of samples.
    """
    inputs = jax.vmap(mix)(jnp.asarray(coalitions(players)))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inputs)
    return value(flat).reshape(2**players, samples)


class Players(NamedTuple):
    """The n players of an observation.

    Attributes:
      names: Name of each player.
      mix: Function (observation, background, keep) -> observation, all [B, ...]. The players that
        are not kept, bool [n], come from the background.
    """

    names: tuple[str, ...]
    mix: Callable[[Observation, Observation, jax.Array], Observation]


def modality_players(names: Sequence[str]) -> Players:
    """Returns the entries of an observation as players."""

    def mix(observation: Observation, background: Observation, keep: jax.Array) -> Observation:
        mixed = dict(observation)
        for i, name in enumerate(names):
            mixed[name] = jax.tree.map(
                lambda x, b, i=i: jnp.where(keep[i], x, b), observation[name], background[name]
            )
        return mixed

    return Players(tuple(names), mix)


def frame_players(frames: int) -> Players:
    """Returns the K frames of a history as players, frame 0 being the oldest.

    A frame has its pixels [B, K, H, W, 3] and its proprioception [B, K, P].
    """

    def mix(observation: Observation, background: Observation, keep: jax.Array) -> Observation:
        mixed = dict(observation)
        for name in ("pixels", "proprio"):
            x = observation[name]
            kept = keep.reshape(-1, *[1] * (x.ndim - 2))
            mixed[name] = jnp.where(kept, x, background[name])
        return mixed

    return Players(tuple(f"frame {i}" for i in range(frames)), mix)


def check_backgrounds(episodes: int, backgrounds: int) -> None:
    """Checks that each episode has enough other episodes as backgrounds.

    Raises:
      ValueError: If it has not.
    """
    if not 1 <= backgrounds < episodes:
        raise ValueError(
            f"backgrounds={backgrounds} with {episodes} episodes: backgrounds are other episodes, "
            f"so that there can be 1 to {episodes - 1}. Use more episodes or fewer backgrounds."
        )


def other_episodes(tree: Any, shift: jax.Array | int) -> Any:
    """Returns the same time steps of other episodes: episode n becomes episode (n + shift) mod N.

    Args:
      tree: Arrays of N episodes, [T, N, ...].
      shift: Distance to the other episode, 1 to N - 1, int32 []. It may be traced.
    """
    return jax.tree.map(lambda x: jnp.roll(x, -shift, axis=1), tree)


def _players(values: jax.Array) -> int:
    n = values.shape[0].bit_length() - 1
    if values.shape[0] != 2**n:
        raise ValueError(f"values have {values.shape[0]} coalitions, which is no power of two.")
    return n


def _combine(weights: np.ndarray, values: jax.Array) -> jax.Array:
    return jnp.tensordot(jnp.asarray(weights, jnp.float32), values.astype(jnp.float32), axes=1)
