"""Tests of runs of several processes on this machine, which are started by the real command."""

import hashlib
import json
import math
import re
import socket
import threading
import time
import types

import jax
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems, runs
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost, rendezvous
from mmrl_jax.distributed.rows import BatchRows, join_shares, strided_shares
from mmrl_jax.monitoring import metrics
from mmrl_jax.training import checkpoint, dispatch
from tests import episodes, processors, tiny
from tests.distributed.processes import (
    Processes,
    assert_close,
    control_config,
    free_port,
    stored,
    train,
    train_in_processes,
)
from tests.problems import test_demonstration_data as demonstrations
from tests.tasks.test_folder import folder


def rows(workdir):
    return metrics.read_jsonl(workdir / metrics.JSONL_NAME)


def timeless(row):
    return {name: x for name, x in row.items() if not name.startswith("time/")}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_learn_what_one_does(count, tmp_path):
    config = control_config()
    one, two = tmp_path / "one", tmp_path / "several"
    outputs = train_in_processes(config, two, tmp_path / "outputs", count=count)
    trained = mmrl_jax.train(problems.complete(config, {"mesh": {"data": 4}}), one)
    loaded = stored(config, two)
    assert loaded.step == 2
    assert_close(loaded.variables.params, trained.variables.params)
    # The first process alone wrote the files, and all of them.
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert [row["step"] for row in rows(two)] == [0, 1, 2]
    for a, b in zip(rows(one), rows(two), strict=True):
        assert timeless(a) == pytest.approx(timeless(b), rel=1e-3, abs=1e-5)
    assert f"Devices: 4 of 4 (cpu, {count} processes)" in outputs[0]
    assert ["Training done" in x for x in outputs] == [True] + [False] * (count - 1)


def meet_in_threads(calls, *, timeout_s=1.0):
    """Returns what `meet` raises for each (number of processes, number of this process)."""
    address, results = f"127.0.0.1:{free_port()}", [None] * len(calls)

    def meet(i):
        try:
            rendezvous.meet(address, *calls[i], timeout_s=timeout_s)
        except rendezvous.ProcessesMissing as error:
            results[i] = str(error)

    threads = [threading.Thread(target=meet, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet_or_all_know_who_is_missing():
    assert meet_in_threads([(3, 1), (3, 0), (3, 2)], timeout_s=60) == [None] * 3
    for text in meet_in_threads([(4, 0), (4, 2)]):
        assert re.search("2 of 4 processes .* within 1 s. Missing: process 1, 3. Check", text)
    (text,) = meet_in_threads([(2, 1)])
    assert re.search("Process 0 did not answer process 1 at .*127.0.0.1:.* within 1 s", text)
    for text in meet_in_threads([(3, 0), (3, 1), (3, 1)], timeout_s=60):
        assert "Two processes were started with --process_id=1" in text
    for text in meet_in_threads([(3, 0), (2, 1)], timeout_s=60):
        assert "--num_processes=2, but process 0 with --num_processes=3" in text


def test_the_meeting_ignores_other_programs():
    port, results = free_port(), []
    thread = threading.Thread(
        target=lambda: results.append(rendezvous.meet(f"127.0.0.1:{port}", 2, 0, timeout_s=60))
    )
    thread.start()
    for junk in (b"GET / HTTP/1.1\r\n\r\n\n", b'{"process_id": 1}\n', b""):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(junk)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
    rendezvous.meet(f"127.0.0.1:{port}", 2, 1, timeout_s=60)
    thread.join()
    assert results == [None]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "--coordinator_address and --process_id must be given too"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id=2 must be at least 0 and below --num_processes=2",
        ),
        (
            {"coordinator_address": "a", "num_processes": 2, "process_id": 1},
            "--coordinator_address='a' must have the form HOST:PORT",
        ),
        ({"distributed": True, "process_id": 1}, "automatically: omit --process_id, or give all"),
        ({"distributed": True}, "neither a TPU pod nor a Slurm job is around"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_flags_are_errors_that_name_them(flags, message):
    with pytest.raises(ValueError, match=message):
        multihost.initialize(**flags)


def test_one_process_needs_no_connection():
    multihost.initialize()
    multihost.initialize(coordinator_address="nowhere:1", num_processes=1, process_id=0)
    assert multihost.is_primary() and not jax.distributed.is_initialized()


def test_a_slurm_job_is_found(monkeypatch):
    slurm = {"JOB_ID": 7, "STEP_NODELIST": "node[3-4]", "NTASKS": 2, "PROCID": 1, "LOCALID": 0}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    met, connected = [], []
    monkeypatch.setattr(rendezvous, "meet", lambda *x, **options: met.append(x))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *x, **y: connected.append((x, y)))
    multihost.initialize(distributed=True)
    assert met == [("node3:61447", 2, 1)] and connected[0][0] == met[0]
    assert connected[0][1]["local_device_ids"] == [0]
    assert connected[0][1]["heartbeat_timeout_seconds"] == multihost.HEARTBEAT_S


@pytest.fixture
def as_process_1_of_3(monkeypatch):
    """Makes this process believe that it is process 1 of 3; returns what the others send."""
    others = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    def gather(array):
        zero, two = others.pop(0)
        return np.stack([np.asarray(x) for x in (zero, array, two)])

    monkeypatch.setattr(multihost, "gather", gather)
    return others


def test_what_fails_in_one_process_fails_in_all(as_process_1_of_3, capsys):
    others, passing, fatal = as_process_1_of_3, 1, 2

    def fail():
        raise OSError("gone")

    others += [(0, 0)]
    assert multihost.on_all(lambda: "read") == "read"
    for states, transient in (((0, passing), True), ((passing, fatal), False)):
        others += [states]
        with pytest.raises(multihost.OtherProcessFailed, match="Process 0, 2|Process 2") as caught:
            multihost.on_all(lambda: "read", transient=(OSError,))
        assert caught.value.transient == dispatch.is_transient(caught.value) == transient
    # The own error is raised, unless another process cannot try again.
    for states, expected in (((0, 0), OSError), ((fatal, 0), multihost.OtherProcessFailed)):
        others += [states]
        with pytest.raises(expected) as caught:
            multihost.on_all(fail, transient=(OSError,))
        assert dispatch.is_transient(caught.value) == (expected is OSError)
    assert "Process 1: gone" in capsys.readouterr().err
    others += [(False, True), (False, False)]
    assert [multihost.any_process(False) for _ in range(2)] == [True, False]


def test_only_errors_of_jax_are_a_lost_connection(as_process_1_of_3):
    gloo = "UNKNOWN: Gloo AllGather failed: [...] Connection closed by peer [127.0.0.1]:940"
    assert multihost.is_lost(ValueError(gloo)) and not dispatch.is_transient(ValueError(gloo))
    judge = ConnectionError("HTTPConnectionPool: the connection to the judge was refused")
    assert not multihost.is_lost(judge) and dispatch.is_transient(judge)


def test_lists_and_texts_are_compared_with_process_0(as_process_1_of_3):
    others = as_process_1_of_3
    others += [(3, 1), ([3, 4, 5, 6], [1, 4, 0, 0])]
    assert multihost.from_primary([4, 5]) == [4, 5, 6]
    one, two = (
        np.array([list(hashlib.blake2b(x, digest_size=8).digest()) for x in texts], np.uint8)
        for texts in ((b"a", b"b"), (b"a", b"other"))
    )
    others += [(one, one), (one, two)]
    multihost.check_same({"config": "a", "inputs": "b"})
    with pytest.raises(ValueError, match="Process 2 has another inputs than process 0"):
        multihost.check_same({"config": "a", "inputs": "b"})


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def test_rows_are_shared_among_the_processes_that_hold_them(as_process_1_of_3, monkeypatch):
    def placed(*devices):
        """Places 4 rows on devices, given as pairs of a process and a slice of the rows."""
        index = {Device(p): (rows,) for p, rows in devices}
        sharding = types.SimpleNamespace(devices_indices_map=lambda shape: index)
        monkeypatch.setattr(mesh_lib, "batch_sharding", lambda mesh, axis: sharding)
        return BatchRows(None, 4)

    rows = placed((0, slice(0, 1)), (1, slice(1, 2)), (2, slice(2, 3)), (1, slice(3, None)))
    assert rows.held.tolist() == [1, 3] and [x.tolist() for x in rows.shares] == [[0], [1, 3], [2]]
    assert rows.share.tolist() == [0, 1]
    everything = slice(None)
    rows = placed((0, everything), (1, everything), (2, everything))
    assert rows.held.tolist() == [0, 1, 2, 3]
    assert [x.tolist() for x in rows.shares] == [[0, 3], [1], [2]] and rows.share.tolist() == [1]
    as_process_1_of_3.append((np.array([10.0, 13.0]), np.array([12.0, 0.0])))
    np.testing.assert_array_equal(join_shares(np.array([11.0]), rows.shares), [10, 11, 12, 13])
    assert [x.tolist() for x in strided_shares(4)] == [[0, 3], [1], [2]]


@pytest.mark.slow
def test_a_process_that_never_starts_is_named(tmp_path):
    flags = ("--initialization_timeout=3",)
    with train(
        control_config(), tmp_path / "run", tmp_path, count=3, ids=(0, 2), flags=flags
    ) as processes:
        codes, outputs = processes.end()
    assert codes == [1, 1]
    for text in outputs:
        (line,) = text.strip().splitlines()
        assert line.startswith("error: 2 of 3 processes have started within 3 s. Missing: proc")
        assert "Missing: process 1." in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def make_folder_config(tmp_path_factory):
    """Returns a config of prompts from a folder with reward functions, and its images."""
    model = processors.save_decoder(tmp_path_factory.mktemp("llama"))
    images = folder(tmp_path_factory.mktemp("pictures"), count=12)
    sgd = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant"}

    def make(images=images, **changes):
        settled = {"last__num_updates": 2, "last__optimizer": sgd, "last__trainable": ".*"}
        return tiny.folder_config(model, images, **settled | changes)

    return make


STALE = {"last__one_step_off_policy": True, "last__importance_weight_cap": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ((4, 1, 1), {}),
        ((1, 4, 1), {}),
        ((1, 2, 2), {}),
        ((1, 1, 2), {}),  # Both processes hold all rows.
        # The rewards of a process are there before its devices have sampled the next completions.
        ((1, 4, 1), STALE | {"last__num_updates": 6, "dataset__completion_tokens": 32}),
    ],
    ids=["4x1x1", "1x4x1", "1x2x2", "1x1x2", "one_step_off_policy"],
)
def test_host_rewards_in_two_processes(axes, changes, make_folder_config, tmp_path):
    mesh = dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
    config = problems.complete(make_folder_config(**changes), {"mesh": mesh})
    train_in_processes(config, tmp_path / "two", tmp_path / "outputs", devices=math.prod(axes))
    trained = mmrl_jax.train(config, tmp_path / "one")
    loaded = stored(config, tmp_path / "two")
    assert loaded.step == config.grpo.num_updates
    assert_close(loaded.variables, trained.variables)
    before = jax.tree.leaves(loaded.problem.initial_variables())
    after = jax.tree.leaves(loaded.variables)
    assert any(np.max(np.abs(x - y)) > 1e-3 for x, y in zip(before, after, strict=True))
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.get("completion/reward") == b.get("completion/reward")
        assert timeless(a) == pytest.approx(timeless(b), rel=1e-3, abs=1e-5)
    pages = [(tmp_path / name / "samples.html").read_text() for name in ("one", "two")]
    assert pages[0].replace("one", "two") == pages[1]
    summaries = [json.loads((tmp_path / x / "summary.json").read_text()) for x in ("one", "two")]
    assert [x["final/test/return"] for x in summaries] == [summaries[0]["final/test/return"]] * 2


@pytest.mark.slow
def test_labels_in_two_processes(make_folder_config, tmp_path):
    config = make_folder_config(
        stages=("sft",), last__batch_size=4, last__updates_per_dispatch=1, mesh__data=4
    )
    train_in_processes(config, tmp_path / "two", tmp_path / "outputs")
    trained = mmrl_jax.train(config, tmp_path / "one")
    assert_close(stored(config, tmp_path / "two").variables, trained.variables)


@pytest.mark.slow
def test_demonstrations_of_a_directory_in_two_processes(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    several = [demonstrations.episode(n, i) for i, n in enumerate((3, 5, 4))]
    directory = episodes.write(tmp_path / "demos", "rlds", several)
    sgd = {"name": "sgd", "learning_rate": 0.02, "schedule": "constant"}
    options = {"data": {"directory": str(directory)}, "optimizer": sgd, "num_updates": 3}
    config = demonstrations.config(flat=True, **options)
    config = problems.complete(config, {"mesh": {"data": 4}})
    train_in_processes(config, tmp_path / "two", tmp_path / "outputs")
    trained = mmrl_jax.train(config, tmp_path / "one")
    loaded = stored(config, tmp_path / "two")
    for part in ("params", "normalizer"):
        assert_close(*(getattr(x.variables, part) for x in (loaded, trained)))
    # A directory that is missing ends all of them.
    other = problems.complete(config, {"bc": {"data": {"directory": str(tmp_path / "none")}}})
    with train(other, tmp_path / "three", tmp_path / "errors") as processes:
        codes, outputs = processes.end()
    assert codes == [1, 1] and all("does not exist" in x for x in outputs), outputs


STAGES = {
    "reach_ppo": tiny.config,  # Cloning of recorded demonstrations, and PPO from pixels.
    "count_grpo": tiny.token_config,  # Fine-tuning on labels, and GRPO.
    "grid_agent_ppo": tiny.agent_config,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_all_stages_and_an_evaluation_in_two_processes(name, tmp_path):
    sgd = {"name": "sgd", "learning_rate": 0.02, "schedule": "constant"}
    first = mmrl_jax.get_config(name).stages[0]
    changes = {"last__num_updates": 2, "last__optimizer": sgd, f"{first}__optimizer": sgd}
    changes |= {"last__num_minibatches": 1}
    config = problems.complete(STAGES[name](name, **changes), {"mesh": {"data": 4}})
    train_in_processes(config, tmp_path / "two", tmp_path / "outputs")
    trained = mmrl_jax.train(config, tmp_path / "one")
    assert list(trained.results) == list(config.stages)
    for a, b in zip(rows(tmp_path / "one" / first), rows(tmp_path / "two" / first), strict=True):
        assert timeless(a) == pytest.approx(timeless(b), rel=1e-3, abs=1e-4)
    loaded = stored(config, tmp_path / "two")
    assert_close(
        *(getattr(x, "params", x) for x in (loaded.variables, trained.variables)),
    )
    arguments = [f"--workdir={tmp_path / 'two'}", "--split=train", "--episodes=6"]
    with Processes("evaluate", [arguments] * 2) as processes:
        codes, outputs = processes.end()
    assert codes == [0, 0] and "Wrote" in outputs[0] and "Wrote" not in outputs[1], outputs
    table = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    measured = loaded.evaluate("train", episodes=6)
    for metric, value in measured.items():
        assert table[f"train/{metric}"] == pytest.approx(value, rel=1e-3)


@pytest.mark.slow
def test_a_record_that_one_process_cannot_read_stops_all_with_what_was_learned(
    make_folder_config, tmp_path
):
    images = folder(tmp_path / "pictures", count=12)
    changes = {"images": images, "last__eval_interval": 100_000, "mesh__data": 4}
    config = make_folder_config(last__num_updates=100_000, **changes)
    workdir = tmp_path / "run"
    with train(config, workdir, tmp_path / "outputs") as processes:
        processes.wait_until(lambda: len(checkpoint.saved_steps(workdir)) > 0)
        # A batch of 4 of 8 records: it soon comes to this one, in one of the processes.
        record = runs.problems.make(config).records.train.names[0]
        image = images / f"a/{int(record.split(':')[1]) - 1}.png"
        content = image.read_bytes()
        image.unlink()
        codes, outputs = processes.end()
    assert codes == [1, 1], outputs
    assert "An update failed, and is retried" in outputs[0]
    assert sum("could be read when the data was opened" in x for x in outputs) >= 1
    done = checkpoint.saved_steps(workdir)[-1]
    for text in outputs:
        assert f"error: Stage 'grpo': update {done + 1} failed 4 times" in text
    image.write_bytes(content)
    config = make_folder_config(last__num_updates=done + 1, **changes)
    train_in_processes(config, workdir, tmp_path / "resumed")
    assert checkpoint.saved_steps(workdir)[-1] == done + 1


@pytest.mark.slow
def test_processes_that_do_not_share_config_or_workdir_are_refused(tmp_path):
    config = control_config()
    configs = [config, control_config(last__discount=0.5)]
    with train(configs, tmp_path / "run", tmp_path / "configs") as processes:
        codes, outputs = processes.end()
    assert codes == [1, 1], outputs
    for text in outputs:
        assert "error: Process 1 has another config than process 0" in text
    workdirs = [tmp_path / "first", tmp_path / "second"]
    with train(config, workdirs, tmp_path / "workdirs") as processes:
        codes, outputs = processes.end()
    assert codes == [1, 1], outputs
    assert "does not see it. Give a directory that all hosts share" in outputs[1]
    assert "Process 1 failed here; the reason is in its own output" in outputs[0]
