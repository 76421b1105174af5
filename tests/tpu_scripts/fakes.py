"""Stands for gcloud, ssh, scp and the other programs that tpu_scripts/ call.

Run as `python fakes.py PROGRAM ARGUMENTS...` by the small scripts that `cloud.Cloud` puts first on
PATH. It records each call, and plays a queued resource and its workers: directories that serve as
home directories, in which the commands that are sent by ssh really run.

The directory $FAKE_CLOUD holds calls.jsonl, cloud.json (see `Cloud.write`) and hosts/.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])


def read() -> dict:
    return json.loads((CLOUD / "cloud.json").read_text())


def write(cloud: dict) -> None:
    (CLOUD / "cloud.json").write_text(json.dumps(cloud))


def flag(arguments: list[str], name: str, default: str = "") -> str:
    """Returns the value of --name=value."""
    values = [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]
    return values[-1] if values else default


def end_processes(home: pathlib.Path) -> None:
    """Kills what was launched on a host, as its deletion does."""
    pid = home / "mmrl_run" / "pid"
    if pid.exists():
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def on_host(name: str, command: str) -> int:
    """Runs a shell command on a host."""
    home = CLOUD / "hosts" / name
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HOME": str(home), "FAKE_HOST": name}
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode


def describe(arguments: list[str]) -> int:
    """Prints the next state of the queued resource; the last one stays."""
    cloud = read()
    if cloud.get("error"):
        print(cloud["error"], file=sys.stderr)
        return 1
    states = cloud["states"]
    if not states:
        print(
            "ERROR: (gcloud) NOT_FOUND: Resource 'queuedResources/x' was not found", file=sys.stderr
        )
        return 1
    if "failedData" in flag(arguments, "format"):
        print(cloud["failure"])
        return 0
    state = states.pop(0) if len(states) > 1 else states[0]
    # Deletion needs some time, and then there is nothing.
    if state == "DELETING":
        cloud["states"] = []
    write(cloud)
    print(state)
    return 0


def create() -> int:
    cloud = read()
    if cloud["states"]:
        print("ERROR: (gcloud) ALREADY_EXISTS", file=sys.stderr)
        return 1
    if not cloud["requests"]:
        print("ERROR: (gcloud) RESOURCE_EXHAUSTED: quota", file=sys.stderr)
        return 1
    cloud["states"] = cloud["requests"].pop(0)
    write(cloud)
    return 0


def delete(arguments: list[str]) -> int:
    if "--force" not in arguments or "--quiet" not in arguments:
        print("ERROR: (gcloud) FAILED_PRECONDITION: has nodes", file=sys.stderr)
        return 1
    cloud = read()
    cloud["states"] = ["DELETING"]
    write(cloud)
    for home in (CLOUD / "hosts").glob("*"):
        end_processes(home)
        shutil.rmtree(home)
    return 0


def workers(arguments: list[str]) -> list[str]:
    which, count = flag(arguments, "worker", "0"), read()["workers"]
    numbers = range(count) if which == "all" else [int(which)]
    return [f"t1v-n-0-w-{number}" for number in numbers]


def gcloud(arguments: list[str]) -> int:
    words = [a for a in arguments if a != "alpha"]
    if words[:3] == ["compute", "tpus", "queued-resources"]:
        verb = words[3]
        return {
            "describe": lambda: describe(words),
            "create": create,
            "delete": lambda: delete(words),
        }[verb]()
    if words[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        cloud = read()
        if cloud["unreachable"]:
            write({**cloud, "unreachable": cloud["unreachable"] - 1})
            return 255
        codes = [on_host(name, flag(words, "command")) for name in workers(words)]
        return next(filter(None, codes), 0)
    if words[:4] == ["compute", "tpus", "tpu-vm", "describe"]:
        print(read()["node"])
    if words[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
        for name in workers(words):
            home = CLOUD / "hosts" / name
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(words[4], home)
        return 0
    return 0


def main(program: str, arguments: list[str]) -> int:
    with (CLOUD / "calls.jsonl").open("a") as file:
        file.write(json.dumps([program, *arguments]) + "\n")
    if program == "gcloud":
        return gcloud(arguments)
    if program == "ssh":
        host, command = arguments[-2:]
        return 255 if host in read()["down"] else on_host(host.split("@")[-1], command)
    if program == "scp":
        source, destination = arguments[-2:]
        home = CLOUD / "hosts" / destination.split("@")[-1].rstrip(":")
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, home)
        return 0
    if program == "uv":
        if arguments[:2] == ["python", "find"]:
            print(sys.executable)
        return 0
    if program == "xpk" and arguments[:2] == ["workload", "list"]:
        print("Jobset Name  Created Time")
        for name in read()["workloads"]:
            print(f"{name}  2026-11-29T00:00:00Z")
        return 0
    if program == "srun":
        command = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
        return subprocess.run(arguments[command:]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
