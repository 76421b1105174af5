"""Tests of rollouts that have a batch of demonstrated steps beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.learners import bc, learner
from mmrl_jax.monitoring import metrics
from mmrl_jax.problems import sources
from mmrl_jax.training import checkpoint, loop
from tests import episodes
from tests.problems.test_demonstration_data import episode

SOURCE = {"episodes": 2, "batch_size": 16}


def config(env="language_reach", **options):
    """Returns the config of a stage of an MLP that learns from rollouts and demonstrations."""
    stage = {
        "num_updates": 4,
        "eval_interval": 4,
        "checkpoint_interval": 1,
        "num_envs": 4,
        "unroll_length": 4,
        "num_minibatches": 2,
        "demonstration_coef": 0.5,
        "demonstrations": SOURCE,
    }
    return problems.complete(
        {
            "problem": "control",
            "stages": ("dapg",),
            "env": {"name": env, "height": 0, "width": 0, "options": {"episode_length": 16}},
            "model": {"kind": "mlp"},
            "mesh": {"data": 1},
            "run": {"eval_episodes": 4},
            "dapg": stage | options,
        }
    )


def collected(config, updates, monkeypatch):
    """Returns what the source of a stage collects, and the data set of its constants."""
    monkeypatch.setattr(sources, "make_update", lambda *halves: halves)
    stage = problems.make(config).stage("dapg")
    carry = loop.start(stage)[0]
    collect = jax.jit(stage.update[0].collect)
    found = [collect(carry.replace(updates=jnp.int32(u)), stage.constants) for u in updates]
    return jax.device_get(found), carry, stage.constants.data


def test_a_batch_of_the_expert_is_drawn_by_the_number_of_the_update(monkeypatch):
    found, carry, data = collected(config(), range(3), monkeypatch)
    size = len(data.action)
    assert size == 32  # Two episodes of 16 steps, an epoch of two batches.
    key = jax.random.fold_in(carry.rng, np.uint32(2**32 - 1))
    for update, one in enumerate(found):
        indices = learner.epoch_indices(key, jnp.int32(update), batch_size=16, size=size)
        jax.tree.map(
            np.testing.assert_array_equal, one.batch.demonstrations, bc.gather(data, indices)[0]
        )
        assert one.batch.updates == update
    actions = [one.batch.demonstrations.action for one in found]
    assert not np.array_equal(actions[0], actions[1])
    whole = np.sort(np.concatenate(actions[:2]), axis=0)
    np.testing.assert_array_equal(whole, np.sort(data.action, axis=0))


@pytest.mark.parametrize("directory", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_resumes_bit_for_bit(directory, tmp_path):
    changes = {"optimizer": {"schedule": "constant"}}
    env = "language_reach"
    if directory:
        pytest.importorskip("tensorflow_datasets")
        several = [episode(n, i) for i, n in enumerate((3, 5, 4))]
        data = {"directory": str(episodes.write(tmp_path / "demos", "rlds", several))}
        env, changes["demonstrations"] = "language_grid", SOURCE | {"data": data}
    whole, half = (config(env, **changes, num_updates=count) for count in (4, 2))
    one = mmrl_jax.train(whole, tmp_path / "one")
    assert mmrl_jax.train(half, tmp_path / "two").last.updates == 2
    two = mmrl_jax.train(whole, tmp_path / "two")
    assert two.last.updates == 4
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)
    rows = [row for row in metrics.read_jsonl(tmp_path / "one" / "metrics.jsonl") if "lr" in row]
    assert len(rows) == 4 and all(row["loss/bc"] > 0 for row in rows)
    assert all("rollout/reward" in row and "loss/policy" in row for row in rows)


def test_critics_of_a_stage_are_in_its_checkpoints_and_end_with_it(tmp_path):
    base = config(num_updates=2).to_dict()
    stage = {"num_updates": 2, "eval_interval": 2, "checkpoint_interval": 1} | SOURCE
    made = problems.complete(
        base | {"stages": ("iql", "dapg"), "iql": stage | {"trainable": "params/policy.*"}}
    )
    trained = mmrl_jax.train(made, tmp_path)
    assert [result.updates for result in trained.results.values()] == [2, 2]
    first = trained.problem.stage("iql").init()
    saved, _ = checkpoint.restore_parts(
        tmp_path / "iql", {"learner/extras": first.learner.extras}, which="latest"
    )
    critics, start = saved["learner/extras"]["critics"], first.learner.extras["critics"]
    for pair in ((critics.params, start.params), (critics.target, start.target)):
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), *pair)
        assert all(jax.tree.leaves(changed))  # `trainable` freezes the value, and no critic.
    cloned = mmrl_jax.load(tmp_path / "iql").variables
    assert cloned.extras == {} == trained.variables.extras
    frozen = [x["params"]["value_0"]["kernel"] for x in (cloned.params, first.learner.params)]
    np.testing.assert_array_equal(*frozen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"env": "language_grid"},
            "no scripted expert; set dapg.demonstrations.data.directory, or remove the stage",
        ),
        ({"demonstration_decay": 1.5}, "dapg.demonstration_decay"),
        (
            {"demonstrations": {"batch_size": 2**31}},
            "dapg.num_updates=4 . dapg.demonstrations.batch_size=2147483648 is 2..32",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.make(config(**changes))
