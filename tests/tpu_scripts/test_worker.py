"""What worker.sh and deadline.sh do by themselves, on one machine."""

import os
import signal
import time

import pytest


@pytest.mark.parametrize("code", [0, 3])
def test_foreground_keeps_the_exit_code(cloud, code):
    result = cloud.run("worker.sh", "foreground", "sh", "-c", f"echo out; exit {code}")
    assert (result.returncode, result.stdout) == (code, "out\n")


def test_foreground_passes_sigterm_on_and_reports_an_interruption(cloud):
    # As a run does: it saves, and ends with 0, which Kubernetes would take for the end.
    command = 'trap "sleep 0.2; echo saved; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
    with cloud.start("worker.sh", "foreground", "sh", "-c", command) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
    assert stdout == "saved\n"
    assert process.returncode == 143


def test_a_host_that_has_restarted_reports_a_failure(cloud):
    # The record says that a command was launched; no process holds the lock.
    record = cloud.directory / "home" / "mmrl_run"
    record.mkdir()
    (record / "digest").write_text("7\n")
    (record / "pid").write_text(f"{os.getpid()}\n")
    result = cloud.run("worker.sh", "status")
    assert result.stdout == "mmrl_host local none failed 7\n"


def test_an_unknown_command_is_an_error(cloud):
    result = cloud.run("worker.sh", "stat")
    assert result.returncode == 1
    assert "'stat' is not a command" in result.stderr


METADATA = """
case $* in
    *agent-worker-number*) echo "$WORKER" ;;
    *mmrl-max-run-seconds*) echo 3600 ;;
    *mmrl-name*) echo t ;;
    *mmrl-zone*) echo z ;;
    *mmrl-project*) echo p ;;
    *) exit 22 ;;
esac
"""


@pytest.fixture
def vm(cloud):
    """Runs deadline.sh as on a worker; returns the words of the timer that it sets."""
    cloud.add_program("curl", METADATA)
    cloud.add_program("systemd-run", 'for word in "$@"; do echo "$word"; done')
    file = cloud.directory / "deadline"

    def start(worker):
        environment = {"WORKER": worker, "MMRL_DEADLINE_FILE": str(file)}
        result = cloud.run("deadline.sh", **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    return start, file


def seconds(words):
    return int(words[1].removeprefix("--on-active=").removesuffix("s"))


def test_worker_0_deletes_the_tpu_at_its_deadline(vm):
    start, _ = vm
    words = start("0")
    assert words[0] == "--unit=mmrl-deadline"
    assert seconds(words) == 3600
    # Every ten minutes again, should it fail.
    assert words[2] == "--on-unit-inactive=600s"
    assert words[3].endswith("/gcloud")
    assert words[4:] == [
        *("compute", "tpus", "queued-resources", "delete", "t", "--project=p", "--zone=z"),
        *("--force", "--quiet", "--async"),
    ]


def test_the_other_workers_leave_it_to_worker_0(vm):
    start, file = vm
    assert start("3") == []
    assert not file.exists()


def test_a_restart_does_not_move_the_deadline(vm):
    start, file = vm
    file.write_text(f"{int(time.time()) + 100}\n")
    assert seconds(start("0")) <= 100
    file.write_text("1\n")
    assert seconds(start("0")) == 1
