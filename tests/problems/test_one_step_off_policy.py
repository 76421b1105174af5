"""Tests of runs whose reward functions score while the next completions are sampled."""

import contextlib
import types

import jax
import numpy as np
import pytest

from mmrl_jax import problems, runs
from mmrl_jax.distributed import multihost
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import host_update
from mmrl_jax.problems.dataset import Dataset
from mmrl_jax.problems.host_rewards import Scorer
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks.rewards import Rewards
from mmrl_jax.training import dispatch, loop
from tests import processors, tiny
from tests.tasks.test_folder import folder
from tests.training.test_loop import bitwise_equal, kill
from tests.training.test_profile import dispatches, trace


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """Returns a tiny config with the option, with changes as group__field=value."""
    model = processors.save_decoder(tmp_path_factory.mktemp("llama"))
    images = folder(tmp_path_factory.mktemp("pictures"), count=10)

    def make(stages=("grpo",), **changes):
        capped = {} if stages == ("dpo",) else {"last__importance_weight_cap": 2.0}
        stale = capped | {"last__one_step_off_policy": True, "last__trainable": ".*"}
        return tiny.folder_config(model, images, stages, **stale | changes)

    return make


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    """Returns a run of four updates that was never stopped, and its directory with a profile."""
    workdir = tmp_path_factory.mktemp("whole")
    return runs.train(make_config(), workdir, profile=True), workdir


def rows(workdir):
    return [row for row in metrics.read_jsonl(workdir / metrics.JSONL_NAME) if row["step"]]


def copied(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def test_completions_are_of_the_policy_before_the_last_update(make_config):
    problem = problems.make(make_config())
    stage = problem.stage("grpo")
    carry, _ = loop.start(stage)
    frozen, train = stage.constants.frozen, problem.records.train.with_batch_size(4)
    generate = jax.jit(lambda *arguments: host_update._generate(problem, "grpo", *arguments))

    def sampled(params, update):
        prompts = problem.prompts(train.batch(update))
        return copied(generate(params, frozen, prompts, carry.rng, update))

    host = stage.on_host(carry, stage.constants)
    params = [copied(carry.learner.params)]
    for k in range(3):
        scored, failed, following = host.collect(carry, stage.constants)
        # Update k learns from what the parameters before update k - 1 have sampled.
        prompts, completions = copied(scored[:2])
        behavior = params[max(0, k - 1)]
        np.testing.assert_array_equal(prompts.tokens, problem.prompts(train.batch(k)).tokens)
        expected = sampled(behavior, k)
        np.testing.assert_array_equal(completions.tokens, expected.tokens)
        np.testing.assert_allclose(completions.log_probs, expected.log_probs, atol=1e-5)
        carry, _ = host.step(carry, stage.constants, (scored, failed, following))
        params.append(copied(carry.learner.params))
        # The parameters of this update would have sampled other ones.
        fresh, stale = sampled(params[-1], k + 1), sampled(params[-2], k + 1)
        bitwise_equal(carry.in_flight.tokens, stale.tokens)
        assert np.abs(fresh.log_probs - stale.log_probs).max() > 1e-3


def test_rewards_are_called_once_an_update_after_the_next_sampling(
    make_config, tmp_path, monkeypatch
):
    happened, compiled, scorer = [], host_update._compile, Scorer.__call__

    def spied(*arguments):
        generate, step, shapes = compiled(*arguments)

        def spied_generate(*inputs):
            happened.append(f"sample {int(jax.device_get(inputs[-1]))}")
            return generate(*inputs)

        def spied_step(carry, *inputs):
            happened.append(f"learn {int(jax.device_get(carry.updates))}")
            return step(carry, *inputs)

        return spied_generate, spied_step, shapes

    def spied_scorer(self, records, batch, completions, **options):
        happened.append(tuple(batch.records))
        return scorer(self, records, batch, completions, **options)

    monkeypatch.setattr(host_update, "_compile", spied)
    monkeypatch.setattr(Scorer, "__call__", spied_scorer)
    monkeypatch.setattr(Dataset, "periodic_evaluation", lambda *_: None)
    config = make_config(last__num_updates=3)
    problem = problems.make(config)
    loop.run(problem.stage("grpo"), workdir=tmp_path, config=config)
    train = problem.records.train.with_batch_size(4)
    rewards = [tuple(train.batch(k).records) for k in range(3)]
    assert happened == [
        "sample 0", "sample 1", rewards[0], "learn 0",
        "sample 2", rewards[1], "learn 1",
        "sample 3", rewards[2], "learn 2",
    ]  # fmt: skip


def test_importance_weights_see_the_last_update(whole, make_config, tmp_path):
    gaps = [row["policy/sampler_gap"] for row in rows(whole[1])]
    assert gaps[0] < 1e-4 and min(gaps[1:]) > 1e-3
    # The first update has nothing to wait for, and is that of a run without the option.
    config = make_config(last__one_step_off_policy=False)
    plain = runs.train(config, tmp_path)
    first, other = rows(tmp_path)[0], rows(whole[1])[0]
    assert plain.last.carry.in_flight is None
    assert first["completion/reward"] == other["completion/reward"]
    assert first["loss/total"] == other["loss/total"] and first["grad/norm"] == other["grad/norm"]
    assert rows(tmp_path)[1]["policy/sampler_gap"] < 1e-4


def test_a_profile_shows_the_reward_functions(whole):
    def spans(name):
        events = (e for e in trace(whole[1])[1] if e.get("name") == name)
        return [(e["ts"], e["ts"] + e["dur"]) for e in events]

    assert dispatches(whole[1]) == [1, 2, 3]
    for start, end in spans("dispatch"):
        assert sum(start <= first and last <= end for first, last in spans("rewards")) == 1


def test_a_run_that_was_extended_is_bitwise_one_that_was_not(whole, make_config, tmp_path):
    runs.train(make_config(last__num_updates=2), tmp_path)
    parts = runs.train(make_config(last__updates_per_dispatch=3), tmp_path)
    bitwise_equal(whole[0].last.carry, parts.last.carry)


def test_a_run_that_a_signal_stopped_resumes_bitwise(whole, make_config, tmp_path, monkeypatch):
    calls, scorer = [], Scorer.__call__

    def killing(self, records, batch, *arguments, **options):
        calls.append(records)
        if len(calls) == 3:  # After the evaluation before the first update: that of update 1.
            kill()
        return scorer(self, records, batch, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", killing)
        stopped = runs.train(make_config(), tmp_path)
    assert stopped.interrupted and stopped.last.updates == 2
    bitwise_equal(whole[0].last.carry, runs.train(make_config(), tmp_path).last.carry)


def test_rewards_that_fail_are_tried_again(whole, make_config, tmp_path, monkeypatch):
    calls, scorer = [], Scorer.__call__

    def failing(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) in (2, 4, 5):  # Once in the first update, and in both tries of the second.
            raise ConnectionError("the server is down")
        return scorer(self, *arguments, **options)

    monkeypatch.setattr(dispatch, "RETRY_AFTER_S", (0.0,))
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", failing)
        with pytest.raises(loop.HostFailed, match="update 2 failed"):
            runs.train(make_config(), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    bitwise_equal(whole[0].last.carry, runs.train(make_config(), tmp_path).last.carry)


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_other_algorithms_learn_from_them(algorithm, make_config, tmp_path):
    config = make_config((algorithm,), last__num_updates=2)
    assert runs.train(config, tmp_path).last.updates == 2
    assert all(np.isfinite(row["loss/total"]) for row in rows(tmp_path))


def test_importance_weights_are_needed(make_config):
    message = r"grpo.one_step_off_policy=True .* grpo.importance_weight_cap=None .* set a cap"
    with pytest.raises(ValueError, match=message):
        problems.make(make_config(last__importance_weight_cap=None))


@pytest.mark.parametrize("fails", [False, True])
def test_devices_are_awaited_before_the_processes_exchange_rewards(fails, monkeypatch):
    happened = []

    class Sampled:
        def block_until_ready(self):
            happened.append("sampled")

    def on_all(function, **_):
        try:
            return function()
        finally:
            happened.append("exchanged")

    class Pool:
        takes_ids = False

        def __call__(self, *_, **__):
            happened.append("scored")
            if fails:
                raise ConnectionError("the server is down")
            zero, one = np.zeros((1, 1)), np.ones((1, 1), bool)
            return Rewards(zero, one, {"f": zero}, {"f": one}, ())

    monkeypatch.setattr(multihost, "on_all", on_all)
    scorer = Scorer(Pool(), types.SimpleNamespace(decode=str))
    batch = types.SimpleNamespace(prompts=("p",), answers=("a",), columns=({},), messages=(None,))
    tokens = np.zeros((1, 1, 3), np.int32)
    completions = Completions(tokens, tokens, tokens > 0, np.ones((1, 1), bool))
    with pytest.raises(ConnectionError) if fails else contextlib.nullcontext():
        scorer(None, batch, completions, meanwhile=Sampled())
    assert happened == ["scored", "sampled", "exchanged"]
