"""Tests of mmrl_jax.config."""

import dataclasses
import json
from typing import Literal

import ml_collections
import pytest

from mmrl_jax import config as config_lib
from mmrl_jax.config import schema
from mmrl_jax.config.options import (
    NON_EMPTY,
    NON_NEGATIVE,
    POSITIVE,
    Option,
    Valid,
    between,
    group,
    option,
    options_of,
)
from tests import tiny

OPEN = Valid(lambda x: 0.0 < x < 1.0, "in (0.0, 1.0)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PPO:
    clip: float = option(0.2, "Clip range of the ratio.", OPEN)
    gamma: float = option(0.99, "Discount.", between(0.0, 1.0))
    normalise: bool = option(False, "Normalise advantages.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    name: Literal["mlp", "transformer"] = option("mlp", "Kind of network.")
    sizes: tuple[int, ...] = option((8,), "Hidden sizes.", NON_EMPTY)
    warm_start: str | None = option(None, "Workdir to start from.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Env:
    arguments: dict = option({}, "Passed to the environment.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    seed: int = option(0, "Seed of every random draw.", NON_NEGATIVE)
    updates: int = option(dataclasses.MISSING, "Number of updates.", POSITIVE)
    ppo: _PPO = group(_PPO)
    model: _Model = group(_Model)
    env: _Env = group(_Env)


OPTIONS = options_of(_Options)


def _config():
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "updates": 100,
            "ppo": {"clip": 0.2, "gamma": 0.97, "normalise": True},
            "model": {"name": "mlp", "sizes": (64, 64), "warm_start": None},
            "env": {"arguments": {}},
        }
    )


def _message(call, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.ppo.clp=0.1", "Unknown config key 'ppo.clp'. Did you mean 'ppo.clip'?"),
        ("-config.ppo.clp=0.1", "Unknown config key 'ppo.clp'. Did you mean 'ppo.clip'?"),
        ("--config.clip=0.1", "Unknown config key 'clip'. Did you mean 'ppo.clip'?"),
        ("--config.pp.gamma=1", "Unknown config key 'pp.gamma'. Did you mean 'ppo.gamma'?"),
        ("--config.update=3", "Unknown config key 'update'. Did you mean 'updates'?"),
        ("--config.ppo.normalize", "Unknown config key 'ppo.normalize'. Did you mean 'ppo.norm"),
        ("--noconfig.ppo.normalize", "Unknown config key 'ppo.normalize'. Did you mean 'ppo.norm"),
        ("--config.model=mlp", "Config key 'model' is a group and takes no value. Set one of its "),
    ],
)
def test_misspelt_override(argument, message):
    argv = ["train.py", "--workdir=runs/a", argument, "--seed=1"]
    assert _message(config_lib.validate_overrides, argv, _config()).startswith(message)


def test_nearest_looks_at_the_last_part_too():
    assert config_lib.nearest("clip", ["clap", "optimiser.gradient.clip"]) == (
        "optimiser.gradient.clip"
    )
    assert config_lib.nearest("clip", []) is None


def test_right_overrides_pass():
    argv = [
        "train.py",
        "--config=configs/a.py",
        "--config.ppo.clip=0.1",
        "--config.updates",
        "3",
        "--noconfig.ppo.normalise",
        "--config.env.arguments={}",
        "--configuration.x=1",
        "--",
        "--config.after.the.end=1",
    ]
    config_lib.validate_overrides(argv, _config())
    # Each of those that are overrides is looked at: misspelt, it would not pass.
    for i in (2, 3, 5, 6):
        wrong = [*argv[:i], argv[i].replace("config.", "config.x"), *argv[i + 1 :]]
        assert _message(config_lib.validate_overrides, wrong, _config()).startswith("Unknown")


def test_overrides_are_checked_against_the_config_file_named(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config(size='big'):\n"
        "    return ml_collections.ConfigDict({size: {'clip': 0.2}})\n"
    )
    validate = config_lib.validate_overrides
    validate([f"--config={path}", "--config.big.clip=1"])
    validate(["--config", f"{path}:tiny", "--config.tiny.clip=1"])
    validate(["--config.unknown=1"])  # No config named: absl reports that.
    message = _message(validate, [f"--config={path}:tiny", "--config.tiny.clop=1"])
    assert "Did you mean 'tiny.clip'?" in message
    message = _message(validate, [f"--config={tmp_path}/smal.py"])
    assert f"Did you mean '{path}'?" in message
    (tmp_path / "other.py").write_text("")
    assert "no get_config" in _message(config_lib.load_config, f"{tmp_path}/other.py")


def _changed(path, value):
    config = _config().to_dict()
    *groups, last = path.split(".")
    node = config
    for name in groups:
        node = node[name]
    node[last] = value
    return ml_collections.ConfigDict(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ppo.clp", 0.1, "Unknown config key 'ppo.clp'. Did you mean 'ppo.clip'?"),
        ("pppo", {}, "Unknown config key 'pppo'. Did you mean 'ppo'?"),
        ("seed", 1.5, "Config key 'seed' is 1.5 (float), but must be int: Seed of every random"),
        ("seed", -1, "Config key 'seed' is -1, but must be at least 0: Seed"),
        ("updates", True, "Config key 'updates' is True (bool), but must be int"),
        ("updates", 0, "Config key 'updates' is 0, but must be greater than 0: Number of updates."),
        ("seed", None, "Config key 'seed' is None (NoneType), but must be int"),
        ("updates", None, "Config key 'updates' is not set: give it a value (Number of updates.)"),
        ("ppo.clip", 1.0, "Config key 'ppo.clip' is 1.0, but must be in (0.0, 1.0): Clip range"),
        ("ppo.clip", "0.2", "Config key 'ppo.clip' is '0.2' (str), but must be float"),
        ("ppo.gamma", float("nan"), "Config key 'ppo.gamma' is nan, but must be in [0.0, 1.0]"),
        ("ppo.normalise", 1, "Config key 'ppo.normalise' is 1 (int), but must be bool"),
        ("ppo", 3, "Config key 'ppo' is 3, but must be a group with the keys clip, gamma, norm"),
        ("model.name", "cnn", "Config key 'model.name' is 'cnn', but must be one of 'mlp', 'tran"),
        ("model.sizes", (), "Config key 'model.sizes' is (), but must be not empty"),
        ("model.warm_start", 1, "Config key 'model.warm_start' is 1 (int), but must be str or No"),
        ("env.arguments", 1, "Config key 'env.arguments' is 1 (int), but must be dict"),
    ],
)
def test_bad_config(path, value, message):
    assert _message(schema.check, _changed(path, value), OPTIONS).startswith(message)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ppo.gamma", 1),  # An int where a float is asked for.
        ("model.sizes", [8]),  # A list where a tuple is asked for.
        ("model.warm_start", "runs/bc"),
        ("env.arguments", {"anything": {"goes": 1}}),
    ],
)
def test_good_config(path, value):
    schema.check(_config(), OPTIONS)
    schema.check(_changed(path, value), OPTIONS)


def test_missing_keys_and_all_mistakes_at_once():
    config = _config().to_dict()
    del config["ppo"]["clip"]
    del config["model"]
    config["seed"] = -1
    lines = _message(schema.check, ml_collections.ConfigDict(config), OPTIONS).split("\n")
    assert lines == [
        "Config key 'seed' is -1, but must be at least 0: Seed of every random draw.",
        "Config key 'ppo.clip' is missing: add it to the config (Clip range of the ratio.).",
        "Config key 'model' is missing: add it to the config (a group of keys).",
    ]


def test_describe_schema_lines_up():
    long = OPTIONS | {"z": Option((float,), dataclasses.MISSING, POSITIVE, "many words " * 15)}
    values = schema.complete({"env": {"arguments": {"a": 1}}}, long)
    lines = schema.describe(long, values, {"env.arguments": "It has a."}).split("\n")
    # Nine fields of a line each. The longest name, model.warm_start, has 16 letters, so meanings
    # start in column 18. That of z with its type, 188 letters, needs three lines of 82.
    assert len(lines) == 9 + 3 and max(map(len, lines)) <= 100
    assert "ppo.clip          Clip range of the ratio. (float; in (0.0, 1.0); value: 0.2)" in lines
    text = "env.arguments     Passed to the environment. It has a. (dict; value: {'a': 1})"
    assert text in lines
    assert all(line[:18].strip() in ("", "z") and line[18] != " " for line in lines[9:])


def test_json_round_trip():
    back = config_lib.from_json(config_lib.to_json(_config()))
    assert back.to_dict() == _config().to_dict()
    assert back.model.sizes == (64, 64) and isinstance(back.model.sizes, tuple)
    with pytest.raises(AttributeError):
        back.ppo.clp = 1  # Locked.
    assert json.loads(config_lib.to_json(_config()))["env"] == {"arguments": {}}
    assert "'x.f'" in _message(config_lib.to_json, ml_collections.ConfigDict({"x": {"f": {1}}}))
    assert "restore it or delete it" in _message(config_lib.from_json, "{")


def test_diff_configs():
    assert config_lib.diff_configs(_config(), _config()) == {}
    # A list equals the tuple, an int does not equal the float or the bool.
    assert config_lib.diff_configs(_config(), _changed("model.sizes", [64, 64])) == {}
    assert config_lib.diff_configs(_config(), _changed("seed", False)) == {"seed": (0, False)}
    changed = _changed("ppo.clip", 0.3)
    del changed.updates
    assert config_lib.diff_configs(_config(), changed) == {
        "ppo.clip": (0.2, 0.3),
        "updates": (100, "(absent)"),
    }


@pytest.mark.parametrize("name", tiny.FILES)
def test_what_is_none_can_be_given_on_the_command_line(name):
    def kinds(config, prefix=""):
        for key in config:
            if isinstance(config.get(key), ml_collections.ConfigDict):
                yield from kinds(config[key], f"{prefix}{key}.")
            else:
                yield prefix + key, config.get_type(key)

    config = config_lib.load_config(f"configs/{name}.py")
    assert [key for key, kind in kinds(config) if kind is type(None)] == []
