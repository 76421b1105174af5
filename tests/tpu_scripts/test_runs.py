"""Set-up and launch on the workers of a TPU, with the real worker.sh on each."""

import pathlib
import re
import time

import pytest

TRAIN = ("--", "python", "-m", "experiments.train", "--config=x", "--workdir=gs://b/x")
W0, W1 = "t1v-n-0-w-0", "t1v-n-0-w-1"


@pytest.fixture
def tpu(cloud):
    """A cloud with a TPU of two workers that is set up."""
    cloud.write(states=["ACTIVE"])
    result = cloud.tpu("setup")
    assert result.returncode == 0, result.stderr
    cloud.clear_calls()
    return cloud


def wait_for(outcome, cloud, *names):
    """Waits until the record of each worker says how the command has ended."""
    names = names or (W0, W1)
    files = [cloud.home(name) / "mmrl_run" / "outcome" for name in names]
    for _ in range(600):
        outcomes = [file.read_text().strip() for file in files if file.exists()]
        if len(outcomes) == len(files) and all(outcomes):
            assert outcomes == [outcome] * len(files)
            return
        time.sleep(0.05)
    raise AssertionError(f"{outcomes}, {cloud.log(W0)}")


def states(cloud):
    """Returns the state of the command on each worker, as the user sees it."""
    result = cloud.tpu("status")
    assert result.returncode == 0, result.stderr
    return [line.split(" run ")[1] for line in result.stdout.splitlines()[1:]]


def test_setup_installs_the_lock_and_jax_for_tpus_on_all_workers(cloud):
    cloud.write(states=["ACTIVE"])
    result = cloud.tpu("setup")
    assert result.returncode == 0, result.stderr
    installs = [call for call in cloud.calls("uv") if call[:2] == ["pip", "install"]]
    assert len(installs) == 2
    for call in installs:
        # 9.9.9 is what the lock of the fake checkout has installed.
        assert call[4:] == [
            *("-r", "requirements.lock", "jax[tpu]==9.9.9", "gcsfs", "google-cloud-storage")
        ]
    for name in (W0, W1):
        assert (cloud.home(name) / "bootstrap.log").read_text().count("\n") == 1
        assert (cloud.home(name) / "mmrl_jax" / "tpu_scripts" / "tpu.sh").exists()
        assert not list(cloud.home(name).glob("*.tar.gz"))


def test_setup_twice_copies_once(tpu):
    result = tpu.tpu("setup")
    assert result.returncode == 0, result.stderr
    assert "already" in result.stdout
    assert tpu.verbs() == []


def test_setup_of_a_new_commit_replaces_its_files_and_no_others(tpu):
    (tpu.checkout / "old.txt").write_text("x")
    tpu.commit()
    tpu.tpu("setup")
    code = tpu.home(W0) / "mmrl_jax"
    assert (code / "old.txt").exists()
    (code / "runs").mkdir()
    (code / "runs" / "checkpoint").write_text("x")
    (tpu.checkout / "old.txt").unlink()
    commit = tpu.commit()
    tpu.tpu("setup")
    assert not (code / "old.txt").exists()
    assert (code / "runs" / "checkpoint").exists()
    assert (code / ".setup_key").read_text().strip() == f"tpu-{commit}"


def test_setup_warns_of_changes_that_are_not_copied_and_of_a_missing_timer(cloud):
    cloud.write(states=["ACTIVE"])
    (cloud.checkout / "requirements.lock").write_text("changed\n")
    cloud.add_program("systemctl", "exit 3")
    result = cloud.tpu("setup")
    assert result.returncode == 0, result.stderr
    assert "without the uncommitted changes" in result.stderr
    assert "no timer that deletes t after 24h" in result.stdout


def test_launch_needs_a_setup(cloud):
    cloud.write(states=["ACTIVE"])
    result = cloud.tpu("launch", *TRAIN)
    assert result.returncode == 1
    assert "'tpu.sh setup' first" in result.stderr


def test_launch_runs_on_all_workers_and_returns_at_once(tpu):
    # Longer than the scripts may take here, so that a launch that waits for the command fails.
    result = tpu.tpu("launch", *TRAIN, FAKE_TRAIN="exec sleep 600")
    assert result.returncode == 0, result.stderr
    assert states(tpu) == ["running", "running"]
    for name in (W0, W1):
        assert "-m experiments.train --config=x --workdir=gs://b/x --distributed" in tpu.log(name)


def test_launch_twice_starts_once(tpu):
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN="exec sleep 600")
    result = tpu.tpu("launch", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert "running already" in result.stdout
    assert tpu.verbs() == ["launch"]
    assert tpu.log(W0).count("== ") == 1


def test_another_command_is_refused_while_one_runs(tpu):
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN="exec sleep 600")
    result = tpu.tpu("launch", *TRAIN, "--config.seed=1")
    assert result.returncode == 1
    assert "another command is running" in result.stderr
    (tpu.checkout / "new").write_text("x")
    tpu.commit()
    result = tpu.tpu("setup")
    assert result.returncode == 1
    assert "'tpu.sh stop' saves a checkpoint" in result.stderr


def test_a_command_that_has_succeeded_is_not_repeated_unasked(tpu):
    tpu.tpu("launch", *TRAIN)
    wait_for("0", tpu)
    assert "ended with success" in tpu.tpu("launch", *TRAIN).stdout
    assert tpu.log(W0).count("== ") == 1
    tpu.tpu("launch", "--rerun", *TRAIN)
    wait_for("0", tpu)
    assert tpu.log(W0).count("== ") == 2


def test_a_command_that_has_failed_is_launched_again(tpu):
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN="exit 3")
    wait_for("3", tpu)
    assert states(tpu) == ["failed", "failed"]
    tpu.tpu("launch", *TRAIN)
    wait_for("0", tpu)


def test_arguments_reach_the_workers_unchanged(tpu):
    words = ["it's", "a  b", "$HOME", "*", '"', "", "--x=`ls`;"]
    tpu.tpu("launch", "--", "sh", "-c", 'printf "<%s>\\n" "$@"', "sh", *words)
    wait_for("0", tpu)
    lines = re.findall(r"^<(.*)>$", tpu.log(W0), flags=re.MULTILINE)
    # What is not a command of mmrl_jax gets no flags either.
    assert lines == words


def test_a_local_workdir_is_refused(cloud):
    for words in (["--workdir=runs/x"], ["--workdir", "runs/x"]):
        result = cloud.tpu("launch", "--", "python", "-m", "experiments.train", *words)
        assert result.returncode == 1
        assert "--workdir=runs/x is lost with the TPU" in result.stderr
    assert cloud.calls() == []


def test_stop_interrupts_the_command_which_is_no_success(tpu):
    # As a run does: it saves, and ends with 0.
    train = 'trap "echo saved; exit 0" TERM; while :; do sleep 0.05; done'
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN=train)
    result = tpu.tpu("stop")
    assert result.returncode == 0, result.stderr
    wait_for("interrupted", tpu)
    assert states(tpu) == ["stopped", "stopped"]
    assert "saved" in tpu.log(W0) and "saved" in tpu.log(W1)
    assert "nothing is running" in tpu.tpu("stop").stdout


def test_stop_kills_what_does_not_end(tpu):
    train = 'trap "" TERM; while :; do sleep 0.05; done'
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN=train)
    result = tpu.tpu("stop", "--grace_seconds=0")
    assert "killing it" in result.stdout
    for _ in range(100):
        if states(tpu) == ["stopped", "stopped"]:
            return
    raise AssertionError("still running")


def test_what_a_command_leaves_behind_ends_with_it(tpu):
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN="sleep 600 & echo $! > $HOME/left; exit 0")
    wait_for("0", tpu)
    pid = int((tpu.home(W0) / "left").read_text())
    stat = pathlib.Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("still there")


def test_logs_are_labelled_with_their_worker(tpu):
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN="echo hello; exit 0")
    wait_for("0", tpu)
    assert "[worker 0] hello" in tpu.tpu("logs").stdout
    everything = tpu.tpu("logs", "--worker=all", "--lines=1").stdout.splitlines()
    assert sorted(everything) == ["[worker 0] hello", "[worker 1] hello"]


def test_logs_follow_until_the_command_ends(tpu):
    train = 'echo first; until [ -f "$FAKE_CLOUD/go" ]; do sleep 0.05; done; echo last; exit 0'
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN=train)
    with tpu.start("tpu.sh", "logs", "--project=p", "--zone=z", "--name=t") as logs:
        lines = iter(logs.stdout)
        assert any("first" in line for line in lines)
        (tpu.directory / "go").touch()
        assert any("last" in line for line in lines)
    assert logs.returncode == 0


def test_logs_of_nothing_are_an_error(tpu):
    result = tpu.tpu("logs")
    assert result.returncode == 1
    assert "nothing has been launched" in result.stderr


def test_a_worker_that_does_not_answer_is_an_error(tpu):
    tpu.write(unreachable=1000)
    for command in (["status"], ["setup"], ["launch", *TRAIN]):
        result = tpu.tpu(*command)
        assert result.returncode == 1
        assert "not every" in result.stderr
    assert tpu.verbs().count("launch") == 0


def test_workers_that_end_apart_are_one_run(tpu):
    train = "case $FAKE_HOST in *0) exit 0 ;; *) exec sleep 600 ;; esac"
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN=train)
    wait_for("0", tpu, W0)
    assert states(tpu) == ["succeeded", "running"]
    assert "running already" in tpu.tpu("launch", *TRAIN).stdout


def test_a_run_on_some_workers_alone_is_not_joined(tpu):
    tpu.tpu("launch", *TRAIN, FAKE_TRAIN="case $FAKE_HOST in *0) exec sleep 600;; *) exit 1;; esac")
    wait_for("1", tpu, W1)
    result = tpu.tpu("launch", *TRAIN)
    assert result.returncode == 1
    assert "only some hosts are running" in result.stderr
