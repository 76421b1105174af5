"""Tests of `deep_sea` by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.envs.deep_sea import DeepSea

N = 5


def dive(right, batch=1):
    """Returns the states of an episode whose step t goes to the right if right[t]."""
    env = envs.create("deep_sea", split="train", height=0, width=0, history=1, size=N)
    core = envs.unwrapped(env)
    state = jax.jit(env.reset)(jax.random.split(jax.random.key(0), batch))
    step, states = jax.jit(env.step), [state]
    for go in right:
        row, column = (int(state.info[name][0]) for name in ("row", "column"))
        correct = int(core.right[row, column])
        state = step(state, jnp.full(batch, correct if go else 1 - correct))
        states.append(state)
    return states


def test_only_steps_to_the_right_find_the_treasure():
    states = dive([True] * N)
    assert [float(s.done[0]) for s in states[1:]] == [0, 0, 0, 0, 1]
    # A step to the right costs 0.01 / 5 = 0.002, and the treasure is worth 1.
    rewards = [float(s.reward[0]) for s in states[1:]]
    assert rewards == pytest.approx([-0.002] * 4 + [0.998])
    assert float(states[-1].metrics["success"][0]) == 1
    assert float(states[-1].info["truncation"][0]) == 0


@pytest.mark.parametrize("miss", range(N))
def test_one_step_to_the_left_misses_it(miss):
    states = dive([t != miss for t in range(N)])
    rewards = [float(s.reward[0]) for s in states[1:]]
    assert rewards == pytest.approx([0.0 if t == miss else -0.002 for t in range(N)])
    assert float(states[-1].done[0]) == 1 and float(states[-1].metrics["success"][0]) == 0


def test_the_observation_is_the_cell():
    # Right to column 1, left to column 0, left at the edge, right to column 1.
    cells = [int(np.argmax(s.obs["proprio"][0])) for s in dive([True, False, False, True])]
    assert cells == [0, 1 * N + 1, 2 * N + 0, 3 * N + 0, 4 * N + 1]
    assert float(dive([])[0].obs["proprio"].sum()) == 1


def test_the_actions_differ_from_cell_to_cell_and_from_seed_to_seed():
    assert 0.3 < DeepSea(20).right.mean() < 0.7
    assert (DeepSea(20).right == DeepSea(20).right).all()
    assert (DeepSea(20).right != DeepSea(20, mapping_seed=1).right).any()
    for size in (1, 101, 2.5):
        with pytest.raises(ValueError, match="size="):
            DeepSea(size)
