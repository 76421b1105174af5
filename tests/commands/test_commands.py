"""Tests that the README's command lines run, each in a process, at a tiny size."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from mmrl_jax import config as config_lib
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(900)  # Where nothing is cached, they compile for minutes.


def command(script: str) -> list[str]:
    """Returns the arguments of the README's first command line of a script."""
    (first, *_) = re.findall(rf"^python -m experiments\.{script} (.*)$", README, re.MULTILINE)
    return shlex.split(first)


def run(script: str, *arguments: str, cwd: pathlib.Path = ROOT) -> str:
    """Returns the output of a command, which must succeed and print no traceback."""
    call = [sys.executable, "-m", f"experiments.{script}", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def shrunk(arguments: list[str], workdir: pathlib.Path) -> list[str]:
    """Returns arguments of `train` with another workdir and overrides for a tiny config."""
    (path,) = (x.removeprefix("--config=") for x in arguments if x.startswith("--config="))
    # One stage and one update: each further program compiles for longer than it runs.
    own, small = config_lib.load_config(path), tiny.config(pathlib.Path(path).stem)
    small.stages, small.ppo.num_updates = ("ppo",), 1
    given = {x.split("=")[0].removeprefix("--config.") for x in arguments}
    changed = {
        key: value
        for key, value in config_lib.flatten(small).items()
        if value != config_lib.flatten(own)[key] and key not in given and key[:3] != "bc."
    }
    overrides = [f"--config.{key}={value}" for key, value in changed.items()]
    return [*at(arguments, workdir), *overrides]


def at(arguments: list[str], workdir: pathlib.Path) -> list[str]:
    """Returns the arguments with another workdir."""
    return [f"--workdir={workdir}" if x.startswith("--workdir=") else x for x in arguments]


def test_train_and_evaluate(tmp_path):
    text = run("train", *shrunk(command("train"), tmp_path))
    assert f"Outputs: {tmp_path}" in text
    assert json.loads((tmp_path / "config.json").read_text())["ppo"]["clip"] == 0.1
    table = run("evaluate", *at(command("evaluate"), tmp_path), "--episodes=4")
    for split in config_splits():
        assert re.search(rf"^{split} .*success", table, re.MULTILINE)


def config_splits() -> tuple[str, ...]:
    """Returns the splits of the README's environment."""
    from mmrl_jax import envs

    return envs.splits("language_reach")


STUDY = """
from tests import tiny

VARIANTS, SEEDS, MAIN = {"plain": {}}, 1, "final/train/return"


def get_config(variant="plain"):
    return tiny.config("mlp_ppo", **tiny.FAST, last__num_updates=2)
"""


def test_study(tmp_path):
    (tmp_path / "study.py").write_text(STUDY)
    text = run("study", f"--study={tmp_path / 'study.py'}", f"--directory={tmp_path}")
    assert "| plain |" in text and (tmp_path / "study" / "table.csv").is_file()


def test_every_script_that_the_readme_names_is_there_and_says_what_it_takes():
    named = set(re.findall(r"python -m (experiments\.\w+)", README))
    assert named >= {"experiments.train", "experiments.evaluate", "experiments.benchmark"}
    for script in named:
        path = ROOT / f"{script.replace('.', '/')}.py"
        assert f"python -m {script}" in path.read_text(encoding="utf-8").split('"""')[1]
