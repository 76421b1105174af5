"""Tests of the checks, conversions and masks of a user's environment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import envs
from mmrl_jax.envs.instructions import instruction
from mmrl_jax.envs.wrappers import AutoReset
from mmrl_jax.rollouts.unroll import deterministic_output, unroll
from mmrl_jax.training import loop
from tests.envs.test_wrappers import Counter
from tests.training.test_loop import toy


class Whole(Counter):
    """An environment that satisfies the whole contract, with an instruction and a metric."""

    episode_length = 4
    vocabulary = None
    changes = staticmethod(lambda state, stepped: state)

    def reset(self, rng):
        state = super().reset(rng)
        words = instruction(jnp.array([1, 0]))
        info = state.info | {"privileged": {"place": jnp.zeros(2)}}
        state = state.replace(
            obs=state.obs | {"instruction": words}, info=info, metrics={"success": jnp.zeros(())}
        )
        return self.changes(state, False)

    def step(self, state, action):
        after = super().step(state, action)
        after = after.replace(obs=state.obs | {"proprio": after.obs["proprio"]})
        return self.changes(after, True)


def test_an_environment_that_keeps_the_contract_passes():
    state = envs.check_env(Whole(), pixels=True)
    assert state.obs["proprio"].shape == (2,) and state.info["privileged"]["place"].shape == (2,)


def without(tree, name):
    return {key: x for key, x in tree.items() if key != name}


def with_obs(state, **obs):
    return state.replace(obs=state.obs | obs)


def with_info(state, **info):
    return state.replace(info=state.info | info)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda s, _: (s, 0), "Whole.reset returns a tuple; it must be a State"),
        (lambda s, _: s.replace(obs=s.obs["proprio"]), "reset returns state.obs float32 [2]; it"),
        (lambda s, _: s.replace(obs=without(s.obs, "proprio")), "state.obs with ['instruction']"),
        (lambda s, _: with_obs(s, proprio=jnp.zeros(2, jnp.int32)), "['proprio'] int32 [2]"),
        (lambda s, _: with_obs(s, proprio=jnp.zeros((2, 1))), "['proprio'] float32 [2, 1]"),
        (lambda s, _: with_obs(s, depth=jnp.zeros(2)), "state.obs with ['depth']"),
        (lambda s, _: with_obs(s, instruction=jnp.zeros(2)), "state.obs['instruction'] float32"),
        (lambda s, _: s.replace(info=without(s.info, "truncation")), "a dict with 'truncation'"),
        (lambda s, _: s.replace(info=without(s.info, "privileged")), "a dict with 'privileged'"),
        (lambda s, _: with_info(s, privileged=jnp.zeros(2)), "info['privileged'] float32 [2]"),
        (lambda s, _: with_info(s, privileged={"cue": jnp.int32(1)}), "['cue'] int32 []"),
        (lambda s, _: s.replace(reward=jnp.zeros(1)), "state.reward float32 [1]; it must be one"),
        (lambda s, _: s.replace(metrics={"joints": jnp.zeros(3)}), "metrics['joints'] float32 [3]"),
        (
            lambda s, stepped: with_obs(s, proprio=jnp.zeros(2 + stepped)),
            "state.obs['proprio'] is float32 [2] after reset, but float32 [3] after step",
        ),
        (
            lambda s, stepped: s.replace(metrics=s.metrics | ({"x": s.reward} if stepped else {})),
            "state.metrics['x'] is absent after reset, but float32 [] after step",
        ),
        (
            lambda s, stepped: with_info(
                s, steps=s.info["steps"].astype(int if stepped else float)
            ),
            "state.info['steps'] is float32 [] after reset, but int32 [] after step",
        ),
        (lambda s, _: s.info["speed"], "Whole.reset cannot be traced: KeyError: 'speed' ("),
    ],
)
def test_what_the_contract_misses_is_named(changes, message):
    env = Whole()
    env.changes = changes
    with pytest.raises(envs.InvalidEnvironment) as caught:
        envs.check_env(env)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action_kind", "binary", "Whole.action_kind is 'binary'; make it one of"),
        ("action_size", 2.0, "Whole.action_size=2.0 must be a whole number"),
        ("episode_length", 0, "Whole.episode_length=0 must be a whole number"),
        ("scene", None, "Whole has no 'scene'"),
    ],
)
def test_attributes_that_an_environment_lacks(name, value, message, monkeypatch):
    if value is None:
        monkeypatch.delattr(Counter, name)
    else:
        monkeypatch.setattr(Whole, name, value)
    with pytest.raises(envs.InvalidEnvironment, match=message):
        envs.check_env(Whole(), pixels=True)


def batch_of(changes, steps=8):
    env = Whole()
    env.changes = changes
    env = AutoReset(env)
    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), 4))

    @jax.jit
    def run(state):
        act = deterministic_output(jnp.full((4, 1), 0.5))
        return unroll(env, state, lambda *_: act, jax.random.PRNGKey(1), steps)

    return state, *run(state)


def test_reward_done_and_metrics_of_any_number_become_float32():
    def coarse(state, stepped):
        return state.replace(
            reward=jnp.int32(2) if stepped else 0,
            done=state.done > 0,
            metrics={"success": state.info["steps"] > 1},
        )

    env = Whole()
    env.changes = coarse
    envs.check_env(env)
    state, last, batch = batch_of(coarse)
    for one in (state, last):
        assert {x.dtype for x in (one.reward, one.done, *one.metrics.values())} == {
            np.dtype(np.float32)
        }
    ended = np.asarray(batch.terminated + batch.truncated)
    np.testing.assert_array_equal(np.unique(ended), [0, 1])
    np.testing.assert_array_equal(batch.reward, 2 * np.asarray(batch.valid))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: with_obs(s, proprio=jnp.full(2, jnp.nan)),
            r"state\.obs\['proprio'\] is not fin",
        ),
        (lambda s: s.replace(metrics={"success": jnp.nan}), r"metrics\['success'\] is not finite"),
        (lambda s: with_info(s, privileged={"place": jnp.full(2, jnp.inf)}), r"\['place'\] is not"),
        (lambda s: s.replace(done=True), "state.done is not 0 after reset in 4 of 4"),
    ],
)
def test_numbers_of_a_reset_are_checked_as_a_run_starts(change, message):
    state, *_ = batch_of(lambda s, stepped: s if stepped else change(s), steps=1)
    stage = toy(init=lambda: loop.Carry(toy().init().learner, state, jax.random.PRNGKey(0), 0))
    with pytest.raises(envs.InvalidEnvironment, match=message):
        loop.start(stage)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s, x: with_obs(s, proprio=s.obs["proprio"] + x),
        lambda s, x: s.replace(reward=s.reward + x),
        lambda s, x: s.replace(done=s.done + x),
        lambda s, x: s.replace(metrics={"success": x}),
        lambda s, x: with_info(s, truncation=s.info["truncation"] + x),
        lambda s, x: with_info(s, privileged={"place": jnp.zeros(2) + x}),
    ],
)
def test_what_is_no_number_later_is_masked(spoil):
    def at_second_step(state, stepped):
        bad = stepped & (state.info["steps"] == 2) & (state.info["number"] > 0.5)
        return spoil(state, jnp.where(bad, jnp.nan, 0.0))

    _, last, batch = batch_of(at_second_step, steps=16)
    broken = np.asarray(batch.metrics["broken"])
    assert 0 < broken.sum() < broken.size
    for x in jax.tree.leaves((batch, last)):
        assert np.isfinite(np.asarray(x)).all()
    np.testing.assert_array_equal(np.asarray(batch.valid)[broken > 0], 0)


def test_a_run_in_which_every_step_is_broken_stops(tmp_path):
    broken = {"rollout/valid_fraction": jnp.float32(0), "rollout/nonfinite_envs": jnp.float32(8)}
    stage = toy(update=lambda n, w: broken)
    with pytest.raises(envs.InvalidEnvironment, match="in updates 1 to 1 had a number that is"):
        loop.run(stage, workdir=tmp_path, config={})
