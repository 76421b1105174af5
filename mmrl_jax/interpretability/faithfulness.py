"""Tests of explanations: whether they name what the policy in fact depends on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Returns the mean value float32 [B] over backgrounds, where the units that are not kept, bool
# [B, U], come from the backgrounds.
ValueOfKept = Callable[[jax.Array], jax.Array]


class Curves(NamedTuple):
    """Values while the units of a ranking are deleted or inserted, the highest-ranked first.

    Attributes:
      deletion: Value after each step of deletion, float32 [steps + 1, B].
      insertion: Value after each step of insertion, float32 [steps + 1, B].
    """

    deletion: jax.Array
    insertion: jax.Array

    def gain(self) -> jax.Array:
        """Returns the area under insertion minus that under deletion, float32 [B].

        It is in units of the value; the horizontal axis is from 0 to 1. A higher gain is better,
        and a ranking that is better than random has a higher gain than random ones.
        """
        return area(self.insertion) - area(self.deletion)


def area(curve: jax.Array) -> jax.Array:
    """Returns the area under curves [steps + 1, B] over [0, 1], by trapezoids, float32 [B]."""
    return jnp.mean((curve[1:] + curve[:-1]) / 2, axis=0)


def ranks(scores: jax.Array, ranked: jax.Array) -> jax.Array:
    """Returns the rank of each unit, int32 [B, U], 0 for the highest score.

    Args:
      scores: Scores of the units, float32 [B, U].
      ranked: Units that are ranked, bool [B, U]. The others come last.
    """
    order = jnp.argsort(jnp.where(ranked, -scores, jnp.inf), axis=1)
    return jnp.argsort(order, axis=1).astype(jnp.int32)


def curves(value: ValueOfKept, scores: jax.Array, ranked: jax.Array, *, steps: int) -> Curves:
    """Deletes and inserts units in the order of their scores (Petsiuk et al., 2018).

    A deleted unit comes from real backgrounds and not from a blank image. Units that are not ranked
    are always kept.

    Args:
      value: Function of the units that are kept.
      scores: Scores of the units, float32 [B, U].
      ranked: Units that are deleted and inserted, bool [B, U], for example the patches.
      steps: Number of steps from no unit to all of them.
    """
    rank, count = ranks(scores, ranked), jnp.sum(ranked, axis=1, keepdims=True)

    def at(fraction: jax.Array) -> jax.Array:
        first = rank < fraction * count
        return jax.lax.map(value, jnp.stack([~first, first | ~ranked]))

    found = jax.lax.map(at, jnp.arange(steps + 1) / steps)
    return Curves(found[:, 0], found[:, 1])


def randomize(variables: Any, rng: jax.Array, names: Sequence[str]) -> Any:
    """Returns variables whose entries are permuted within each array of some submodules.

    Explanations that stay the same do not depend on what was learned (Adebayo et al., 2018). The
    cascade of that paper randomizes more and more submodules, from the output to the input.

    Args:
      variables: Variables of a network, {'params': ...} by the name of the submodule.
      rng: PRNG key of the permutations.
      names: Names of the submodules whose parameters are permuted.
    """
    params = variables["params"]
    leaves, structure = jax.tree.flatten({name: x for name, x in params.items() if name in names})
    keys = jax.random.split(rng, max(len(leaves), 1))
    permuted = [
        jax.random.permutation(key, x.reshape(-1)).reshape(x.shape)
        for key, x in zip(keys, leaves, strict=False)
    ]
    return {**variables, "params": {**params, **jax.tree.unflatten(structure, permuted)}}


def rank_correlation(a: jax.Array, b: jax.Array, ranked: jax.Array) -> jax.Array:
    """Returns Spearman's rank correlation of two rankings of the same units, float32 [B].

    rho = 1 - 6 sum_u (r_u - s_u)^2 / (n (n^2 - 1))

    Ties are broken by the number of the unit.

    Args:
      a: Scores of the units, float32 [B, U].
      b: Other scores of the units, float32 [B, U].
      ranked: Units that are compared, bool [B, U]; at least two in each sample.
    """
    n = jnp.sum(ranked, axis=1).astype(jnp.float32)
    distance = jnp.where(ranked, (ranks(a, ranked) - ranks(b, ranked)).astype(jnp.float32), 0.0)
    return 1 - 6 * jnp.sum(distance**2, axis=1) / (n * (n**2 - 1))
