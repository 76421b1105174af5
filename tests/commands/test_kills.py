"""Tests of runs that are killed, or interrupted by a signal, at any time."""

import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import config as config_lib
from mmrl_jax.commands import common
from mmrl_jax.training import checkpoint
from tests import tiny

_CHILD = """
import sys
import mmrl_jax
from tests.commands import test_kills
mmrl_jax.train(test_kills.config_of(sys.argv[1], int(sys.argv[2])), sys.argv[3])
"""


def config_of(name, updates):
    changes = tiny.FAST if name == "mlp_ppo" else {}
    return tiny.config(name, last__num_updates=updates, last__eval_interval=5, **changes)


def killed(name, updates, workdir, wait):
    """Starts the run and kills it; returns its newest checkpoint at that time, or None."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, name, str(updates), str(workdir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait(child)
        assert child.poll() is None, "It ended before it was killed."
    finally:
        child.kill()
        child.wait()
    steps = checkpoint.saved_steps(workdir)
    return steps[-1] if steps else None


@pytest.mark.parametrize(
    ("name", "kills"),
    [("mlp_ppo", 3), pytest.param("reach_ppo_scratch", 20, marks=pytest.mark.slow)],
)
def test_kills_at_random_moments_change_nothing(name, kills, tmp_path):
    rng, updates = random.Random(0), 20 * kills
    reached = []

    def at_start(_):
        time.sleep(rng.uniform(0, 10))  # Imports, compiles, restores.

    def at_work(child):
        newest = reached[-1] if reached else 0
        # However long a busy machine takes: the test's own limit ends it.
        while not any(step > newest for step in checkpoint.saved_steps(tmp_path / "killed")):
            assert child.poll() is None, "It ended without a checkpoint."
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # Updates, evaluates, writes checkpoints.

    for i in range(kills):
        wait = at_start if i % 4 == 3 else at_work
        reached.append(killed(name, updates, tmp_path / "killed", wait) or 0)
    assert reached == sorted(reached) and 0 < reached[-1] < updates
    print(f"killed with these checkpoints there: {reached}")
    config = config_of(name, updates)
    resumed, whole = (
        mmrl_jax.train(config, tmp_path / folder).last for folder in ("killed", "whole")
    )
    assert resumed.updates == whole.updates == updates
    carries = jax.device_get((resumed.carry, whole.carry))
    jax.tree.map(np.testing.assert_array_equal, *carries)


def test_an_interrupted_command_ends_with_an_exit_code_of_its_own(tmp_path):
    small = config_of("mlp_ppo", 10**6)
    own = config_lib.flatten(config_lib.load_config("mlp_ppo"))
    overrides = [
        f"--config.{key}={value}"
        for key, value in config_lib.flatten(small).items()
        if value != own[key]
    ]
    call = [sys.executable, "-m", "experiments.train", "--config=mlp_ppo", *overrides]
    child = subprocess.Popen([*call, f"--workdir={tmp_path}"], stdout=subprocess.PIPE, text=True)
    while not checkpoint.saved_steps(tmp_path):
        assert child.poll() is None, "It ended without a checkpoint."
        time.sleep(0.01)
    child.terminate()
    output, _ = child.communicate()
    # `train && evaluate` must not evaluate a run that is not finished.
    assert child.returncode == common.EXIT_INTERRUPTED == 143
    assert "interrupted; the same command resumes it" in output
    assert not (tmp_path / "summary.json").exists()
