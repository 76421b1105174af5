"""Tests of a stage that learns from a directory of demonstrations."""

import shutil

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems, runs
from mmrl_jax.commands import evaluate
from mmrl_jax.data import files, formats, records
from mmrl_jax.data import weights as weights_lib
from mmrl_jax.data.records import InvalidData
from mmrl_jax.data.weights import SampleWeight
from mmrl_jax.envs.language_grid import LanguageGrid
from mmrl_jax.problems import demonstration_data
from mmrl_jax.training import fingerprints, loop
from tests import episodes
from tests.commands.test_make_demos import config

pytest.importorskip("tensorflow_datasets")

SENTENCE = LanguageGrid().vocabulary.sentences[0]


def episode(actions, number, text=SENTENCE, **changes):
    """Returns an episode that fits the grid, with random values."""
    rng, steps = np.random.default_rng(number), actions + 1
    one = episodes.episode(actions, number=number, text=text, size=(16, 16))
    return one._replace(
        observation={
            "pixels": one.observation["pixels"],
            "proprio": rng.normal(size=(steps, 1)).astype(np.float32),
        },
        action=rng.integers(0, 5, steps).astype(np.int32),
        privileged={},
        **changes,
    )


@pytest.fixture
def data(tmp_path):
    """Returns a directory with 3 + 5 + 4 = 12 steps."""
    several = [episode(n, i) for i, n in enumerate((3, 5, 4))]
    return episodes.write(tmp_path / "demos", "rlds", several)


def open_stage(directory, **changes):
    """Opens the demonstrations of a stage, without compiling anything."""
    data = {"directory": str(directory)} | changes.pop("data", {})
    problem = problems.make(config(data=data, **changes))
    return problem, problem.stage("bc")


def batches(directory, count, mesh=None):
    """Returns the batches of the first updates of a stage, and the statistics of its learner."""
    problem = problems.make(config(data={"directory": str(directory)}))
    mesh = mesh or problem.mesh
    pipeline = demonstration_data.open_pipeline(
        demonstration_data.DataOptions(directory=str(directory)),
        demonstration_data.target(problem.config, problem.env),
        batch_size=8, seed=0, history=1, discount=0.99, value_coef=0.1, one_step=False,
        name="bc",
    )  # fmt: skip
    return [demonstration_data.to_batch(pipeline.batch(u)) for u in range(count)]


@pytest.mark.parametrize("stage", ["bc", "awr", "iql"])
def test_training_resumes_in_the_middle_of_an_epoch_bit_for_bit(stage, data, tmp_path):
    optimizer = {"schedule": "constant"}
    options = {"data": {"directory": str(data)}, "optimizer": optimizer, "flat": True}
    options["stage"] = stage
    whole, half = (config(**options, num_updates=count) for count in (4, 2))
    one = mmrl_jax.train(whole, tmp_path / "one")
    assert mmrl_jax.train(half, tmp_path / "two").last.updates == 2
    # 16 of the 12 samples of an epoch have been seen: the second epoch has begun.
    two = mmrl_jax.train(whole, tmp_path / "two")
    assert two.last.updates == 4
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)
    # The normalizer has seen all steps, without the final observations.
    assert one.variables.normalizer.count == 12


def test_other_demonstrations_are_refused_and_none_are_needed_to_evaluate(data, tmp_path, capsys):
    run = config(data={"directory": str(data)}, num_updates=1, flat=True)
    mmrl_jax.train(run, tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.move(data, moved)
    evaluate.evaluate(tmp_path / "run", split="train")
    assert mmrl_jax.load(tmp_path / "run").step == 1
    problem = problems.make(run)
    with runs.claim(problem, tmp_path / "run"), pytest.raises(InvalidData, match="does not exist"):
        problem.stage("bc")
    others = [episode(n, i) for i, n in enumerate((3, 5, 4), start=5)]
    episodes.write(data, "rlds", others)
    with pytest.raises(ValueError, match="demonstrations: the files in the directory"):
        runs.claim(problems.make(run), tmp_path / "run")
    with runs.claim(problems.make(run), tmp_path / "run", accept=["demonstrations"]):
        pass
    shutil.rmtree(data)
    shutil.move(moved, data)
    with pytest.raises(ValueError, match="demonstrations"):
        runs.claim(problems.make(run), tmp_path / "run")
    capsys.readouterr()


def test_lerobot_gives_the_same_batches_but_for_the_last_observation(data, tmp_path):
    several = [episode(n, i) for i, n in enumerate((3, 5, 4))]
    other = episodes.write(tmp_path / "other", "lerobot", several)
    for one, two in zip(batches(data, 3), batches(other, 3), strict=True):
        for name in ("observation", "action", "value_return", "bootstrap_weight"):
            x, y = getattr(one.samples, name), getattr(two.samples, name)
            jax.tree.map(np.testing.assert_array_equal, x, y)


def test_devices_hold_their_parts_of_a_batch(data):
    problem, stage = open_stage(data, num_updates=3)
    config_of_four = problems.complete(problem.config, {"mesh": {"data": 2, "fsdp": 2}})
    on_four = problems.make(config_of_four).stage("bc")
    found = []
    for each in (stage, on_four):
        carry = loop.start(each)[0]
        compiled = each.on_host(carry, each.constants)
        with jax.transfer_guard("disallow"):
            batch = compiled.collect(carry, each.constants)
        carry, metrics = compiled.step(carry, each.constants, batch)
        found.append((jax.device_get(batch), jax.device_get(metrics)))
        devices = batch.samples.action.sharding.device_set
    assert len(devices) == 4
    (one, metrics), (four, metrics_of_four) = found
    jax.tree.map(np.testing.assert_array_equal, one, four)
    np.testing.assert_array_equal(one.samples.action, batches(data, 1)[0].samples.action)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, metrics_of_four[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"data": {"split": "val"}}, "bc.data.directory=.*split='val'"),
        ({"data": {"episodes": 9}}, "9 episodes are to be used, but the data set has 3"),
        ({"data": {"features": {"proprio": "state"}}}, "'state', which the data set does not.*"),
        ({"data": {"features": {"proprio": "state"}}}, r"Set bc.data.features=\{'proprio'"),
    ],
)
def test_demonstrations_that_do_not_fit_are_named(data, changes, match):
    with pytest.raises(InvalidData, match=match):
        open_stage(data, **changes)


def test_too_many_unusable_episodes_are_an_error(tmp_path, capsys):
    several = [episode(2, 0), episode(2, 1, text="bring den Müll weg"), episode(3, 2)]
    directory = episodes.write(tmp_path / "d", "rlds", several)
    with pytest.raises(InvalidData, match="1 unknown instr(.|\n)*'den', 'müll'") as caught:
        open_stage(directory)
    assert "bc.data.max_rejected=0.01" in str(caught.value)
    open_stage(directory, data={"max_rejected": 0.5})
    shown = capsys.readouterr().out
    assert "2 episodes, 5 steps. " not in shown and "2 episodes, 5 steps.\n1 episodes were" in shown


def test_a_critic_needs_rewards(tmp_path, monkeypatch):
    directory = episodes.write(tmp_path / "d", "rlds", [episode(2, 0)])
    from mmrl_jax.data import rlds

    monkeypatch.setattr(rlds, "DEFAULTS", rlds.DEFAULTS | {"reward": "nothing"})
    with pytest.raises(InvalidData, match="has no rewards, but bc.value_coef=0.1 trains a critic"):
        open_stage(directory)
    open_stage(directory, value_coef=0.0)


def test_an_environment_without_an_expert_needs_a_directory():
    with pytest.raises(ValueError, match="no scripted expert; set bc.data.directory"):
        problems.make(config())
    with pytest.raises(ValueError, match="bc.data.max_rejected"):
        problems.make(config(data={"directory": "x", "max_rejected": 1.0}))


def test_privileged_targets_must_be_recorded(tmp_path):
    made = problems.complete(
        config(data={"directory": str(tmp_path / "d")}), {"model": {"pointing": "target_pixel"}}
    )
    place = np.zeros((3, 2), np.float32)
    one = episode(2, 0)._replace(privileged={"target_pixel": place})
    episodes.write(tmp_path / "d", "rlds", [one])
    stage = problems.make(made).stage("bc")
    assert stage.on_host is not None
    shutil.rmtree(tmp_path / "d")
    episodes.write(tmp_path / "d", "rlds", [episode(2, 0)])
    with pytest.raises(InvalidData, match="'privileged/target_pixel', which the data set does not"):
        problems.make(made).stage("bc")
    assert records.schema_of(one)["privileged/target_pixel"].shape == (2,)


def weigh(path, directory, weights):
    """Writes the weights of the episodes of a directory, and returns the path."""
    source = formats.open_directory(directory, "train")
    digest = files.digest(files.fingerprint(directory), "train")
    ids = [source.name(i) for i in range(len(source))]
    rows = [SampleWeight(x, digest, w) for x, w in zip(ids, weights, strict=True)]
    weights_lib.write(path, rows)
    return path


def test_weights_leave_out_episodes_and_resume_bit_for_bit(data, tmp_path, capsys):
    path = weigh(tmp_path / "weights.jsonl", data, (1.0, 0.0, 2.0))
    options = {"data": {"directory": str(data), "weights": str(path)}, "flat": True}
    options["optimizer"] = {"schedule": "constant"}
    whole, half = (config(**options, num_updates=count) for count in (4, 2))
    one = mmrl_jax.train(whole, tmp_path / "one")
    # The normalizer has seen 3 + 4 steps, without the episode of 5.
    assert one.variables.normalizer.count == 7
    assert "1 episodes have the weight 0" in capsys.readouterr().out
    mmrl_jax.train(half, tmp_path / "two")
    two = mmrl_jax.train(whole, tmp_path / "two")
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)
    weigh(path, data, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="began:\n  weights: ") as caught:
        mmrl_jax.train(config(**options, num_updates=6), tmp_path / "two")
    assert "demonstrations:" not in str(caught.value)
    # An evaluation does not need them.
    path.unlink()
    now = problems.make(whole).dependencies()
    assert list(now) == ["demonstrations"]
    fingerprints.check(tmp_path / "two", now)


def test_weights_of_other_demonstrations_are_refused(data, tmp_path):
    path = weigh(tmp_path / "weights.jsonl", data, (1.0, 0.0, 2.0))
    other = episodes.write(tmp_path / "other", "rlds", [episode(2, i) for i in range(3)])
    with pytest.raises(InvalidData, match="bc.data.weights=.* for other contents of"):
        open_stage(other, data={"weights": str(path)}, flat=True)
