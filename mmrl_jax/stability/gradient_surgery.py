"""Conflicts between the gradients of several losses, and two ways to resolve them.

    gradients g_1 .. g_K -> inner products <g_i, g_j> [K, K] -> weights w [K] -> sum_k w_k g_k

The gradients conflict where a step along one raises the loss of another: where their inner product
is negative. Both methods replace the sum of the gradients by a weighted one, whose weights depend
on the inner products alone. They need K backward passes and K gradients in memory.

Gradients are pytrees with leaves [K, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# CAGrad passes over all pairs of gradients until no weight moves by more, or this many times. Of
# two gradients the first pass is exact but for rounding, which the others reduce. Of more, most
# need few passes, nearly opposite ones up to 100.
_TOLERANCE, _MAX_SWEEPS, _SWEEPS_OF_TWO = 1e-6, 200, 3
# Smallest squared norm of a weighted mean of gradients in CAGrad, over the sum of the absolute
# values of its terms. What cancels to less is a rounding error of float32, and has no direction.
_MIN_SQUARE = 1e-6


# Weights, how far the last pass moved them, and the number of passes.
_Progress = tuple[jax.Array, jax.Array, jax.Array]


class Conflict(NamedTuple):
    """How much K gradients conflict.

    Attributes:
      cosines: Cosines of the angles between gradients, float32 [K, K]; 1 where one of them is 0.
      norms: Norms of the gradients, float32 [K].
    """

    cosines: jax.Array
    norms: jax.Array


def conflict(products: jax.Array) -> Conflict:
    """Returns how much K gradients conflict, from their inner products, float32 [K, K]."""
    norms = jnp.sqrt(jnp.diagonal(products))
    scale = norms[:, None] * norms
    cosines = jnp.where(scale > 0, products / jnp.where(scale > 0, scale, 1.0), 1.0)
    return Conflict(cosines, norms)


def pcgrad_weights(products: jax.Array, rng: jax.Array) -> jax.Array:
    """Returns the weights of PCGrad, float32 [K] (Yu et al., 2020, arXiv 2001.06782, alg. 1).

    From each gradient g_i, in a random order of the others, its component along each g_j with which
    it then conflicts is removed:

      g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j   if <g_i, g_j> < 0

    and the results are added up. Without a conflict all weights are exactly 1.

    Args:
      products: Inner products of K gradients, float32 [K, K].
      rng: PRNG key of the orders.
    """
    count = len(products)

    def projected(weights: jax.Array, i: jax.Array, key: jax.Array) -> jax.Array:
        def remove(weights: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            product, square = weights @ products[:, j], products[j, j]
            conflicts = (product < 0) & (square > 0) & (i != j)
            part = jnp.where(conflicts, product / jnp.where(conflicts, square, 1.0), 0.0)
            return weights.at[j].add(-part), None

        return jax.lax.scan(remove, weights, jax.random.permutation(key, count))[0]

    keys = jax.random.split(rng, count)
    return jnp.sum(jax.vmap(projected)(jnp.eye(count), jnp.arange(count), keys), axis=0)


def cagrad_weights(products: jax.Array, c: float) -> jax.Array:
    """Returns the weights of CAGrad, float32 [K] (Liu et al., 2021, arXiv 2110.14048, alg. 1).

    With g_0 the mean of the gradients, the direction d with |d - g_0| <= c |g_0| is taken that
    maximizes the smallest <g_k, d>. The dual problem is over weights w on the simplex:

      min_w  <g_w, g_0> + c |g_0| |g_w|,    g_w = sum_k w_k g_k
      d = g_0 + c |g_0| / |g_w| g_w

    The result is K d / (1 + c), which is not longer than the sum of the gradients, and equal to it
    for c = 0. The problem is solved exactly along one pair of weights at a time. Gradients that are
    0 get no weight in g_w: no direction would improve their loss.

    Args:
      products: Inner products of K gradients, float32 [K, K].
      c: Radius of the search, relative to the mean gradient, in [0, 1).
    """
    count = len(products)
    squares = jnp.diagonal(products)
    total = jnp.sum(squares)
    products = products / jnp.where(total > 0, total, 1.0)
    with_mean = jnp.mean(products, axis=1)  # <g_k, g_0>
    radius = c * jnp.sqrt(jnp.maximum(jnp.mean(with_mean), 0.0))
    usable = (squares > 0).astype(jnp.float32)
    pairs = jnp.asarray(np.array(np.triu_indices(count, 1)).T, jnp.int32)

    def improve(weights: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        """Moves t of the weight of j to i, where the objective is minimal.

        It is slope * t + radius * sqrt(a t^2 + 2 b t + |g_w|^2).
        """
        i, j = pair
        of_mean = products @ weights  # <g_k, g_w>
        a = products[i, i] + products[j, j] - 2 * products[i, j]
        b = of_mean[i] - of_mean[j]
        slope = with_mean[i] - with_mean[j]
        safe = jnp.where(a > 0, a, 1.0)
        rest = jnp.maximum(weights @ of_mean - b**2 / safe, 0.0)
        curved = radius**2 * a - slope**2
        inner = jnp.sqrt(rest / (safe * jnp.where(curved > 0, curved, 1.0)))
        t = jnp.where(curved > 0, -slope * inner - b / safe, -jnp.sign(slope))
        t = jnp.clip(t, -weights[i], weights[j]) * usable[i] * usable[j] * (a > 0)
        return weights.at[i].add(t).at[j].add(-t), None

    def sweep(carry: _Progress) -> _Progress:
        weights, _, sweeps = carry
        new = jax.lax.scan(improve, weights, pairs)[0]
        return new, jnp.max(jnp.abs(new - weights)), sweeps + 1

    def moves(carry: _Progress) -> jax.Array:
        limit = _SWEEPS_OF_TWO if count == 2 else _MAX_SWEEPS
        return (carry[1] > _TOLERANCE) & (carry[2] < limit)

    start = usable / jnp.maximum(jnp.sum(usable), 1.0)
    weights, _, _ = jax.lax.while_loop(moves, sweep, (start, jnp.float32(1), jnp.int32(0)))
    # The optimum is often near the smallest gradient, so that the terms are far below 1.
    terms = jnp.maximum(weights @ jnp.abs(products) @ weights, jnp.finfo(jnp.float32).tiny)
    norm = jnp.sqrt(jnp.maximum(weights @ products @ weights, _MIN_SQUARE * terms))
    return (1 + count * radius / norm * weights) / (1 + c)


def weighted_sum(
    gradients: Any, weights_of: Callable[[jax.Array], jax.Array]
) -> tuple[Any, Conflict]:
    """Returns the weighted sum of K gradients on the parameters that they share.

    A parameter array is shared if the gradients of at least two losses are not 0 on it. Conflicts
    can only be on shared ones; the others, such as the last layers of actor and critic, keep the
    sum of their gradients, and do not enter the inner products.

    Args:
      gradients: Pytree with leaves [K, ...].
      weights_of: Function of inner products [K, K] that returns weights [K], for example
        `pcgrad_weights`.

    Returns:
      The gradient, a pytree with leaves [...], and the conflict on the shared parameters.
    """
    products = _shared_products(gradients)
    with jax.default_matmul_precision("highest"):  # By default TPUs multiply in bfloat16.
        weights = weights_of(products)

    def summed(x: jax.Array) -> jax.Array:
        chosen = jnp.where(_is_shared(x), weights, 1.0)
        return jnp.tensordot(chosen.astype(x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(summed, gradients), conflict(products)


def shared_conflict(gradients: Any) -> Conflict:
    """Returns the conflict of K gradients on the parameters that they share, see `weighted_sum`."""
    return conflict(_shared_products(gradients))


def _shared_products(gradients: Any) -> jax.Array:
    def products(x: jax.Array) -> jax.Array:
        return jnp.where(_is_shared(x), _leaf_products(x), 0.0)

    return sum((products(x) for x in jax.tree.leaves(gradients)), jnp.zeros(()))


def _is_shared(x: jax.Array) -> jax.Array:
    used = jnp.any(x != 0, axis=tuple(range(1, x.ndim)))
    return jnp.sum(used) >= 2


def _leaf_products(x: jax.Array) -> jax.Array:
    x, axes = x.astype(jnp.float32), list(range(1, x.ndim))
    return jnp.tensordot(x, x, (axes, axes), precision=jax.lax.Precision.HIGHEST)
