import subprocess

import pytest

WAITING = "WAITING_FOR_RESOURCES"
GRANTED = [WAITING, "PROVISIONING", "ACTIVE"]


def test_create_waits_until_the_tpu_is_there(cloud):
    cloud.write(requests=[GRANTED])
    result = cloud.tpu("create")
    assert result.returncode == 0, result.stderr
    states = [line for line in result.stdout.splitlines() if line.startswith("t: ")]
    assert states == ["t: WAITING_FOR_RESOURCES", "t: PROVISIONING", "t: ACTIVE"]
    (create,) = [call for call in cloud.calls() if "create" in call]
    # The whole command, so that a flag that gcloud does not know cannot creep in.
    scripts = cloud.checkout / "tpu_scripts"
    assert create == [
        *("compute", "tpus", "queued-resources", "create", "t", "--project=p", "--zone=us-west4-a"),
        *("--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=t"),
        *("--valid-until-duration=86400s", "--spot"),
        "--metadata=mmrl-name=t,mmrl-zone=us-west4-a,mmrl-project=p,mmrl-max-run-seconds=86400",
        f"--metadata-from-file=startup-script={scripts}/deadline.sh",
    ]


def test_create_twice_creates_once(cloud):
    cloud.write(requests=[GRANTED, GRANTED])
    cloud.tpu("create")
    result = cloud.tpu("create")
    assert result.returncode == 0, result.stderr
    assert "there already" in result.stdout
    assert cloud.verbs() == ["create"]


def test_create_joins_a_request_that_is_waiting(cloud):
    cloud.write(states=GRANTED)
    result = cloud.tpu("create")
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == []


@pytest.mark.parametrize("provisioning", ["on-demand", "reserved", "flex-start"])
def test_each_provisioning_has_its_flags_and_a_deadline(cloud, provisioning):
    cloud.write(requests=[GRANTED])
    result = cloud.tpu("create", f"--provisioning={provisioning}", "--max_run_duration=3h")
    assert result.returncode == 0, result.stderr
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert "--spot" not in create
    assert ("--reserved" in create) == (provisioning == "reserved")
    # Three hours are 10800 seconds.
    service = "--max-run-duration=10800s" in create
    timer = any(word.endswith("mmrl-max-run-seconds=10800") for word in create)
    assert (service, timer) == ((True, False) if provisioning == "flex-start" else (False, True))
    # Only the alpha command has --max-run-duration.
    assert (create[0] == "alpha") == service
    assert ("--provisioning-model=flex-start" in create) == service


def test_a_failed_request_is_an_error_with_its_reason(cloud):
    cloud.write(requests=[[WAITING, "FAILED"]], failure="There is no more capacity.")
    result = cloud.tpu("create")
    assert result.returncode == 1
    assert "the request for t has failed: There is no more capacity." in result.stderr
    assert "tpu.sh delete" in result.stderr


def test_a_suspended_tpu_is_not_taken_for_one(cloud):
    cloud.write(states=["SUSPENDED"])
    result = cloud.tpu("create")
    assert result.returncode == 1
    assert "SUSPENDED" in result.stderr and "resume" in result.stderr
    assert cloud.verbs() == []


def test_a_state_that_cannot_be_read_creates_nothing(cloud):
    cloud.write(error="ERROR: (gcloud) PERMISSION_DENIED: no", requests=[GRANTED])
    result = cloud.tpu("create")
    assert result.returncode == 1
    assert "PERMISSION_DENIED" in result.stderr
    assert cloud.verbs() == []


def test_the_cost_is_stated_and_has_to_be_confirmed(cloud):
    cloud.write(requests=[GRANTED])
    flags = ("--project=p", "--zone=z", "--name=t", "--accelerator_type=v5p-16")
    result = cloud.run("tpu.sh", "create", *flags, "--max_run_duration=2d")
    assert result.returncode == 1
    # The size of v5p counts two cores a chip: 8 chips x 4.20 = 33.60; x 48 hours = 1612.80.
    assert "8 chips x $4.20 = $33.60 an hour" in result.stdout
    assert "$1612.80" in result.stdout
    assert "--yes" in result.stderr
    assert cloud.verbs() == []


def test_a_dry_run_prints_the_commands_and_calls_nothing(cloud):
    result = cloud.tpu("create", "--dry_run", "--service_account=it's@x")
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == []
    commands = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert [line.split()[4] for line in commands] == ["describe", "create", "describe"]
    # A shell reads the lines back as the words that would be passed.
    cloud.write(requests=[GRANTED])
    subprocess.run(["bash", "-c", commands[1]], env=cloud.env, check=True)
    assert "--service-account=it's@x" in cloud.calls()[-1]


def test_delete_is_forced_and_waits(cloud):
    cloud.write(states=["ACTIVE"])
    result = cloud.tpu("delete")
    assert result.returncode == 0, result.stderr
    assert cloud.state()["states"] == []
    assert cloud.verbs() == ["delete"]
    assert "does not exist" in cloud.tpu("delete").stdout
    assert cloud.verbs() == ["delete"]


def test_flags_override_the_env_file(cloud):
    env_file = cloud.directory / "my.env"
    env_file.write_text('# mine\n\nproject=p\nzone="us-east1-d"\nname=t\naccelerator_type=v6e-4\n')
    result = cloud.run(
        "tpu.sh", "create", f"--env_file={env_file}", "--zone=us-west4-a", "--dry_run"
    )
    assert result.returncode == 0, result.stderr
    assert "--zone=us-west4-a" in result.stdout and "us-east1-d" not in result.stdout
    assert "--accelerator-type=v6e-4 --runtime-version=v2-alpha-tpuv6e" in result.stdout


def test_the_example_env_file_serves_as_it_is(cloud):
    scripts = cloud.checkout / "tpu_scripts"
    (scripts / "tpu.env").write_text((scripts / "tpu.env.example").read_text())
    result = cloud.run("tpu.sh", "create", "--dry_run")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--project=p", "--name=t", "--accelerator_type=v6e-8"], "--zone is missing"),
        (["--zone=z", "--name=t", "--accelerator_type=v6e-8"], "--project is missing"),
        (["--zone=z", "--project=p", "--name=t"], "--accelerator_type is missing"),
        (["--accelerator_type=v5e-8"], "v5litepod-8"),
        (["--accelerator_type=v6e"], "must be a type with a size"),
        (["--accelerator_type=h100-8"], "the type 'h100' is not one of v5litepod v6e"),
        (["--accelerator_type=v5p-7"], "counts 2 cores a chip"),
        (["--accelerator_type=tpu7x-16"], "use xpk.sh"),
        (["--provisioning=cheap"], "must be spot, on-demand, reserved or flex-start"),
        (["--max_run_duration=8d"], "at most 7d"),
        (["--max_run_duration=1 day"], "a number with a unit"),
        (["--valid_until_duration=6"], "--valid_until_duration is '6'"),
        (["--zonne=z"], "there is no option 'zonne'"),
        (["--dry-run"], "there is no option 'dry-run'"),
        (["--yes=perhaps"], "must be true or false"),
        (["--zone"], "--zone needs a value"),
        (["--env_file=none.env"], "there is no such file"),
        (["us-west4-a"], "unexpected argument 'us-west4-a'"),
    ],
)
def test_bad_options_are_errors_that_name_them(cloud, flags, message):
    if not any(flag.startswith(("--project", "--name")) for flag in flags):
        required = ["--project=p", "--zone=z", "--name=t", "--accelerator_type=v6e-8"]
        flags = [*required, *flags]
    result = cloud.run("tpu.sh", "create", *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert cloud.calls() == []


def test_a_bad_line_of_the_env_file_is_named(cloud):
    env_file = cloud.directory / "my.env"
    env_file.write_text("project=p\nzone: z\n")
    result = cloud.run("tpu.sh", "status", f"--env_file={env_file}")
    assert result.returncode == 1
    assert "my.env, line 2: 'zone: z'" in result.stderr


def test_help_lists_every_option_with_its_default(cloud):
    text = cloud.run("tpu.sh", "--help").stdout
    assert "tpu.sh resume -- COMMAND" in text
    assert "  --max_run_duration=24h\n" in text and "  --env_file=tpu_scripts/tpu.env\n" in text
    assert "shellcheck" not in text
