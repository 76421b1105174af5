"""Tests that plausible mistakes in configs are rejected by name before anything is built."""

import math

import ml_collections
import pytest

import mmrl_jax
from mmrl_jax import config as config_lib
from mmrl_jax import problems
from mmrl_jax.commands import export
from tests import processors, tiny
from tests.tasks.test_folder import folder

VIEW = {"episode_length": 10, "instruction": "go fast", "link": 0, "fovy": 45.0}
NAN, INF = math.nan, math.inf


def mutated(config, key, value):
    """Returns the config with another value of any type at a key 'group.field'."""
    plain = config.to_dict()
    *groups, field = key.split(".")
    node = plain
    for group in groups:
        node = node[group]
    node[field] = value
    return ml_collections.ConfigDict(plain)


def refused(config, key, value, message):
    with pytest.raises(ValueError) as caught:
        problems.make(mutated(config, key, value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "'seed' is -1"),
        ("seed", 2**32, "'seed' is 4294967296"),  # Its draws would be those of seed 0.
        ("seed", 2**63, "'seed' is 9223372036854775808"),
        ("seed", [0], "'seed' is [0]"),
        ("mesh.data", 1.0, "'mesh.data' is 1.0"),
        ("env.history", 2.0, "'env.history' is 2.0"),
        ("env.width", 20, "env.width=20"),
        ("env.height", 0, "env.height=0"),
        ("env.options", {"split": "train"}, "env.options.split='train': set env.split"),
        ("env.options", {"height": 8}, "env.options.height=8: set env.height"),
        ("model.width", [32], "'model.width' is [32]"),
        (
            "model.remat_policy",
            "dots",
            "remat_policy='dots' has no effect with model.remat=False",
        ),
        ("model.width", 10**12, "'model.width' is 1000000000000"),
        ("model.checkpoint", "x", "does not use model.checkpoint='x'"),
        ("model.prompt", "x", "the config 'reach_vlm' of model.kind='vlm'"),
        ("model.patch_margin", 1000, "model.patch_margin=1000 makes 63001 copies of each pixel"),
        ("model.auxiliary", "cue", "'model.auxiliary' is 'cue'"),
        ("model.auxiliary", (3,), "model.auxiliary has 3"),
        ("model.auxiliary", (("cue", [4]),), "model.auxiliary has ('cue', [4])"),
        ("model.auxiliary", (("cue", True),), "model.auxiliary has ('cue', True)"),
        ("model.auxiliary", (("cue", 4), ("cue", 4)), "name a target twice"),
        ("ppo.trainable", "(", "'ppo.trainable' is '(', but must be a regular expression:"),
        ("ppo.trainable", "txt/.*", "ppo.trainable='txt/.*': 'txt/.*' matches no leaf"),
        ("model.lora.pattern", "[", "'model.lora.pattern' is '['"),
        ("model.lora.pattern", "nothing", "model.lora.pattern: 'nothing' matches no Dense"),
        ("model.lora.pattern", "", "model.lora.pattern: '' matches no Dense"),
        ("model.lora.rank", 2.5, "'model.lora.rank' is 2.5"),
        ("model.text_encoder", "/nowhere", "model.text_encoder='/nowhere'"),
        ("model.vision_encoder", "/nowhere", "model.vision_encoder='/nowhere'"),
        ("ppo.value_clip", INF, "'ppo.value_clip' is inf"),
        ("ppo.value_clip", NAN, "'ppo.value_clip' is nan"),
        ("ppo.target_kl", INF, "'ppo.target_kl' is inf"),
        (
            "ppo.optimizer.learning_rate",
            1e-320,
            "'ppo.optimizer.learning_rate' is 1e-320",
        ),  # 0 in float32.
        ("ppo.optimizer.learning_rate", [1e-3], "'ppo.optimizer.learning_rate' is [0.001]"),
        ("ppo.optimizer.max_grad_norm", 1e39, "'ppo.optimizer.max_grad_norm' is 1e+39"),
        ("ppo.num_epochs", 10**400, "'ppo.num_epochs' is 1000"),
        ("ppo.num_updates", 0.5, "'ppo.num_updates' is 0.5"),
        ("ppo.eval_interval", 0, "'ppo.eval_interval' is 0"),
    ],
)
def test_of_control_policies(key, value, message):
    refused(tiny.config("recall_ppo"), key, value, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.auxiliary", (("cue", 4),), "model.kind='mlp' does not use model.auxiliary"),
        ("model.pointing", "target_pixel", "does not use model.pointing='target_pixel'"),
        ("model.width", 256, "does not use model.width=256: remove these keys from"),
        ("model.text_encoder", "minilm", "does not use model.text_encoder='minilm'"),
        ("env.height", 16, "env.height=16, but model.kind='mlp' has no image input"),
        ("env.options", VIEW | {"episode_length": 2.5}, "episode_length=2.5 must be a whole"),
        ("env.options", VIEW | {"episode_length": 2**31}, "episode_length=2147483648 must be"),
        ("env.options", VIEW | {"episode_length": [9]}, "episode_length=[9] must be a whole"),
        ("env.options", VIEW | {"instruction": " "}, "instruction=' ' must be a text"),
        ("env.options", VIEW | {"instruction": 3}, "instruction=3 must be a text"),
        ("env.options", VIEW | {"fovy": 0}, "fovy=0 must be an angle between 0 and 180"),
        ("env.options", VIEW | {"fovy": 200}, "fovy=200 must be"),
        ("env.options", VIEW | {"fovy": [45]}, "fovy=[45] must be"),
        ("env.options", VIEW | {"link": -1}, "link=-1 must be a whole number in 0..0"),
        ("env.options", VIEW | {"camera_offset": (0, 1)}, "camera_offset=(0, 1) must be three"),
        ("env.options", VIEW | {"camera_offset": (0, 1, NAN)}, "must be three finite numbers"),
        ("env.options", VIEW | {"backend": "mjxx"}, "backend='mjxx' must be one of Brax's"),
        ("env.options", VIEW | {"backend": ["mjx"]}, "backend=['mjx'] must be one of Brax's"),
    ],
)
def test_of_perceptrons(key, value, message):
    refused(tiny.config("mlp_ppo", **tiny.FAST), key, value, message)


@pytest.mark.parametrize("options", [{"episode_length": 16.5}, {"episode_length": True}])
def test_of_our_own_environments(options):
    refused(tiny.config(), "env.options", options, "must be a whole number in 16..3")


def test_an_environment_that_lacks_a_backend_says_so():
    config = tiny.config("mlp_ppo", env__name="brax:swimmer", env__options={"backend": "spring"})
    with pytest.raises(ValueError, match="backend='spring' cannot run Brax's 'swimmer'"):
        problems.make(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.checkpoint", "/nowhere", "model.checkpoint='/nowhere'"),
        ("model.checkpoint", None, "model.checkpoint=None, but model.kind='vlm'"),
        ("model.width", 64, "model.kind='vlm' does not use model.width=64"),
        ("model.vision_encoder", "x", "does not use model.vision_encoder='x'"),
        ("model.prompt", "{image}", "'model.prompt' is '{image}'"),
    ],
)
def test_of_vision_language_models_that_act(key, value, message):
    refused(tiny.config("reach_vlm"), key, value, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "task.kinds",
            (["count"],),
            "'task.kinds' is (['count'],), but must be a tuple of str",
        ),
        ("task.levels", (["easy"],), "'task.levels' is (['easy'],)"),
        ("task.counts", ([0], 6), "task.counts=([0], 6)"),
        ("model.patch_margin", 500, "model.patch_margin=500 makes"),
        ("model.lora.pattern", "*", "'model.lora.pattern' is '*'"),
        ("model.checkpoint", "/nowhere", "model.checkpoint='/nowhere'"),
        ("sft.trainable", "(", "'sft.trainable' is '(', but must be a regular expression:"),
        ("grpo.trainable", "nothing", "grpo.trainable='nothing': 'nothing' matches no leaf"),
        ("grpo.importance_weight_cap", INF, "'grpo.importance_weight_cap' is inf"),
        ("grpo.temperature", 1e-320, "'grpo.temperature' is 1e-320"),
        ("ppo.value_clip", INF, "'ppo.value_clip' is inf"),
        ("grpo.pass_at_k", 0, "'grpo.pass_at_k' is 0"),
    ],
)
def test_of_tasks(key, value, message):
    algorithm = "ppo" if key.startswith("ppo.") else "grpo"
    config = tiny.token_config(stages=("sft", algorithm))
    if key == "model.checkpoint":  # A model from scratch reads none.
        config = mmrl_jax.get_config("smollm2_vqa_grpo")
    refused(config, key, value, message)


def test_of_agents():
    config = tiny.agent_config()
    # The value head is trained whatever the pattern says, and is no match of it.
    refused(config, "ppo.trainable", "nothing", "ppo.trainable='nothing': 'nothing' matches no")
    refused(config, "env.options", {"rows": 4.5}, "rows=4.5 must be a whole")


@pytest.fixture(scope="module")
def folder_config(tmp_path_factory):
    images = str(folder(tmp_path_factory.mktemp("images"), count=8))
    model = str(processors.save_decoder(tmp_path_factory.mktemp("llama")))
    return mmrl_jax.get_config(
        "folder_grpo",
        {
            "mesh": {"data": 1},
            "dataset": {"directory": images},
            "model": {"checkpoint": model},
        },
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dataset.directory", "/nowhere", "/nowhere"),
        ("rewards.functions", (["a"],), "'rewards.functions' is (['a'],)"),
        ("rewards.weights", (NAN,), "'rewards.weights' is (nan,), but must be finite numbers"),
        ("rewards.weights", (True,), "'rewards.weights' is (True,)"),
        ("rewards.timeout_s", INF, "'rewards.timeout_s' is inf"),
    ],
)
def test_of_folders(key, value, message, folder_config):
    refused(folder_config, key, value, message)


def test_a_reward_module_that_cannot_be_imported_names_the_line(
    folder_config, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, where in (
        ("bad_syntax", "def f():\n  return (\n", "SyntaxError: '(' was never closed"),
        ("bad_import", "x = 1\nraise RuntimeError('no key')\n", "RuntimeError: no key"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        config = mutated(folder_config, "rewards.functions", (f"{name}:f",))
        with pytest.raises(ValueError) as caught:
            problems.make(config)
        assert where in str(caught.value) and f"{name}.py:2)" in str(caught.value)


def test_a_config_file_that_cannot_be_executed_names_the_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import ml_collections\nnothing.at.all\n")
    with pytest.raises(ValueError, match=r"cannot be executed: NameError: .*mine\.py:2\)"):
        config_lib.load_config(str(path))


def test_arguments_that_a_config_does_not_take_or_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"positional.*: give 'configs/reach_ppo\.py' alone"):
        config_lib.load_config("configs/reach_ppo.py:reacher")
    path = tmp_path / "mine.py"
    path.write_text("def get_config(name):\n    return name\n")
    assert config_lib.load_config(f"{path}:it") == "it"
    with pytest.raises(ValueError, match=r"missing.*'name'.*: give '.*mine\.py:ARGUMENT'"):
        config_lib.load_config(str(path))


def test_overrides_of_keys_that_a_run_would_not_read():
    argv = ["--config=configs/mlp_ppo.py", "--config.model.width=256"]
    with pytest.raises(ValueError, match="Unknown config key 'model.width'"):
        config_lib.validate_overrides(argv)


def test_the_export_of_a_control_policy_says_what_can_be_exported(tmp_path):
    config = tiny.config("mlp_ppo", **tiny.FAST)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    with pytest.raises(ValueError, match="is of a control policy.*only runs that fine-tune a comp"):
        export.export(tmp_path, tmp_path / "out", which="latest", adapter=False, dtype="float32")
