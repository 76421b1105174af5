"""Tests of group advantages by hand, by brute force, and with TRL's formulas."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import nanstd

from mmrl_jax.rl import group_advantages as ga
from mmrl_jax.rl.overlong import soft_overlong_penalty

REWARD = jnp.array([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [1.0, 0.5, 0.0, 0.5]])
ALL = jnp.ones((3, 4))


def test_by_hand():
    # Row 0: mean 1/4; std with n - 1: sqrt((9 + 3) / 16 / 3) = 1/2. Row 1: all equal.
    np.testing.assert_allclose(ga.centered(REWARD, ALL)[0], [0.75, -0.25, -0.25, -0.25])
    first = np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)
    np.testing.assert_allclose(ga.standardized(REWARD, ALL)[0], first, rtol=1e-6)
    # The others of the first have 0, those of the second 1/3.
    np.testing.assert_allclose(
        ga.leave_one_out(REWARD, ALL)[0], [1.0, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6
    )
    for estimator in (ga.centered, ga.standardized, ga.leave_one_out):
        np.testing.assert_array_equal(estimator(REWARD, ALL)[1], np.zeros(4))
    np.testing.assert_array_equal(ga.degenerate(REWARD, ALL), [False, True, False])


def test_the_whole_batch_has_one_scale():
    advantage = np.asarray(ga.batch_standardized(REWARD, ALL))
    centered = np.asarray(ga.centered(REWARD, ALL))
    np.testing.assert_allclose(advantage, centered / (centered.std(ddof=1) + 1e-4), rtol=1e-5)


@pytest.mark.parametrize("missing", [False, True])
def test_equal_trl(missing):
    """The formulas are those of `_generate_and_score_completions` of the GRPO and RLOO trainers."""
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(5, 4)).astype(np.float32)
    scored = np.ones((5, 4), np.float32)
    if missing:
        scored[0, 1] = scored[3, 0] = scored[3, 2] = 0
    theirs = torch.tensor(np.where(scored > 0, reward, np.nan))
    mean = torch.nanmean(theirs, dim=1, keepdim=True)
    grpo = (theirs - mean) / (nanstd(theirs, dim=1)[:, None] + 1e-4)
    there = torch.tensor(scored).sum(1, keepdim=True)
    others = (torch.nansum(theirs, 1, keepdim=True) - theirs) / (there - 1)
    ours = jnp.asarray(np.where(scored > 0, reward, 1e9))  # Whatever an error has left there.
    for estimator, expected in ((ga.standardized, grpo), (ga.leave_one_out, theirs - others)):
        np.testing.assert_allclose(
            estimator(ours, jnp.asarray(scored)),
            torch.nan_to_num(expected, nan=0.0).numpy(),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("answers", "right", "k", "good", "bad"),
    [(8, 2, 4, 0.5222, -0.1741), (16, 1, 4, 1.7321, -0.1155), (8, 7, 4, 0.0, 0.0)],
)
def test_pass_at_k_has_the_published_values(answers, right, k, good, bad):
    reward = jnp.asarray([[1.0] * right + [0.0] * (answers - right)])
    advantage = ga.pass_at_k(reward, jnp.ones_like(reward), k=k)[0]
    np.testing.assert_allclose(advantage[:right], good, atol=1e-4)
    np.testing.assert_allclose(advantage[right:], bad, atol=1e-4)


@pytest.mark.parametrize(("answers", "right", "k"), [(6, 2, 3), (5, 1, 2), (4, 3, 1), (6, 2, 4)])
def test_pass_at_k_is_the_mean_over_all_sets(answers, right, k):
    reward = np.array([1.0] * right + [0.0] * (answers - right))
    sets = list(itertools.combinations(range(answers), k))
    value = np.array([max(reward[list(s)]) for s in sets])
    standard = (value - value.mean()) / value.std()
    expected = [
        np.mean([v for s, v in zip(sets, standard, strict=True) if i in s]) for i in range(answers)
    ]
    advantage = ga.pass_at_k(jnp.asarray(reward)[None], jnp.ones((1, answers)), k=k)[0]
    np.testing.assert_allclose(advantage, expected, atol=1e-5)


def test_pass_at_1_is_the_standard_score():
    reward = jnp.array([[1.0, 0.0, 0.0, 1.0, 0.0]])
    advantage = ga.pass_at_k(reward, jnp.ones_like(reward), k=1)
    np.testing.assert_allclose(advantage, (reward - reward.mean()) / reward.std(), atol=1e-5)


def test_pass_at_k_is_of_the_scored_answers_alone():
    reward = jnp.array([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 9.0, 9.0]])
    scored = jnp.array([[1.0] * 6 + [0.0] * 2])
    advantage = ga.pass_at_k(reward, scored, k=3)
    np.testing.assert_allclose(
        advantage[:, :6], ga.pass_at_k(reward[:, :6], scored[:, :6], k=3), atol=1e-6
    )
    assert not np.any(advantage[:, 6:]) and np.any(advantage[:, :6])


@pytest.mark.parametrize("estimator", ga.ESTIMATORS.values(), ids=ga.ESTIMATORS)
@pytest.mark.parametrize("value", [0.1, 1000.1])
def test_equal_rewards_are_exactly_0(estimator, value):
    reward = jnp.full((2, 7), value)
    np.testing.assert_array_equal(estimator(reward, jnp.ones_like(reward)), 0 * reward)


def test_k_has_to_fit():
    with pytest.raises(ValueError, match=r"k=5 is not in \[1, 4\]"):
        ga.pass_at_k(REWARD, ALL, k=5)


@pytest.mark.parametrize("estimator", ga.ESTIMATORS.values(), ids=ga.ESTIMATORS)
def test_what_is_not_scored_has_no_part(estimator):
    scored = ALL.at[0, 3].set(0)
    one = estimator(REWARD, scored)
    other = estimator(REWARD.at[0, 3].set(jnp.nan), scored)
    np.testing.assert_array_equal(one, other)
    assert one[0, 3] == 0 and np.isfinite(one).all()
    np.testing.assert_array_equal(estimator(REWARD, 0 * ALL), 0 * ALL)
    assert np.asarray(ga.degenerate(REWARD.at[0, 0].set(jnp.nan), ALL.at[0, 0].set(0)))[0]


def test_a_completion_that_comes_close_to_the_limit_loses_reward():
    length = jnp.array([1, 16, 17, 18, 20, 21])
    # Of 20 tokens the last 4 cost 1/4 each.
    expected = np.array([0, 0, -0.25, -0.5, -1, -1], np.float32)
    found = soft_overlong_penalty(length, max_length=20, buffer=4)
    np.testing.assert_array_equal(found, expected)
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=4)
    np.testing.assert_array_equal(found, theirs([[1] * int(n) for n in length]))
