"""The loop that carries a command through preemptions, against a fake queued resource."""

import time

TRAIN = ("--", "python", "-m", "experiments.train", "--config=x", "--workdir=gs://b/x")
GRANTED = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
# Runs until it is killed the first time, and ends with success from then on.
LONG_THEN_SUCCESS = """
[ -f "$FAKE_CLOUD/saved-$FAKE_HOST" ] && exit 0
touch "$FAKE_CLOUD/saved-$FAKE_HOST"
exec sleep 600
"""


def test_resume_alone_creates_sets_up_and_launches(cloud):
    cloud.write(requests=[GRANTED])
    result = cloud.tpu("resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["create", "scp", "setup", "launch"]
    assert "succeeded" in result.stdout and "still costs money" in result.stdout


def test_a_preempted_tpu_is_replaced_and_the_same_command_launched(cloud):
    cloud.write(requests=[[*GRANTED, "ACTIVE", "SUSPENDING", "SUSPENDED"], GRANTED])
    result = cloud.tpu("resume", *TRAIN, FAKE_TRAIN=LONG_THEN_SUCCESS)
    assert result.returncode == 0, result.stderr
    once = ["create", "scp", "setup", "launch"]
    assert cloud.verbs() == [*once, "delete", *once]
    assert "t has been preempted. Attempt 1 of 10" in result.stdout
    launches = [c for c in cloud.calls() if any(" launch " in word for word in c)]
    assert launches[0] == launches[1]


def test_resume_takes_over_a_tpu_that_is_suspended(cloud):
    cloud.write(states=["SUSPENDED"], requests=[GRANTED])
    result = cloud.tpu("resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["delete", "create", "scp", "setup", "launch"]


def test_resume_joins_a_run_that_is_going_on(cloud):
    cloud.write(states=["ACTIVE"])
    cloud.tpu("setup")
    cloud.tpu("launch", *TRAIN, FAKE_TRAIN="sleep 3; exit 0")
    cloud.clear_calls()
    result = cloud.tpu("resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == []


def test_failed_requests_are_repeated_within_a_limit(cloud):
    cloud.write(requests=[["FAILED"]] * 5, failure="no capacity")
    result = cloud.tpu("resume", "--max_retries=2", *TRAIN)
    assert result.returncode == 1
    # The first request and two more.
    assert cloud.verbs() == ["create", "delete", "create", "delete", "create"]
    assert "no capacity" in result.stderr and "--max_retries=2 is reached" in result.stderr


def test_refused_requests_are_repeated_within_a_limit(cloud):
    result = cloud.tpu("resume", "--max_retries=2", *TRAIN)
    assert result.returncode == 1
    assert cloud.verbs() == ["create"] * 3
    assert "RESOURCE_EXHAUSTED" in result.stderr


def test_a_command_that_fails_is_launched_again_within_a_limit(cloud):
    cloud.write(requests=[GRANTED])
    result = cloud.tpu("resume", "--max_relaunches=2", *TRAIN, FAKE_TRAIN="exit 7")
    assert result.returncode == 1
    assert cloud.verbs().count("launch") == 3
    assert cloud.verbs().count("create") == 1
    assert "--max_relaunches=2 is reached" in result.stderr and "still costs money" in result.stderr


def test_a_command_that_lives_on_some_workers_alone_is_stopped_first(cloud):
    cloud.write(requests=[GRANTED])
    train = """
    [ -f "$FAKE_CLOUD/saved-$FAKE_HOST" ] && exit 0
    touch "$FAKE_CLOUD/saved-$FAKE_HOST"
    case $FAKE_HOST in *1) exit 1 ;; esac
    exec sleep 600
    """
    result = cloud.tpu("resume", *TRAIN, FAKE_TRAIN=train)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["create", "scp", "setup", "launch", "stop", "launch"]


def test_a_tpu_that_was_deleted_is_not_brought_back(cloud):
    # Its deadline, or a person, has deleted it.
    cloud.write(requests=[[*GRANTED, "ACTIVE", "DELETING"], GRANTED])
    result = cloud.tpu("resume", *TRAIN, FAKE_TRAIN="exec sleep 600")
    assert result.returncode == 1
    assert "has been deleted" in result.stderr
    assert cloud.verbs().count("create") == 1


def test_the_end_of_flex_start_is_no_preemption(cloud):
    cloud.write(requests=[[*GRANTED, "SUSPENDED"], GRANTED])
    flags = ("--provisioning=flex-start", "--max_run_duration=1h")
    result = cloud.tpu("resume", *flags, *TRAIN, FAKE_TRAIN="exec sleep 600")
    assert result.returncode == 1
    assert "has run for 1h" in result.stderr
    assert cloud.verbs().count("create") == 1


def test_workers_that_never_answer_cost_a_retry(cloud):
    cloud.write(requests=[GRANTED] * 3, unreachable=1000, node="PREEMPTED")
    result = cloud.tpu("resume", "--max_retries=1", *TRAIN)
    assert result.returncode == 1
    assert cloud.verbs() == ["create", "delete", "create"]
    assert "do not answer" in result.stderr


def test_a_tpu_that_is_ready_is_not_deleted_when_ssh_fails(cloud):
    cloud.write(requests=[GRANTED, GRANTED], unreachable=8)
    result = cloud.tpu("resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs()[-3:] == ["scp", "setup", "launch"]
    assert "delete" not in cloud.verbs()


def test_stop_ends_resume_and_resume_continues_what_was_stopped(cloud):
    cloud.write(states=["ACTIVE"])
    cloud.tpu("setup")
    flags = ["--project=p", "--zone=z", "--name=t", "--accelerator_type=v5litepod-8", "--yes"]
    arguments = ["resume", *flags, "--poll_seconds=0.1", *TRAIN]
    with cloud.start("tpu.sh", *arguments, FAKE_TRAIN="exec sleep 600") as resume:
        while not (cloud.home("t1v-n-0-w-1") / "mmrl_run" / "pid").exists():
            time.sleep(0.05)
        # Each look makes two calls; of three looks, one is at the running command.
        seen = len(cloud.calls())
        while len(cloud.calls()) < seen + 6:
            time.sleep(0.05)
        cloud.tpu("stop")
        stdout, stderr = resume.communicate(timeout=60)
    assert resume.returncode == 0, stderr
    assert "The command was stopped." in stdout
    result = cloud.tpu("resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert "succeeded" in result.stdout


def test_an_unreadable_state_is_read_again(cloud):
    cloud.write(states=["ACTIVE"])
    # gcloud fails three times, as on a machine without a network.
    gcloud = cloud.directory / "bin" / "gcloud"
    gcloud.rename(cloud.directory / "bin" / "working_gcloud")
    count = cloud.directory / "count"
    cloud.add_program(
        "gcloud",
        f'echo x >> {count}; [ "$(wc -l < {count})" -gt 3 ] || exit 1; exec working_gcloud "$@"',
    )
    result = cloud.tpu("resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert "could not be read" in result.stderr
    assert cloud.verbs() == ["scp", "setup", "launch"]


def test_the_tpu_is_deleted_at_the_end_where_asked(cloud):
    cloud.write(requests=[GRANTED])
    result = cloud.tpu("resume", "--delete_when_done", *TRAIN, FAKE_TRAIN="echo bye; exit 0")
    assert result.returncode == 0, result.stderr
    # The log goes with the workers: it is printed first.
    assert cloud.verbs()[-2:] == ["logs", "delete"]
    assert "[worker 1] bye" in result.stdout
    assert cloud.state()["states"] == []


def test_giving_up_deletes_it_too_where_asked(cloud):
    cloud.write(requests=[GRANTED])
    flags = ("--delete_when_done", "--max_relaunches=0")
    result = cloud.tpu("resume", *flags, *TRAIN, FAKE_TRAIN="exit 1")
    assert result.returncode == 1
    assert cloud.verbs()[-1] == "delete"


def test_the_cost_of_all_retries_is_stated(cloud):
    result = cloud.tpu("resume", "--dry_run", "--max_retries=3", "--max_run_duration=2h", *TRAIN)
    # 8 chips x 1.20 x 2 hours x 4 TPUs = 76.80.
    assert "at most 2h, 4 times over: $76.80" in result.stdout


def test_a_dry_run_prints_what_a_preemption_brings_about(cloud):
    result = cloud.tpu("resume", "--dry_run", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == []
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    verbs = ["describe", "delete", "create", "describe", "mkdir", "archive", "scp", *["ssh"] * 3]
    assert len(lines) == len(verbs)
    for line, verb in zip(lines, verbs, strict=True):
        assert verb in line.split()
    assert "worker.sh setup tpu" in lines[-3] and "worker.sh launch" in lines[-1]


def test_resume_needs_a_command(cloud):
    result = cloud.tpu("resume")
    assert result.returncode == 1
    assert "the command to run is missing" in result.stderr
