"""A checkout with tpu_scripts/, and a cloud of fakes around it."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAKES = pathlib.Path(__file__).with_name("fakes.py")
TIMEOUT_S = 120
PROGRAMS = (
    "gcloud",
    "ssh",
    "scp",
    "uv",
    "xpk",
    "docker",
    "kubectl",
    "srun",
    "scontrol",
    "systemctl",
)

# Stands for `make setup`: its python runs the shell text in $FAKE_TRAIN as the command of a run.
BOOTSTRAP = """#!/bin/sh
mkdir -p .venv/bin
echo "$PYTHON" >> "$HOME/bootstrap.log"
cat > .venv/bin/python << 'END'
#!/bin/sh
case "$*" in
    *importlib.metadata*) echo 9.9.9 ;;
    *) echo "$@" && eval "$FAKE_TRAIN" ;;
esac
END
chmod +x .venv/bin/python
"""


def git(directory: pathlib.Path, *arguments: str) -> str:
    """Runs git in a directory and returns what it prints."""
    identity = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


class Cloud:
    """Fakes that are first on PATH, their state, and a checkout whose scripts call them.

    Attributes:
      checkout: git checkout with the real tpu_scripts/ and a stub of the package.
      hosts: directory with a home directory for each host that was reached.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.checkout = directory / "checkout"
        self.hosts = directory / "hosts"
        self.env = {
            **os.environ,
            "FAKE_CLOUD": str(directory),
            "FAKE_TRAIN": "exit 0",
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "HOME": str(directory / "home"),
            "TMPDIR": str(directory / "tmp"),
        }
        for name in ("bin", "home", "tmp", "hosts"):
            (directory / name).mkdir(parents=True)
        python = f"{shlex.quote(sys.executable)} -S -E {shlex.quote(str(FAKES))}"
        for program in PROGRAMS:
            self.add_program(program, f'exec {python} {program} "$@"')
        self.add_program("hostname", 'echo "${FAKE_HOST:-local}"')
        self.write(states=[], requests=[], workers=2, failure="", node="READY", unreachable=0)
        self.write(down=[], workloads=[])
        shutil.copytree(ROOT / "tpu_scripts", self.checkout / "tpu_scripts")
        (self.checkout / "tpu_scripts" / "tpu.env").unlink(missing_ok=True)
        (self.checkout / "tools").mkdir()
        (self.checkout / "tools" / "bootstrap.sh").write_text(BOOTSTRAP)
        (self.checkout / "requirements.lock").write_text("jax==9.9.9\n")
        git(self.checkout, "init", "--quiet")
        self.commit()

    def add_program(self, name: str, body: str) -> None:
        """Puts a program first on PATH; body is shell text."""
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def commit(self) -> str:
        """Commits everything in the checkout and returns the commit."""
        git(self.checkout, "add", "--all")
        git(self.checkout, "commit", "--quiet", "--message=x")
        return git(self.checkout, "rev-parse", "HEAD")

    def write(self, **values) -> None:
        """Sets values of the fakes' state.

        Args:
          **values: `states`, the states that the queued resource still goes through, empty where
            there is none; `requests`, such a list for each request that will be granted; `workers`,
            their number; `failure`, the reason of a FAILED request; `error`, what every describe
            fails with; `node`, the state of the TPU itself; `unreachable`, how many of the next
            calls of ssh fail; `down`, the hosts for which it fails; `workloads`, the names that
            xpk lists.
        """
        path = self.directory / "cloud.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**state, **values}))

    def state(self) -> dict:
        """Returns the fakes' state."""
        return json.loads((self.directory / "cloud.json").read_text())

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen:
        """Starts a script of tpu_scripts/, without a terminal."""
        return subprocess.Popen(
            [str(self.checkout / "tpu_scripts" / script), *arguments],
            env={**self.env, **env},
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        """Runs a script of tpu_scripts/ to its end."""
        with self.start(script, *arguments, **env) as process:
            try:
                stdout, stderr = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def tpu(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        """Runs tpu.sh on a TPU with tiny pauses."""
        command, *rest = arguments
        flags = (
            *("--project=p", "--zone=us-west4-a", "--name=t", "--accelerator_type=v5litepod-8"),
            *("--poll_seconds=0.02", "--cooldown_seconds=0", "--grace_seconds=5", "--yes"),
        )
        return self.run("tpu.sh", command, *flags, *rest, **env)

    def calls(self, program: str = "gcloud") -> list[list[str]]:
        """Returns the arguments of all calls of a program, in order."""
        path = self.directory / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == program]

    def verbs(self) -> list[str]:
        """Returns what gcloud was asked to do, without looking at states and reports."""
        verbs = []
        for call in self.calls():
            words = [word for word in call if word != "alpha"]
            verb = words[3]
            if verb == "ssh":
                text = next(word for word in words if word.startswith("--command="))
                verb = next(
                    (v for v in ("setup", "launch", "stop", "logs") if f" {v} " in text), ""
                )
            if verb and verb != "describe":
                verbs.append(verb)
        return verbs

    def clear_calls(self) -> None:
        """Forgets the calls so far."""
        (self.directory / "calls.jsonl").unlink(missing_ok=True)

    def home(self, name: str) -> pathlib.Path:
        """Returns the home directory of a host."""
        return self.hosts / name

    def log(self, name: str) -> str:
        """Returns the log of the command on a host."""
        return (self.home(name) / "mmrl_run" / "log.txt").read_text()
