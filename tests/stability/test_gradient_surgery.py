"""PCGrad and CAGrad: vectors by hand, a solver of scipy, and the toy problem of CAGrad's paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from mmrl_jax.stability import gradient_surgery

KEY = jax.random.key(0)


def pcgrad(gradients, key=KEY):
    weights_of = functools.partial(gradient_surgery.pcgrad_weights, rng=key)
    return gradient_surgery.weighted_sum(gradients, weights_of)


def cagrad(gradients, c):
    weights_of = functools.partial(gradient_surgery.cagrad_weights, c=c)
    return gradient_surgery.weighted_sum(gradients, weights_of)


def test_pcgrad_of_two_vectors_by_hand():
    # <a, b> = -1 with |a|^2 = 1 and |b|^2 = 2. Without their components along each other they are
    # a + b / 2 = (1/2, 1/2) and b + a = (0, 1); the sum is (1/2, 3/2).
    gradients = {"x": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
    total, conflict = pcgrad(gradients)
    np.testing.assert_allclose(total["x"], [0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(conflict.norms, [1, np.sqrt(2)], rtol=1e-6)
    expected = [[1, -np.sqrt(0.5)], [-np.sqrt(0.5), 1]]
    np.testing.assert_allclose(conflict.cosines, expected, rtol=1e-6)


def test_pcgrad_of_three_vectors_follows_a_random_order():
    a, b, c = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])

    def without(x, *others):
        for y in others:
            x = x - min(x @ y, 0) / (y @ y) * y
        return x

    orders = [
        without(a, *first) + without(b, *second) + without(c, *third)
        for first in ((b, c), (c, b))
        for second in ((a, c), (c, a))
        for third in ((a, b), (b, a))
    ]
    gradients = {"x": jnp.asarray(np.stack([a, b, c]), jnp.float32)}
    found = np.stack([pcgrad(gradients, jax.random.key(i))[0]["x"] for i in range(40)])
    distance = np.abs(found[:, None] - np.stack(orders)).max(-1)
    assert distance.min(1).max() < 1e-5
    # Every distinct result occurs.
    assert (distance.min(0) < 1e-5).all()


def test_without_a_conflict_pcgrad_is_the_sum():
    gradients = {"x": jnp.array([[1.0, 0.3], [0.2, 1.7], [0.0, 0.4]]), "y": jnp.ones((3, 2, 2))}
    total, conflict = pcgrad(gradients)
    for name, x in gradients.items():
        np.testing.assert_allclose(total[name], x.sum(0), rtol=1e-6)
    assert (conflict.cosines > 0).all()


def test_cagrad_of_two_vectors_by_hand():
    # Equally long ones: by symmetry both weights are 1/2, so that the direction is that of the sum
    # and its length (1 + c) / (1 + c) of it.
    symmetric = {"x": jnp.array([[1.0, 2.0], [1.0, -2.0]])}
    np.testing.assert_allclose(cagrad(symmetric, 0.5)[0]["x"], [2, 0], atol=1e-6)
    # a = (1, 0), b = (-3, 0), g_0 = (-1, 0): all of the weight on a, which loses by g_0, gives
    # d = g_0 + c a = (-1 + c, 0), times 2 / (1 + c).
    opposite = {"x": jnp.array([[1.0, 0.0], [-3.0, 0.0]])}
    np.testing.assert_allclose(cagrad(opposite, 0.25)[0]["x"], [-2 * 0.75 / 1.25, 0], atol=1e-6)


@pytest.mark.parametrize("surgery", [pcgrad, functools.partial(cagrad, c=0.0)])
def test_a_single_loss_and_a_radius_of_0_change_nothing(surgery):
    rng = np.random.default_rng(0)
    gradients = {"x": jnp.asarray(rng.normal(size=(1, 5)), jnp.float32)}
    np.testing.assert_allclose(surgery(gradients)[0]["x"], gradients["x"][0], rtol=1e-6)
    if surgery is not pcgrad:
        gradients = {"x": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
        total = np.asarray(gradients["x"]).sum(0)
        np.testing.assert_allclose(surgery(gradients)[0]["x"], total, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_cagrad_solves_its_dual_problem(seed):
    rng, c = np.random.default_rng(seed), 0.4
    g = rng.normal(size=(4, 6)) * [[1.0], [5.0], [0.3], [1.0]]
    g[3] = -g[1] + 0.1 * g[3]
    mean = g.mean(0)
    radius = c * np.linalg.norm(mean)

    def dual(w):
        return w @ g @ mean + radius * np.linalg.norm(w @ g)

    solution = minimize(
        dual, np.full(4, 0.25), bounds=[(0, 1)] * 4, tol=1e-12,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    worst = solution.x @ g
    expected = 4 * (mean + radius * worst / np.linalg.norm(worst)) / (1 + c)
    total, _ = cagrad({"x": jnp.asarray(g, jnp.float32)}, c)
    np.testing.assert_allclose(total["x"], expected, rtol=2e-2, atol=2e-2)
    # The primal problem: no other direction of the ball improves the worst loss by more. Gradients
    # of norm 5 nearly cancel, which costs digits of float32.
    best = (g @ np.asarray(total["x"]) * (1 + c) / 4).min()
    assert best == pytest.approx(dual(solution.x), rel=1e-3, abs=1e-3)


def two(ratio, angle):
    return [[1, 0], [ratio * np.cos(angle), ratio * np.sin(angle)]]


@pytest.mark.parametrize(
    "gradients",
    [
        two(1e4, 1.2),
        two(1e4, 1.6),
        two(1e5, 2.5),
        [[1, 0, 0], [-30, 95, 0], [-4e3, 5e3, 8e3]],
        [[1, 0, 0], [-6e3, 8e3, 0], [-4e3, -5e3, 8e3]],
        [[1, 0], [-1, 0.01]],  # They nearly cancel.
        [[1, 0, 0], [-1, 0.01, 0], [0.1, 0, 0.1]],
    ],
)
def test_cagrad_improves_the_worst_part_by_as_much_as_possible(gradients):
    # No direction of the ball improves the worst part by more than the dual objective at any
    # weights, which is minimized here in float64 over the logarithms of the weights.
    g, c = np.asarray(gradients, np.float64), 0.4
    mean, norms = g.mean(0), np.linalg.norm(g, axis=1)
    radius = c * np.linalg.norm(mean)

    def dual(z):
        w = np.exp(z - z.max()) / norms
        mixed = w @ g / w.sum()
        return mixed @ mean + radius * np.linalg.norm(mixed)

    starts = np.concatenate([np.zeros((1, len(g))), 3 * np.eye(len(g)), -3 * np.eye(len(g))])
    tight = {"xatol": 1e-9, "fatol": 1e-12 * norms.min() ** 2, "maxiter": 10_000}
    best = min(minimize(dual, z, method="Nelder-Mead", options=tight).fun for z in starts)
    weights = gradient_surgery.cagrad_weights(jnp.asarray(g @ g.T, jnp.float32), c)
    direction = np.asarray(weights, np.float64) @ g * (1 + c) / len(g)
    assert np.linalg.norm(direction - mean) <= radius * (1 + 1e-5)
    assert np.min(g @ direction) == pytest.approx(best, rel=1e-3)


def test_what_cancels_but_for_rounding_is_no_direction_of_cagrad():
    total, _ = cagrad({"x": jnp.array([[1.0, 0.0], [-1.0, 1e-5]])}, 0.4)
    assert np.linalg.norm(total["x"]) <= 1e-5


@pytest.mark.parametrize("surgery", [pcgrad, functools.partial(cagrad, c=0.4)])
def test_gradients_that_are_0_and_parameters_of_one_loss(surgery):
    # The second loss has no gradient at all, and the third loss alone has one on 'head'.
    zero = jnp.zeros(2)
    gradients = {
        "trunk": jnp.stack([jnp.array([1.0, 0.0]), zero, jnp.array([-1.0, 1.0])]),
        "head": jnp.stack([zero, zero, jnp.array([30.0, -40.0])]),
    }
    total, conflict = surgery(gradients)
    np.testing.assert_array_equal(total["head"], [30, -40])
    np.testing.assert_allclose(conflict.norms, [1, 0, np.sqrt(2)], rtol=1e-6)
    assert conflict.cosines[0, 1] == 1 and float(conflict.cosines[0, 2]) < 0
    two, _ = surgery({"trunk": gradients["trunk"][jnp.array([0, 2])]})
    direction = two["trunk"] / jnp.linalg.norm(two["trunk"])
    np.testing.assert_allclose(
        total["trunk"] / jnp.linalg.norm(total["trunk"]), direction, atol=1e-5
    )
    none, _ = surgery(jax.tree.map(jnp.zeros_like, gradients))
    assert all((x == 0).all() for x in jax.tree.leaves(none))


def toy_losses(x):
    """The losses of the toy problem of CAGrad's paper (appendix B), [2], at x [2]."""
    x, y = x
    small = 5e-6
    upper = jnp.stack([0.5 * (-x - 7) + jnp.tanh(y), 0.5 * (3 - x) - jnp.tanh(y) + 2])
    upper = jnp.log(jnp.maximum(jnp.abs(upper), small)) + 6
    lower = jnp.stack([(7 - x) ** 2, (-7 - x) ** 2]) + 0.1 * (-y - 8) ** 2
    above, below = jnp.maximum(jnp.tanh(0.5 * y), 0), jnp.maximum(jnp.tanh(-0.5 * y), 0)
    return upper * above + (lower / 10 - 20) * below


def plain(gradients):
    return gradients["x"].sum(0)


METHODS = {
    "sum": plain,
    "pcgrad": lambda gradients: pcgrad(gradients)[0]["x"],
    "cagrad": lambda gradients: cagrad(gradients, 0.5)[0]["x"],
}
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0))
OPTIMUM = -15.092  # Of the mean loss, at (0, -8.36).


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_toy_problem_of_cagrad(method):
    optimizer = optax.adam(1e-3)

    def run(start):
        def step(carry, _):
            x, state = carry
            gradient = METHODS[method]({"x": jax.jacrev(toy_losses)(x)})
            updates, state = optimizer.update(gradient, state)
            return (x + updates, state), None

        (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=100_000)
        return x, jnp.mean(toy_losses(x))

    points, found = jax.device_get(jax.jit(jax.vmap(run))(jnp.array(STARTS)))
    if method == "cagrad":
        np.testing.assert_allclose(found, OPTIMUM, atol=0.005)
        return
    # The valleys of the logarithms, which the first and the third start lead to, have spikes of the
    # gradient: what follows depends on rounding, and has no two decimals. The plain sum is stuck
    # there. PCGrad leaves them, and from all starts ends where no direction improves both losses,
    # between their minima at (7, -8.36) and (-7, -8.36): from the second start at a worse point
    # than the plain sum.
    if method == "sum":
        np.testing.assert_allclose(found[1], OPTIMUM, atol=0.005)
        assert (found[[0, 2]] > 0).all() and (found < 4).all()
    else:
        assert (np.abs(points[:, 0]) < 7).all()
        np.testing.assert_allclose(points[:, 1], -8.36, atol=0.2)
        assert (found > OPTIMUM).all() and found[1] > OPTIMUM + 3 and (found < -10).all()
