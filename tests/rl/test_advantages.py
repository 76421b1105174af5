"""Tests of mmrl_jax.rl.advantages by hand, by a loop over episodes, and with Brax's GAE."""

from brax.training.agents.ppo.losses import compute_gae
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.rl import advantages

DISCOUNT, LAMBDA = 0.9, 0.7


def as_floats(*arrays):
    names = ("reward", "value", "last_value", "terminated", "truncated")
    return {name: jnp.asarray(x, jnp.float32) for name, x in zip(names, arrays, strict=True)}


def estimate(reward, value, last_value, terminated, truncated, discount=DISCOUNT, lambda_=LAMBDA):
    arrays = as_floats(reward, value, last_value, terminated, truncated)
    advantage, target = advantages.generalized_advantages(
        **arrays, discount=discount, lambda_=lambda_
    )
    return np.asarray(advantage), np.asarray(target)


def slow_column(reward, value, last_value, terminated, truncated, valid):
    """Returns the advantages of one environment as double sums per episode; NaN where invalid."""
    values = np.append(value, last_value)
    result = np.full(len(reward), np.nan)
    start = 0
    while start < len(reward):
        if not valid[start]:
            start += 1
            continue
        end = start
        while end < len(reward) - 1 and not (terminated[end] or truncated[end]):
            end += 1
        # The state after the last step: the next observation, which is the final state of this
        # episode even where the next step only resets; worth nothing after a termination.
        states = [*values[start : end + 1], 0.0 if terminated[end] else values[end + 1]]
        for t in range(start, end + 1):
            result[t] = sum(
                (DISCOUNT * LAMBDA) ** (k - t)
                * (reward[k] + DISCOUNT * states[k - start + 1] - states[k - start])
                for k in range(t, end + 1)
            )
        start = end + 1
    return result


def an_end_at_every_position(steps):
    """[T, 2T + 1]: column p terminates at step p, T + p is truncated there, the last goes on."""
    rng = np.random.default_rng(0)
    shape = (steps, 2 * steps + 1)
    reward, value = rng.normal(size=shape), rng.normal(size=shape)
    terminated, truncated, valid = np.zeros(shape), np.zeros(shape), np.ones(shape)
    for p in range(steps):
        terminated[p, p] = truncated[p, steps + p] = 1
        if p + 1 < steps:
            valid[p + 1, [p, steps + p]] = 0
    reward[valid == 0] = 0
    return reward, value, rng.normal(size=shape[1]), terminated, truncated, valid


def test_by_hand():
    # discount = lambda = 0.5, r = 1 2 3, v = 1 2 4, v_3 = 8.
    # No end: delta = 1 + 1 - 1 = 1, 2 + 2 - 2 = 2, 3 + 4 - 4 = 3;
    #   A_2 = 3, A_1 = 2 + 0.25 * 3 = 2.75, A_0 = 1 + 0.25 * 2.75 = 1.6875.
    # Terminated at 1: delta_1 = 2 - 2 = 0: A_1 = 0, A_0 = 1.
    # Truncated at 1: delta_1 = 2 still reads v_2 = 4: A_1 = 2, A_0 = 1 + 0.25 * 2 = 1.5.
    terminated, truncated = np.zeros((3, 3)), np.zeros((3, 3))
    terminated[1, 1] = truncated[1, 2] = 1
    same = np.ones(3)
    advantage, target = estimate(
        np.outer([1, 2, 3], same),
        np.outer([1, 2, 4], same),
        8 * same,
        terminated,
        truncated,
        discount=0.5,
        lambda_=0.5,
    )
    np.testing.assert_array_equal(advantage[:, 0], [1.6875, 2.75, 3])
    np.testing.assert_array_equal(advantage[:, 1], [1, 0, 3])
    np.testing.assert_array_equal(advantage[:, 2], [1.5, 2, 3])
    np.testing.assert_array_equal(target[:, 0], [2.6875, 4.75, 7])


def test_an_end_at_every_position_is_as_in_the_slow_loop():
    arguments = an_end_at_every_position(steps=6)
    *arrays, valid = arguments
    advantage, target = estimate(*arrays)
    expected = np.stack(
        [slow_column(*(x[..., b] for x in arguments)) for b in range(valid.shape[1])], axis=1
    )
    np.testing.assert_allclose(advantage[valid == 1], expected[valid == 1], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(expected), valid == 0)
    np.testing.assert_allclose(target, advantage + arrays[1], rtol=1e-6, atol=1e-6)


def test_several_ends_in_one_unroll_are_as_in_the_slow_loop():
    rng = np.random.default_rng(1)
    shape = (20, 30)
    reward, value = rng.normal(size=shape), rng.normal(size=shape)
    terminated, truncated, valid = np.zeros(shape), np.zeros(shape), np.ones(shape)
    for b in range(shape[1]):
        for t in range(shape[0]):
            if t and (terminated[t - 1, b] or truncated[t - 1, b]):
                valid[t, b] = 0
            elif rng.random() < 0.3:
                (terminated if rng.random() < 0.5 else truncated)[t, b] = 1
    arrays = (reward, value, rng.normal(size=shape[1]), terminated, truncated, valid)
    advantage, _ = estimate(*arrays[:-1])
    expected = np.stack(
        [slow_column(*(x[..., b] for x in arrays)) for b in range(shape[1])], axis=1
    )
    np.testing.assert_allclose(advantage[valid == 1], expected[valid == 1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reset_at", range(1, 6))
def test_a_reset_step_influences_only_the_bootstrap_of_its_own_truncated_episode(reset_at):
    steps = 6
    reward, value, last_value, terminated, truncated, valid = an_end_at_every_position(steps)
    before, _ = estimate(reward, value, last_value, terminated, truncated)
    columns = [reset_at - 1, steps + reset_at - 1]  # Terminated, and truncated, the step before.
    assert not valid[reset_at, columns].any()

    other_reward = reward.copy()
    other_reward[reset_at, columns] += 100
    after, _ = estimate(other_reward, value, last_value, terminated, truncated)
    np.testing.assert_array_equal(after[valid == 1], before[valid == 1])

    # The observation of the reset step is the final state of the old episode: its value is the
    # bootstrap of the step before if that was truncated, and nothing to anyone else.
    other_value = value.copy()
    other_value[reset_at, columns] += 1
    after, _ = estimate(reward, other_value, last_value, terminated, truncated)
    change = np.where(valid == 1, after - before, 0)
    expected = np.zeros_like(change)
    for t in range(reset_at):
        expected[t, columns[1]] = DISCOUNT * (DISCOUNT * LAMBDA) ** (reset_at - 1 - t)
    np.testing.assert_allclose(change, expected, atol=1e-6)
    np.testing.assert_array_equal(change[:, columns[0]], 0)


def test_with_lambda_1_the_target_is_the_bootstrapped_return_and_with_0_one_step():
    rng = np.random.default_rng(2)
    reward, value, last_value = rng.normal(size=(5, 1)), rng.normal(size=(5, 1)), np.array([2.0])
    nothing = np.zeros((5, 1))
    _, target = estimate(reward, value, last_value, nothing, nothing, lambda_=1.0)
    for t in range(5):
        expected = sum(DISCOUNT ** (k - t) * reward[k, 0] for k in range(t, 5))
        expected += DISCOUNT ** (5 - t) * last_value[0]
        np.testing.assert_allclose(target[t, 0], expected, rtol=1e-5)
    _, target = estimate(reward, value, last_value, nothing, nothing, lambda_=0.0)
    np.testing.assert_allclose(
        target[:, 0], reward[:, 0] + DISCOUNT * np.append(value[1:, 0], last_value), rtol=1e-5
    )


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_equals_brax_without_truncation(lambda_):
    # Brax masks truncated steps out instead of bootstrapping them; elsewhere its value targets are
    # ours, and its advantage is r + discount * target_{t+1} - v.
    rng = np.random.default_rng(3)
    shape = (10, 16)
    reward, value, last_value = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=16)
    terminated, nothing = (rng.random(shape) < 0.2).astype(np.float32), np.zeros(shape)
    advantage, target = estimate(reward, value, last_value, terminated, nothing, lambda_=lambda_)
    brax_target, brax_advantage = compute_gae(
        truncation=jnp.asarray(nothing, jnp.float32),
        termination=jnp.asarray(terminated),
        rewards=jnp.asarray(reward, jnp.float32),
        values=jnp.asarray(value, jnp.float32),
        bootstrap_value=jnp.asarray(last_value, jnp.float32),
        lambda_=lambda_,
        discount=DISCOUNT,
    )
    np.testing.assert_allclose(target, brax_target, rtol=1e-5, atol=1e-5)
    ours = advantages.return_advantages(
        **as_floats(reward, value, last_value, terminated, nothing),
        target=jnp.asarray(target),
        discount=DISCOUNT,
    )
    np.testing.assert_allclose(ours, brax_advantage, rtol=1e-5, atol=1e-5)
    if lambda_ == 1.0:
        np.testing.assert_allclose(advantage, brax_advantage, rtol=1e-5, atol=1e-5)


def test_return_advantages_by_hand():
    # v = 1 2 3, v_T = 4, r = 1, discount 0.5, lambda 0.5, G_t = A_t + v_t.
    # G_2 = 1 + 2 = 3; G_1 = 2 + (0.5 + 0.25 * (3 - 3)) = 2.5; A_1 = 1 + 0.5 * G_2 - 2 = 0.5.
    # A_0: 1 + 0.5 * 2.5 - 1 = 1.25; truncated at 0: 1 + 0.5 * 2 - 1 = 1; terminated there: 0.
    reward, value, last_value = np.ones((3, 3)), np.outer([1.0, 2, 3], np.ones(3)), np.full(3, 4.0)
    terminated, truncated = np.zeros((3, 3)), np.zeros((3, 3))
    truncated[0, 1] = terminated[0, 2] = 1
    steps = as_floats(reward, value, last_value, terminated, truncated)
    _, target = advantages.generalized_advantages(**steps, discount=0.5, lambda_=0.5)
    found = advantages.return_advantages(**steps, target=target, discount=0.5)
    np.testing.assert_allclose(found, [[1.25, 1, 0], [0.5] * 3, [0.0] * 3], atol=1e-6)


def test_nothing_that_follows_an_end_needs_to_be_a_number():
    reward, value = np.ones((3, 1)), np.array([[1.0], [2.0], [np.nan]])
    terminated, truncated = np.array([[0.0], [1.0], [0.0]]), np.zeros((3, 1))
    advantage, _ = estimate(reward, value, np.ones(1), terminated, truncated)
    # delta_1 = 1 - 2, delta_0 = 1 + 0.9 * 2 - 1; A_0 = 1.8 + 0.63 * -1.
    np.testing.assert_allclose(advantage[:2, 0], [1.17, -1.0], rtol=1e-5)


def test_bootstrapped_returns_by_hand():
    # discount 0.5, r = 1 2 4. No end: 1 + 1 + 1, 2 + 2, 4, and the value behind the third step by
    # 1/8, 1/4, 1/2. An end at 1: 1 + 1, 2, 4; the value behind the second step counts if a limit
    # truncated the episode, by 1/4 and 1/2, and not if it terminated.
    terminated, truncated = np.zeros((3, 3)), np.zeros((3, 3))
    terminated[1, 1] = truncated[1, 2] = 1
    returns, weight, step = advantages.bootstrapped_returns(
        reward=jnp.outer(jnp.array([1.0, 2.0, 4.0]), jnp.ones(3)),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        discount=0.5,
    )
    np.testing.assert_array_equal(returns, [[3, 2, 2], [4, 2, 2], [4, 4, 4]])
    np.testing.assert_array_equal(weight, [[0.125, 0, 0.25], [0.25, 0, 0.5], [0.5] * 3])
    np.testing.assert_array_equal(step, [[3, 2, 2], [3, 2, 2], [3, 3, 3]])


def token_estimate(reward, value, last_value, mask, terminated, truncated, discount, lambda_):
    arrays = as_floats(reward, value, last_value, terminated, truncated)
    advantage, target = advantages.token_advantages(
        **arrays, mask=jnp.asarray(mask), discount=discount, lambda_=lambda_
    )
    return np.asarray(advantage), np.asarray(target)


def test_turns_of_one_token_are_steps():
    reward, value, last_value, terminated, truncated, _ = an_end_at_every_position(5)
    mask = np.ones((*value.shape, 1), bool)
    found = token_estimate(
        reward, value[..., None], last_value, mask, terminated, truncated, DISCOUNT, LAMBDA
    )
    expected = estimate(reward, value, last_value, terminated, truncated)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[..., 0], b, atol=1e-6)


def test_absent_tokens_are_passed_over():
    # Undiscounted, the tokens that are there are the steps of one episode.
    rng = np.random.default_rng(1)
    length = np.array([2, 1, 3])
    mask = np.arange(3) < length[:, None]
    value, reward = rng.normal(size=(3, 3)), rng.normal(size=3)
    at_last = np.where(np.arange(3) == length[:, None] - 1, reward[:, None], 0.0)
    steps = [x[mask][:, None] for x in (at_last, value)]
    zeros = np.zeros((6, 1))
    expected, targets = estimate(*steps, np.array([0.4]), zeros, zeros, 1.0, LAMBDA)
    value[~mask] = np.nan
    advantage, target = token_estimate(
        reward[:, None], value[:, None], np.array([0.4]), mask[:, None],
        np.zeros((3, 1)), np.zeros((3, 1)), 1.0, LAMBDA,
    )  # fmt: skip
    np.testing.assert_allclose(advantage[:, 0][mask], expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(target[:, 0][mask], targets[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    "terminated, truncated, last_of_first",
    [
        (0, 0, 1 + 0.9 * 0.3 - 0.2 + 0.9 * 0.5 * (2 + 0.9 * 0.7 - 0.3)),
        (0, 1, 1 + 0.9 * 0.3 - 0.2),  # The value of the state that it was cut at counts.
        (1, 0, 1 - 0.2),
    ],
)
def test_a_turn_ends_with_its_last_token(terminated, truncated, last_of_first):
    # Two tokens of values 0.1 and 0.2 and a reward of 1, then one of 0.3 and a reward of 2.
    advantage, _ = token_estimate(
        [[1.0], [2.0]], [[[0.1, 0.2]], [[0.3, 9.0]]], [0.7], [[[True, True]], [[True, False]]],
        [[terminated], [0]], [[truncated], [0]], 0.9, 0.5,
    )  # fmt: skip
    np.testing.assert_allclose(advantage[0, 0, 1], last_of_first, rtol=1e-6)
    first = 0.2 - 0.1 + 0.5 * last_of_first  # Neither discounted nor ended between the tokens.
    np.testing.assert_allclose(advantage[0, 0, 0], first, rtol=1e-6)


def test_what_broke_is_cut_before_it():
    terminated, truncated, valid = np.array(
        [[[1.0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]]]
    )
    found = advantages.truncation_mask(*map(jnp.asarray, (terminated, truncated, valid)))
    np.testing.assert_array_equal(found, [[0, 1, 1], [0, 0, 0]])
