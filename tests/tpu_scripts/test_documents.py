"""The commands of the documents are accepted by the scripts."""

import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = ("docs/scaling.md", "tpu_scripts/README.md")
XPK = "project=p\nzone=us-central1-c\ncluster=c\nname=w\ntpu_type=tpu7x-16\nimage=registry/x\n"


def commands():
    """Returns the calls of a script in the documents, split into words."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`(tpu_scripts/\S+\.sh[^`]*)`", text)
        found += [shlex.split(line) for line in lines if "tpu_scripts/" in line]
    return found


CALLS = [words for words in commands() if words[0].startswith("tpu_scripts/")]


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_commands_are_accepted(cloud, words):
    scripts = cloud.checkout / "tpu_scripts"
    (scripts / "tpu.env").write_text((scripts / "tpu.env.example").read_text())
    (scripts / "xpk.env").write_text(XPK)
    (cloud.directory / "hosts.txt").write_text("alpha\nbeta\n")
    script, verb, *rest = words
    result = cloud.run(script.removeprefix("tpu_scripts/"), verb, "--dry_run", *rest)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_every_script_is_shown():
    shown = {word for words in commands() for word in words if word.startswith("tpu_scripts/")}
    assert {"tpu_scripts/tpu.sh", "tpu_scripts/xpk.sh", "tpu_scripts/gpu_hosts.sh"} < shown
    for path in shown - {"tpu_scripts/tpu.env"}:
        assert (ROOT / path).exists(), path


def test_files_that_are_linked_exist():
    for name in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(target).exists(), target
