"""Tests of the command that records demonstrations, and of what a run learns from them."""

import json

import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.commands import make_demos
from mmrl_jax.commands.make_demos import PolicySpec
from mmrl_jax.data import formats
from tests import episodes as episodes_lib
from tests.data.test_rlds import read_all

pytest.importorskip("tensorflow_datasets")

ENV = {"name": "language_grid", "height": 16, "width": 16}
MODEL = {"width": 16, "layers": 1, "heads": 2, "patch_hidden": 16}


def config(*, flat=False, stage="bc", **options):
    """Returns the config of a tiny policy in the grid; a flat one sees no images."""
    base = {
        "num_updates": 2,
        "batch_size": 8,
        "eval_interval": 2,
        "checkpoint_interval": 1,
        "value_coef": 0.1,
    }
    return problems.complete(
        {
            "problem": "control",
            "stages": (stage,),
            "env": ENV | ({"height": 0, "width": 0} if flat else {}),
            "model": {"kind": "mlp"} if flat else MODEL,
            "mesh": {"data": 1},
            "run": {"eval_episodes": 4},
            stage: base | options,
        }
    )


def record(output, *policies, kind="rlds", episodes=10, **changes):
    """Records episodes in shards of 4."""
    return make_demos.make_demos(
        config(),
        [make_demos.parse_policy(text) for text in policies or ("expert",)],
        output,
        **{"split": None, "episodes": episodes, "kind": kind, "shard_episodes": 4} | changes,
    )


def read(output, split="train"):
    """Returns all episodes of a recording."""
    source = formats.open_directory(output, split)
    size = source.features[source.defaults["proprio"]].shape[0]
    mapping = episodes_lib.mapping(
        source, pixels=(16, 16), proprio=size, action_size=5, discrete=True, privileged={}
    )
    found, quarantine = read_all(source, mapping)
    assert not quarantine.total, quarantine.summary()
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Returns the directory of a mixture as RLDS, and what its description has."""
    output = tmp_path_factory.mktemp("demos") / "mixed"
    return output, record(output, "expert,weight=2", "random", "expert,noise=0.5")


def test_a_mixture_has_the_policies_with_their_success(recorded):
    output, state = recorded
    episodes = read(output)
    assert [x.provenance.number for x in episodes] == list(range(10))
    by_policy = {}
    for x in episodes:
        assert x.provenance.split == "train" and x.provenance.seed == 0
        np.testing.assert_allclose(x.provenance.episode_return, x.reward.sum(), rtol=1e-6)
        by_policy.setdefault(x.provenance.policy, []).append(x.provenance.success)
    assert set(by_policy) == {"expert", "random", "expert,noise=0.5"}
    assert np.mean(by_policy["expert"]) == 1
    success = sum(x.provenance.success for x in episodes)
    assert make_demos.describe(state).endswith(f"success {success / 10:.3f}.")
    stored = json.loads((output / "demonstrations.json").read_text())
    assert stored["recipe"] == json.loads(json.dumps(state["recipe"])) and stored["complete"]
    assert stored["shards"] == state["shards"] and len(stored["shards"]) == 3


def test_an_interrupted_recording_is_resumed_with_the_same_episodes(
    recorded, tmp_path, monkeypatch
):
    whole = read(recorded[0])
    write, calls = formats.make_writer, []

    def interrupted(*arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    policies = ("expert,weight=2", "random", "expert,noise=0.5")
    monkeypatch.setattr(formats, "make_writer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "d", *policies)
    (tmp_path / "d" / ".language_grid.1.tmp").write_text("of a killed process")
    with pytest.raises(ValueError, match="A recording that was interrupted is finished by the"):
        formats.open_directory(tmp_path / "d", "train")
    record(tmp_path / "d", *policies)
    assert len(calls) == 5  # The first shard, the failure, two shards, and the end.
    for x, y in zip(whole, read(tmp_path / "d"), strict=True):
        assert x.provenance == y.provenance
        for name, value in x.fields().items():
            np.testing.assert_array_equal(value, y.fields()[name], err_msg=name)
    assert not list((tmp_path / "d").glob(".*"))
    record(tmp_path / "d", *policies)
    assert len(calls) == 5  # It was complete.


def test_lerobot_has_the_same_steps(recorded, tmp_path):
    record(tmp_path / "d", "expert,weight=2", "random", "expert,noise=0.5", kind="lerobot")
    for x, y in zip(read(recorded[0]), read(tmp_path / "d"), strict=True):
        assert x.provenance == y.provenance and x.actions == y.actions
        for name, value in x.fields().items():
            if not name.startswith("is_"):
                np.testing.assert_array_equal(value[: x.actions], y.fields()[name], err_msg=name)


def test_another_recording_is_refused(recorded, tmp_path):
    with pytest.raises(ValueError, match="seed: 0 there, 1.*\n.*empty directory"):
        record(recorded[0], "expert,weight=2", "random", "expert,noise=0.5", seed=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="has other files .file."):
        record(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "expert,noise=-1", "expert,weight=0", "expert,gain=2", "expert,noise=x", ",noise=1"],
)
def test_a_policy_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="--policy="):
        make_demos.parse_policy(text)


def test_arguments_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--split='heldout' is unknown; choose one of .'train'"):
        record(tmp_path, split="heldout")
    with pytest.raises(ValueError, match="'expert'. more than once"):
        record(tmp_path, "expert", "expert,weight=2")
    with pytest.raises(ValueError, match="'recall' has no expert"):
        make_demos.make_policy(
            PolicySpec("expert"),
            *env_of({"name": "recall"}),
            trust_modules=False,
        )
    for arguments, match in (
        ((None, None, [PolicySpec("expert")]), "Give --config or --env"),
        ((config(), "recall", []), "give one of them"),
        ((mmrl_jax.get_config("count_grpo"), None, []), "has no environment"),
    ):
        with pytest.raises(ValueError, match=match):
            make_demos.base_config(*arguments, trust_modules=False)


def env_of(env):
    """Returns the config of an environment, and the environment."""
    from mmrl_jax.problems import control

    made = make_demos.base_config(None, env["name"], [], trust_modules=False)
    return made, control.make_env(made)


def test_a_run_learns_from_what_was_recorded_and_is_recorded_again(recorded, tmp_path):
    learned = config(data={"directory": str(recorded[0])})
    trained = mmrl_jax.train(learned, tmp_path / "run")
    assert trained.last.updates == 2
    workdir = str(tmp_path / "run")
    spec = PolicySpec(workdir)
    base = make_demos.base_config(None, None, [spec], trust_modules=False)
    make_demos.make_demos(
        base, [spec], tmp_path / "again", split="heldout_layout", episodes=3,
        kind="rlds", shard_episodes=4,
    )  # fmt: skip
    (one, *_) = again = read(tmp_path / "again", "heldout_layout")
    assert len(again) == 3 and one.provenance.policy == f"{workdir}@2 (bc)"
    with pytest.raises(ValueError, match="another environment: env.height=16 there, 32 here"):
        make_demos.make_policy(spec, *env_of({"name": "language_grid"}), trust_modules=False)
