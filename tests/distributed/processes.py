"""Runs of several processes on this machine, which are started by the real command."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np

from mmrl_jax import config as config_lib
from mmrl_jax import problems, restoring
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import pathlib
from mmrl_jax.config import from_json

def get_config():
    return from_json(pathlib.Path({path!r}).read_text())
"""


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


class Processes:
    """The processes of one command.

    Args:
      script: Name of the command.
      arguments: Flags of each process.
      ids: Numbers of the processes that start; None for all.
      devices: Number of simulated devices of all processes.
    """

    def __init__(self, script, arguments, *, ids=None, devices=4):
        port, count = free_port(), len(arguments)
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count} "
            "--xla_backend_optimization_level=0",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        self.children, self._lines, self._readers = [], [], []
        for i in range(count) if ids is None else ids:
            command = [
                sys.executable, "-m", f"experiments.{script}", *arguments[i],
                f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}",
                f"--process_id={i}",
            ]  # fmt: skip
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                env=environment,
            )  # fmt: skip
            self.children.append(child)
            self._lines.append([])
            reader = threading.Thread(target=self._lines[-1].extend, args=(child.stdout,))
            self._readers.append(reader)
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for child, reader in zip(self.children, self._readers, strict=True):
            child.kill()
            child.wait()
            reader.join()

    def end(self, timeout=None):
        """Returns exit codes and outputs, as soon as all processes have ended."""
        for child, reader in zip(self.children, self._readers, strict=True):
            child.wait(timeout)
            reader.join()
        return [child.returncode for child in self.children], self.outputs()

    def outputs(self):
        return ["".join(lines) for lines in self._lines]

    def wait_until(self, condition):
        while not condition():
            assert all(child.poll() is None for child in self.children), self.outputs()
            time.sleep(0.02)


def train(config, workdir, directory, *, count=2, flags=(), **options):
    """Starts the processes of a run; its config and workdir may be lists with one for each."""
    directory.mkdir(parents=True, exist_ok=True)
    configs = config if isinstance(config, list) else [config] * count
    workdirs = workdir if isinstance(workdir, list) else [workdir] * count
    arguments = []
    for i in range(count):
        path = directory / f"config_{i}.py"
        path.with_suffix(".json").write_text(config_lib.to_json(configs[i]))
        path.write_text(CONFIG.format(path=str(path.with_suffix(".json"))))
        arguments.append([f"--config={path}", f"--workdir={workdirs[i]}", *flags])
    return Processes("train", arguments, **options)


def train_in_processes(config, workdir, directory, **options):
    """Trains in several processes, which must succeed; returns their output."""
    with train(config, workdir, directory, **options) as processes:
        codes, outputs = processes.end()
    assert codes == [0] * len(codes), outputs
    assert not any("Traceback" in x for x in outputs), outputs
    return outputs


def control_config(**changes):
    """Returns a tiny config on all devices; plain SGD, which does not amplify rounding."""
    sgd = {"name": "sgd", "learning_rate": 0.02, "schedule": "constant"}
    small = tiny.FAST | {"last__num_updates": 2, "last__optimizer": sgd}
    config = tiny.config("mlp_ppo", **small | changes)
    return problems.complete(config, {"mesh": {"data": 0}})


def stored(config, workdir, *, step=None):
    """Returns the variables in the newest checkpoint of a run, on one device of this process."""
    problem = problems.make(problems.complete(config, {"mesh": dict(data=1, fsdp=1, tensor=1)}))
    return restoring.restore(problem, config.stages[-1], workdir, which=str(step or "latest"))


def assert_close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        *jax.device_get((a, b)),
    )
