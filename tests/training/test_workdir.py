"""Tests of working directories in a bucket, with damaged files, and with two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands import evaluate
from mmrl_jax.commands import train as train_command
from mmrl_jax.monitoring import metric_files, metrics
from mmrl_jax.runs import train
from mmrl_jax.training import checkpoint, lock
from tests import bucket, tiny
from tests.training.test_loop import rows, run, stored, toy


def test_a_run_in_a_bucket_is_written_resumed_and_evaluated(tmp_path, monkeypatch):
    bucket.install(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    config = tiny.config("mlp_ppo", **tiny.FAST, ppo__optimizer__schedule="constant")
    whole = train(config, "gs://b/whole")
    config.ppo.num_updates = 2
    train(config, "gs://b/parts")
    config.ppo.num_updates = 4
    parts = train(config, "gs://b/parts")
    assert parts.last.updates == 4
    carries = jax.device_get((whole.last.carry, parts.last.carry))
    jax.tree.map(np.testing.assert_array_equal, *carries)
    local = tmp_path / "b" / "parts"
    logged = metrics.read_jsonl("gs://b/parts/metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4]
    assert "final/train/return" in json.loads((local / "summary.json").read_text())
    assert (local / "learning_curves.png").stat().st_size > 1000
    assert list((local / "tensorboard").iterdir()) and not (local / "lock.json").exists()
    loaded = mmrl_jax.load("gs://b/parts")
    assert loaded.step == 4
    params = loaded.variables.params
    jax.tree.map(np.testing.assert_array_equal, params, parts.last.carry.learner.params)
    # Nothing was written as if the address were a path.
    assert not list(tmp_path.glob("gs*"))


def test_what_is_half_written_in_a_bucket_is_no_checkpoint(tmp_path, monkeypatch):
    bucket.install(monkeypatch, tmp_path)
    run(toy(num_updates=3, checkpoint_interval=1), "gs://b/run")
    assert checkpoint.saved_steps("gs://b/run") == [2, 3]
    (tmp_path / "b/run/checkpoints/3/commit_success.txt").unlink()
    assert checkpoint.saved_steps("gs://b/run") == [2]
    assert stored("gs://b/run", "latest") == (2.0, 2)
    assert run(toy(), "gs://b/run").updates == 4


def test_storage_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no support for s3://.*gs://"):
        run(toy(), "s3://bucket/run")
    monkeypatch.setattr(
        bucket._Backend, "makedirs", lambda *_, **__: (_ for _ in ()).throw(ImportError("no gcsfs"))
    )
    bucket.install(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"no gcsfs.*pip install gcsfs google-cloud-storage"):
        run(toy(), "gs://bucket/run")
    assert not list(tmp_path.iterdir())


def test_hosts_with_the_same_process_numbers_may_test_a_disk_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    failed = []

    def claim():
        try:
            for _ in range(200):
                workdir_lib.make_directory(workdir_lib.as_path(tmp_path))
        except ValueError as error:
            failed.append(error)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed and not list(tmp_path.iterdir())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def file_instead(path):
    shutil.rmtree(path)
    path.write_text("")


def stray(path):
    path.mkdir(exist_ok=True)
    (path / "5").write_text("a file with the name of a checkpoint")
    (path / "7").mkdir()
    (path / "007").mkdir()
    (path / "notes.txt").write_text("")
    (path / "old").mkdir()


DAMAGE = {
    "metrics_cut": ("metrics.jsonl", cut),
    "metrics_torn_line": ("metrics.jsonl", lambda p: p.write_bytes(b'{"ste\n' + p.read_bytes())),
    "metrics_no_text": ("metrics.jsonl", lambda p: p.write_bytes(p.read_bytes() + b"\xff\xfe\n")),
    "metrics_no_rows": ("metrics.jsonl", lambda p: p.write_text('[1]\n{"a": 1}\n{"step": "x"}\n')),
    "metrics_deleted": ("metrics.jsonl", lambda p: p.unlink()),
    "metrics_directory": ("metrics.jsonl", directory),
    "tensorboard_file": (
        "tensorboard",
        file_instead,
    ),
    "config_empty": ("config.json", lambda p: p.write_text("")),
    "config_cut": ("config.json", cut),
    "config_binary": ("config.json", lambda p: p.write_bytes(b"\xff\x00\xfe")),
    "config_deleted": ("config.json", lambda p: p.unlink()),
    "checkpoints_stray": ("checkpoints", stray),
    "lock_empty": ("lock.json", lambda p: p.write_text("")),
    "lock_binary": ("lock.json", lambda p: p.write_bytes(b"\xff")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_beside_damaged_files(kind, tmp_path, capsys):
    run(toy(num_updates=3, checkpoint_interval=1), tmp_path)
    name, damage = DAMAGE[kind]
    damage(tmp_path / name)
    result = run(toy(num_updates=4, checkpoint_interval=1), tmp_path)
    assert result.updates == 4 and float(result.carry.learner.params["w"][0]) == 4
    assert checkpoint.saved_steps(tmp_path)[-1] == 4 or kind == "checkpoints_stray"
    assert stored(tmp_path, 4) == (4.0, 4)
    assert rows(tmp_path)[-1]["step"] == 4
    text = capsys.readouterr().err
    if kind in ("metrics_torn_line", "metrics_no_text", "metrics_no_rows", "metrics_directory"):
        # What was there is kept beside, and what can be read is in the new file.
        assert "metrics.jsonl is damaged: it was moved to metrics.jsonl.damaged" in text
        assert (tmp_path / "metrics.jsonl.damaged").exists()
    if kind in ("metrics_torn_line", "metrics_no_text"):
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    if kind == "tensorboard_file":
        assert "tensorboard cannot be written" in text
    assert workdir_lib.stored_config(tmp_path).seed == 0


@pytest.mark.parametrize("kind", [k for k in DAMAGE if k.startswith("config")])
def test_a_damaged_config_does_not_let_another_run_in(kind, tmp_path):
    run(toy(), tmp_path)
    DAMAGE[kind][1](tmp_path / "config.json")
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        workdir_lib.claim_workdir(tmp_path, {"seed": 1})
    assert workdir_lib.stored_config(tmp_path).seed == 0
    # Where nothing was trained there is nothing to protect.
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.json").write_bytes(b"\xff")
    workdir_lib.claim_workdir(tmp_path / "fresh", {"seed": 1})
    assert workdir_lib.stored_config(tmp_path / "fresh").seed == 1


def test_a_damaged_table_of_evaluations_is_named(tmp_path):
    for content in (b"\xff", b"[]", b"{"):
        (tmp_path / "evaluation.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"evaluation.json cannot be read .* move it away"):
            evaluate._read_table(tmp_path / "evaluation.json")


def test_metrics_that_cannot_be_written_do_not_end_a_run(tmp_path, capsys):
    def evaluate_then_block(learner):
        n = int(learner.params["w"][0])
        if n == 2:
            (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
            (tmp_path / "metrics.jsonl").mkdir()
        if n == 4:
            (tmp_path / "metrics.jsonl").rmdir()
            (tmp_path / "kept").rename(tmp_path / "metrics.jsonl")
        return {}

    run(toy(num_updates=6, evaluate=evaluate_then_block), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 4, 5, 6]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1


_OWNER = """
import sys, time
from mmrl_jax.training import lock
with lock.locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """Returns a workdir that a living process has locked, and the process."""
    workdir = tmp_path_factory.mktemp("owned")
    child = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    yield workdir, child
    child.kill()
    child.wait()


def test_one_process_at_a_time_runs_in_a_workdir(owned, monkeypatch, capsys):
    workdir, child = owned
    message = rf"in use by process {child.pid} on {socket.gethostname()} \(since 20.*delete"
    with pytest.raises(ValueError, match=message):
        run(toy(), workdir)
    config = tiny.config("mlp_ppo", **tiny.FAST)
    flags = types.SimpleNamespace(
        config=config, workdir=str(workdir), accept_changes=[], profile=True
    )
    monkeypatch.setattr(train_command, "FLAGS", flags)
    with pytest.raises(SystemExit, match="error: Workdir .* is in use by process"):
        train_command.main(["train"])
    assert not (workdir / "config.json").exists()
    # A process that was killed, even one whose parent does not know yet, has no lock.
    os.kill(child.pid, signal.SIGKILL)
    while lock._started(child.pid) is not None:
        time.sleep(0.01)
    assert run(toy(), workdir).updates == 4
    assert f"from process {child.pid} on" in capsys.readouterr().err
    assert not (workdir / "lock.json").exists()


def other(**changes):
    owner = lock._this_process() | {"host": "elsewhere", "pid": 1, "since": "2026-01-01"}
    return json.dumps(owner | changes)


def test_the_number_of_a_process_may_be_another_ones_by_now(tmp_path):
    # This test's parent is alive, but did not start then.
    owner = other(host=socket.gethostname(), pid=os.getppid())
    (tmp_path / "lock.json").write_text(owner)
    assert run(toy(), tmp_path).updates == 4


def test_an_owner_on_another_host_is_gone_once_it_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "SILENCE_S", 0.3)
    path = tmp_path / "lock.json"
    path.write_text(other())
    assert run(toy(), tmp_path).updates == 4
    assert "Took over" in capsys.readouterr().err
    # One whose beats go on is not.
    monkeypatch.setattr(lock, "SILENCE_S", 30.0)
    path.write_text(other())
    timer = threading.Timer(0.2, lambda: path.write_text(other(beats=1)))
    timer.start()
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"):
        run(toy(num_updates=5), tmp_path)
    assert path.read_text() == other(beats=1)


def test_the_owner_beats_until_another_took_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    path = tmp_path / "lock.json"
    with lock.locked(tmp_path):
        while json.loads(path.read_text())["beats"] < 2:
            time.sleep(0.01)
        with lock._exclusive(workdir_lib.as_path(path)):
            path.write_text(other())
        time.sleep(0.1)
        assert path.read_text() == other()
        # The same process may lock it again within.
        with lock.locked(tmp_path):
            pass
    assert path.read_text() == other()


def test_a_bucket_gets_copies_of_the_metrics(tmp_path, monkeypatch):
    bucket.install(monkeypatch, tmp_path)
    files = metric_files.MetricFiles("gs://b/run", resume_step=None, tell=pytest.fail)
    files.append(1, {"loss/total": 1.0})
    path = tmp_path / "b/run/metrics.jsonl"
    assert not path.exists()
    files.flush()
    assert len(metrics.read_jsonl(path)) == 1
    monkeypatch.setattr(metric_files, "COPY_INTERVAL_S", 0.0)
    files.append(2, {"loss/total": 2.0})
    assert len(metrics.read_jsonl(path)) == 2
    files.close()
    again = metric_files.MetricFiles("gs://b/run", resume_step=1, tell=pytest.fail)
    again.append(2, {"loss/total": 3.0})
    again.close()
    assert [row["loss/total"] for row in metrics.read_jsonl(path)] == [1, 3]
