"""Tests that the documentation agrees with the code and that its references exist."""

import inspect
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from experiments import write_docs
from mmrl_jax import config as config_lib
from mmrl_jax import problems, rewards
from mmrl_jax.config import loading
from mmrl_jax.learners import registry
from mmrl_jax.tasks.reward_signatures import read_signature
from mmrl_jax.tasks.samples import read_sample

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
GENERATED = ("docs/metrics.md", "docs/configuration.md")
STAGES = {*registry.CONTROL, *registry.TOKEN}
MINE = {"--workdir=runs/mine", "--workdir=runs/bright"}  # Runs of the examples' own modules.
LINES = 180  # Of the README at most.


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return write_docs.documents()


@pytest.mark.parametrize("name", ["README.md", *write_docs.WRITTEN])
def test_what_is_generated_is_current(written, name):
    assert written[name] == TEXTS[name], "run python -m experiments.write_docs"


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= LINES


def anchors(text: str) -> set[str]:
    """Returns the anchors of the titles of a document, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_exists(name):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    assert links or name in GENERATED
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name} links to {link}"


def commands(text: str) -> list[list[str]]:
    """Returns the command lines in a document, split into words, without the program."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [
            shlex.split(line, comments=True) for line in lines if line.startswith("python -m")
        ]
    inline = re.findall(r"`(python -m experiments\.\w+ --[^`]*)`", text)
    return found + [shlex.split(line) for line in inline]


def configs_of(arguments: list[str]) -> list[str]:
    return [x.removeprefix("--config=") for x in arguments if x.startswith("--config=")]


def test_every_config_that_is_named_exists_and_has_the_keys_that_are_set():
    checked = 0
    for name, text in TEXTS.items():
        # Configs of the reader's own, which docs/extending.md shows, are not there.
        specs = set(re.findall(r"--config=([\w/:.]+\w)", text))
        specs |= set(re.findall(r"get_config\(\"(\w+)\"", text))
        specs = {spec for spec in specs if not spec.startswith("my_")}
        for spec in specs:
            problems.complete(config_lib.load_config(spec))
        for arguments in commands(text):
            for spec in set(configs_of(arguments)) & specs:
                config = problems.complete(config_lib.load_config(spec))
                loading.validate_overrides(arguments, config)
                checked += 1
        assert specs or name != "README.md"
    assert checked > 3


def test_every_key_that_is_named_by_itself_exists():
    rows = re.findall(r"^\| `([\w.<>]+)` \|", TEXTS["docs/configuration.md"], re.MULTILINE)
    known = {key.replace("<stage>", stage) for key in rows for stage in STAGES}
    known |= {key.rpartition(".")[0] for key in known} | {"model.kind"}  # Which titles have.
    groups = {key.partition(".")[0] for key in known} | {"rl", "folder", "warm_start"}
    for name in set(DOCUMENTS) - set(GENERATED):
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", TEXTS[name]):
            if key.partition(".")[0] in groups and not key.endswith(
                (".py", ".md", ".json", ".jsonl")
            ):
                assert key in known, f"{name} names {key}"


def test_every_script_and_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for name, text in TEXTS.items():
        for script in re.findall(r"python -m experiments\.(\w+)", text):
            assert (ROOT / "experiments" / f"{script}.py").is_file(), f"{name} names {script}"
        for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
            assert target in targets, f"{name} names make {target}"
        for study in re.findall(r"--study=([\w/]+\.py)", text):
            assert (ROOT / study).is_file(), f"{name} names {study}"


def test_the_tiers_of_the_architecture_are_those_that_lint_checks():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (x["layers"] for x in contracts if x["id"] == "tiers")
    names = [name for layer in layers for name in re.findall(r"\w+", layer)]
    package = ROOT / "mmrl_jax"
    present = [x for x in names if (package / x).is_dir() or (package / f"{x}.py").is_file()]
    (block,) = re.findall(r"^```\n(commands/.*?)^```$", TEXTS["docs/architecture.md"], re.M | re.S)
    assert re.findall(r"^(\w+)", block, re.M) == present


def test_an_unknown_or_unended_table_is_named():
    with pytest.raises(ValueError, match="no table 'speed'"):
        write_docs.with_tables("<!-- table: speed -->\n<!-- /table -->")
    with pytest.raises(ValueError, match="1 tables begin, but 0 end"):
        write_docs.with_tables("<!-- table: count -->\n")


def test_the_records_and_reward_functions_of_the_documentation_are_some():
    text = TEXTS["docs/data.md"]
    blocks = re.findall(r"^ *```json\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    short, same = ([json.loads(x) for x in block.splitlines()] for block in blocks)
    assert (
        len(short) == 2 and len({read_sample(record, {})[:3] for record in [*same, short[0]]}) == 1
    )
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    space: dict = {}
    exec(block, space)
    kinds = {x: read_signature(x, space[x]).batched for x in ("length", "valid_json", "solved")}
    assert kinds == {"length": False, "valid_json": False, "solved": True}
    assert space["solved"](["2", "x"], ["2", None]) == [1.0, None]
    rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    ready = {name: options for name, options in rows if hasattr(rewards, name)}
    public = {
        name for name, x in vars(rewards).items() if getattr(x, "__module__", 0) == rewards.__name__
    }
    assert set(ready) == public and len(public) == 8
    for name, options in ready.items():
        for option in re.findall(r"`([a-z_]+)`", options):
            assert option in inspect.signature(getattr(rewards, name)).parameters


@pytest.mark.slow
def test_the_examples_of_extending_train(tmp_path):
    text = TEXTS["docs/extending.md"]
    blocks = re.findall(r"^```python\n# (my_\w+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for name, block in blocks:
        block = block.replace('"num_updates": 200', '"num_updates": 2')
        (tmp_path / name).write_text(block.replace('"probe_interval": 20', '"probe_interval": 1'))
    paths = [str(ROOT), str(tmp_path)]
    kept = {name: x for name, x in os.environ.items() if name.startswith("JAX_")}
    for arguments in (x for x in commands(text) if set(x) & MINE):
        done = subprocess.run(
            [sys.executable, *arguments[1:]],
            cwd=tmp_path,
            env={"PYTHONPATH": ":".join(paths), "PATH": "", "HOME": str(tmp_path)} | kept,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "probe/parameter_norm" in (tmp_path / "runs/mine/metrics.jsonl").read_text()
    assert (tmp_path / "runs/mine/evaluation.json").is_file()
    assert (tmp_path / "runs/bright/summary.json").is_file()
