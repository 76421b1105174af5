"""Tests of runs of several processes of which one is killed, stopped or cannot write."""

import contextlib
import random
import re
import resource
import signal
import time

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.monitoring import metrics
from mmrl_jax.training import checkpoint
from tests.distributed.processes import (
    assert_close,
    control_config,
    stored,
    train,
    train_in_processes,
)

LOST = "Terminating process because the JAX distributed service|has lost the connection to another"
# The number of updates in which a run is disturbed.
ENDLESS = {"last__num_updates": 100_000, "last__eval_interval": 100_000}


@contextlib.contextmanager
def begun(workdir, directory):
    """The processes of a run without an end, once it has a checkpoint."""
    with train(control_config(**ENDLESS), workdir, directory) as processes:
        processes.wait_until(lambda: len(checkpoint.saved_steps(workdir)) > 0)
        yield processes


def goes_on_as_if_undisturbed(workdir, directory, *, count=2):
    """Checks that a run resumes from its newest checkpoint to what it would have been."""
    done = checkpoint.saved_steps(workdir)[-1]
    config = control_config(last__num_updates=done + 2, last__eval_interval=100_000)
    outputs = train_in_processes(config, workdir, directory / "resumed", count=count)
    assert f"resumed after update {done} of {done + 2}" in outputs[0]
    train_in_processes(config, directory / "whole", directory / "undisturbed", count=count)
    parts, whole = (stored(config, x) for x in (workdir, directory / "whole"))
    assert parts.step == whole.step == done + 2
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((parts.variables, whole.variables)))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_kill_the_others_stop_and_the_same_command_resumes(victim, tmp_path):
    workdir = tmp_path / "run"
    with begun(workdir, tmp_path / "killed") as processes:
        processes.children[victim].kill()
        codes, outputs = processes.end(timeout=60)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, -signal.SIGKILL)
    assert re.search(LOST, outputs[1 - victim])
    goes_on_as_if_undisturbed(workdir, tmp_path)


@pytest.mark.slow
def test_ten_kills_of_four_processes_at_random_moments_change_nothing(tmp_path):
    workdir, choice = tmp_path / "run", random.Random(0)
    flags, steps = ("--initialization_timeout=20",), [0]
    for i in range(10):
        began = time.monotonic()
        with train(
            control_config(**ENDLESS), workdir, tmp_path / f"run_{i}", count=4, flags=flags
        ) as processes:
            if i == 0:
                # Later moments are during the start, the restoring or the updates.
                processes.wait_until(lambda: len(checkpoint.saved_steps(workdir)) > 0)
                longest = 1.5 * (time.monotonic() - began)
            else:
                time.sleep(choice.uniform(0, longest))
            victim = choice.randrange(4)
            processes.children[victim].kill()
            codes, outputs = processes.end(timeout=120)
        assert codes.pop(victim) == -signal.SIGKILL
        assert all(code not in (0, -signal.SIGKILL) for code in codes), outputs
        steps.append(checkpoint.saved_steps(workdir)[-1])
        assert steps[-1] >= steps[-2]
    assert len(set(steps)) > 3  # Some of the kills were after a new checkpoint.
    goes_on_as_if_undisturbed(workdir, tmp_path, count=4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_of_one_process_stops_all(victim, tmp_path):
    workdir = tmp_path / "run"
    with begun(workdir, tmp_path / "full") as processes:
        # No file of this process may have more bytes.
        limit = resource.RLIMIT_FSIZE, (3000, 3000)
        resource.prlimit(processes.children[victim].pid, *limit)
        codes, outputs = processes.end(timeout=60)
    assert codes[victim] == 1 and codes[1 - victim] != 0
    assert re.search(r"error: Checkpoint \d+ could not be written to .*run", outputs[victim])
    assert re.search(LOST, outputs[1 - victim])
    done = checkpoint.saved_steps(workdir)[-1]
    config = control_config(last__num_updates=done + 1, last__eval_interval=100_000)
    outputs = train_in_processes(config, workdir, tmp_path / "resumed")
    assert f"resumed after update {done} of {done + 1}" in outputs[0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_update(tmp_path):
    workdir = tmp_path / "run"
    with begun(workdir, tmp_path / "outputs") as processes:
        processes.children[1].terminate()
        codes, outputs = processes.end()
    assert codes == [0, 0], outputs
    assert "Training interrupted; the same command resumes it" in outputs[0]
    done = checkpoint.saved_steps(workdir)[-1]
    assert metrics.read_jsonl(workdir / metrics.JSONL_NAME)[-1]["step"] == done
    # One process with another number of devices resumes what two have saved.
    config = control_config(last__num_updates=done + 2, last__eval_interval=100_000)
    trained = mmrl_jax.train(problems.complete(config, {"mesh": {"data": 1}}), workdir)
    assert trained.last.updates == done + 2
    whole = mmrl_jax.train(problems.complete(config, {"mesh": {"data": 1}}), tmp_path / "whole")
    assert_close(trained.variables.params, whole.variables.params)
