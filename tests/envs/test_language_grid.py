"""Tests of the grid: splits, moves, ends, observations, the expert, and actions as text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.envs import language_grid as grid
from mmrl_jax.rollouts.text_actions import text_actions


def started(split="train", count=256, **options):
    env = grid.LanguageGrid(split=split, **options)
    keys = jax.random.split(jax.random.key(0), count)
    return env, jax.jit(jax.vmap(env.reset))(keys)


def cells(place, rows=4):
    return np.asarray(place)[..., 0] * rows + np.asarray(place)[..., 1]


@pytest.mark.parametrize("split", grid.SPLITS)
def test_a_split_differs_in_one_respect(split):
    _, state = started(split, 400)
    pairs = np.asarray(state.info["pairs"])
    named = pairs[:, 0]
    assert grid.HELDOUT_PAIR[named].all() == (split == "heldout_pair")
    assert not grid.HELDOUT_PAIR[pairs[:, 1:]].any()
    first, goal = cells(state.info["agent"]), cells(state.info["places"])[:, 0]
    held_out = (first + 3 * goal) % 5 == 0
    assert held_out.all() == (split == "heldout_layout") and held_out.any() == held_out.all()
    expected = grid.HELDOUT_PAIR.sum() if split == "heldout_pair" else (~grid.HELDOUT_PAIR).sum()
    assert len(np.unique(named)) == expected


def test_neither_color_nor_shape_alone_decides():
    _, state = started()
    color, shape = np.divmod(np.asarray(state.info["pairs"]), len(grid.SHAPES))
    assert (color[:, 1] == color[:, 0]).all() and (shape[:, 1] != shape[:, 0]).all()
    assert (shape[:, 2] == shape[:, 0]).all() and (color[:, 2] != color[:, 0]).all()
    everything = np.concatenate(
        [cells(state.info["places"]), cells(state.info["agent"])[:, None]], 1
    )
    assert all(len(set(row)) == grid.OBJECTS + 1 for row in everything)


def test_moves_and_ends_by_hand():
    env, state = started(count=1, episode_length=3)
    state = jax.tree.map(lambda x: x[0], state)
    info = state.info | {
        "agent": jnp.array([0, 0]),
        "places": jnp.array([[1, 1], [0, 2], [3, 3], [3, 2]]),
    }
    state = state.replace(info=info)

    def walk(*moves):
        now = state
        for move in moves:
            now = env.step(now, jnp.asarray(grid.MOVES.index(move)))
        ends = (float(now.reward), float(now.done), float(now.info["truncation"]))
        return now.info["agent"].tolist(), *ends, float(now.metrics["success"])

    assert walk("up") == ([0, 0], 0, 0, 0, 0)  # There is nothing beyond the edge.
    assert walk("down", "right") == ([1, 1], 1, 1, 0, 1)
    assert walk("right", "right") == ([0, 2], 0, 1, 0, 0)  # Another object: an end, no truncation.
    assert walk("stay", "down", "stay") == ([1, 0], 0, 1, 1, 0)
    assert walk("stay", "down", "right") == ([1, 1], 1, 1, 0, 1)  # At the last moment.


def test_the_picture_shows_where_things_are():
    env = envs.create("language_grid", split="train", height=32, width=32, history=1)
    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(1), 32))
    pixels = np.asarray(state.obs["pixels"])[:, 4::8, 4::8].astype(int)  # The middles of the cells.
    for i in range(32):
        shown = {tuple(c) for c in np.argwhere(pixels[i].max(-1) - pixels[i].min(-1) > 60)}
        assert shown == {tuple(c) for c in np.asarray(state.info["places"][i])}
        row, column = np.asarray(state.info["agent"][i])
        assert pixels[i, row, column].min() > 200
        color = np.asarray(state.info["pairs"][i]) // len(grid.SHAPES)
        seen = pixels[i][tuple(np.asarray(state.info["places"][i]).T)] / 255
        nearest = np.abs(seen[:, None] / seen.max(1)[:, None, None] - grid._RGB).sum(-1).argmin(1)
        np.testing.assert_array_equal(nearest, color)
    target = np.asarray(state.info["privileged"]["target_pixel"]) * 4 - 0.5
    np.testing.assert_allclose(target[:, ::-1], state.info["places"][:, 0], atol=1e-6)


def test_the_expert_arrives():
    env = envs.create("language_grid", split="train", height=0, width=0, history=1)
    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), 256))
    step = jax.jit(lambda s: env.step(s, env.expert(s, None)))
    ended = succeeded = 0.0
    for _ in range(12):
        state = step(state)
        ended += float(state.done.sum())
        succeeded += float((state.done * state.metrics["success"]).sum())
    assert ended > 256 and succeeded / ended > 0.97  # A few grids have no way.


@pytest.mark.parametrize("name", ["language_grid", "language_reach"])
def test_actions_are_written_and_read(name):
    env = envs.create(name, split="train", height=0, width=0, history=1)
    interface = text_actions(env, image_tokens=3)
    actions = jnp.asarray(interface.actions)
    tokens, mask = interface.encode_actions(actions)
    again, invalid = interface.decode_actions(tokens, mask)
    np.testing.assert_array_equal(again, actions)
    assert not invalid.any()
    words = [interface.texts.tokenizer.decode(row) for row in np.asarray(tokens)]
    assert words == list(env.actions_as_text) and words[0].startswith("stay")
    # What is no action does what the first one does, and is told.
    action, invalid = interface.decode_actions(tokens[1:, ::-1], mask[1:])
    assert invalid.all() and (np.asarray(action) == np.asarray(actions[0])).all()


def test_instructions_become_questions():
    env = envs.create("language_grid", split="train", height=16, width=16, history=1)
    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(2), 8))
    interface = text_actions(env, image_tokens=4)
    prompts = interface.make_prompts(state.obs)
    tokenizer = interface.texts.tokenizer
    for i in range(8):
        caption = env.caption(jax.tree.map(lambda x, i=i: x[i], state))
        assert tokenizer.decode(np.asarray(prompts.tokens[i])) == caption
        assert int((prompts.tokens[i] == tokenizer.image).sum()) == 4
    np.testing.assert_array_equal(prompts.images, state.obs["pixels"])


def test_a_nearest_action_stands_for_others():
    env = envs.create("language_reach", split="train", height=0, width=0, history=1)
    interface = text_actions(env, image_tokens=1)
    tokens, _ = interface.encode_actions(jnp.array([[0.9, -0.2], [-0.6, 0.7]]))
    words = [interface.texts.tokenizer.decode(row) for row in np.asarray(tokens)]
    assert words == ["left stay", "right left"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"rows": 3}, "rows=3"),
        ({"episode_length": 0}, "episode_length=0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grid.LanguageGrid(**options)
