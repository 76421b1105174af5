import pytest

TRAIN = ("--", "python", "-m", "experiments.train", "--config=x", "--workdir=/shared/x")


@pytest.fixture
def hosts(cloud):
    """A cloud with a file of two hosts; `run` calls gpu_hosts.sh with it."""
    (cloud.directory / "hosts.txt").write_text("# ours\nme@alpha  # the first\n\nbeta\n")

    def run(command, *arguments, **env):
        flags = ("--hosts=hosts.txt", "--poll_seconds=0.02", "--cooldown_seconds=0")
        return cloud.run("gpu_hosts.sh", command, *flags, "--grace_seconds=5", *arguments, **env)

    cloud.gpu = run
    return cloud


def test_each_host_is_told_its_place(hosts):
    assert hosts.gpu("setup").returncode == 0
    result = hosts.gpu("launch", *TRAIN)
    assert result.returncode == 0, result.stderr
    common = "--workdir=/shared/x --coordinator_address=alpha:8476 --num_processes=2"
    assert f"{common} --process_id=0" in hosts.log("alpha")
    assert f"{common} --process_id=1" in hosts.log("beta")
    assert {call[-2] for call in hosts.calls("ssh")} == {"me@alpha", "beta"}
    installs = [call for call in hosts.calls("uv") if call[:2] == ["pip", "install"]]
    assert len(installs) == 2 and all("jax[cuda13]==9.9.9" in call for call in installs)


def test_one_host_needs_no_coordinator(hosts):
    (hosts.directory / "hosts.txt").write_text("alpha\n")
    hosts.gpu("setup")
    result = hosts.gpu("launch", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert hosts.log("alpha").splitlines()[-1] == " ".join(TRAIN[2:])


def test_the_coordinator_can_have_another_address(hosts):
    flags = ("--coordinator_address=10.0.0.1", "--coordinator_port=1234", "--dry_run")
    result = hosts.gpu("launch", *flags, *TRAIN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--coordinator_address=10.0.0.1:1234") == 2
    assert hosts.calls("ssh") == []


def test_setup_and_launch_twice_do_it_once(hosts):
    hosts.gpu("setup")
    hosts.gpu("launch", *TRAIN, FAKE_TRAIN="exec sleep 600")
    assert "already" in hosts.gpu("setup").stdout
    assert "running already" in hosts.gpu("launch", *TRAIN).stdout
    assert len(hosts.calls("scp")) == 2
    assert hosts.log("beta").count("== ") == 1
    status = hosts.gpu("status").stdout.splitlines()
    assert len(status) == 2 and all(line.endswith("run running") for line in status)


def test_resume_launches_again_after_a_failure(hosts):
    train = (
        'saved="$FAKE_CLOUD/saved-$FAKE_HOST"; [ -f "$saved" ] && exit 0; touch "$saved"; exit 1'
    )
    result = hosts.gpu("resume", *TRAIN, FAKE_TRAIN=train)
    assert result.returncode == 0, result.stderr
    assert "Attempt 1 of 3" in result.stdout and "succeeded" in result.stdout
    # The same hosts: set up once.
    assert len(hosts.calls("scp")) == 2


def test_resume_gives_up_within_its_limits(hosts):
    result = hosts.gpu("resume", "--max_relaunches=1", *TRAIN, FAKE_TRAIN="exit 1")
    assert result.returncode == 1
    assert "--max_relaunches=1 is reached" in result.stderr
    hosts.write(down=["beta"])
    result = hosts.gpu("resume", "--max_relaunches=1", *TRAIN)
    assert result.returncode == 1
    assert "does not answer" in result.stderr


def test_a_host_that_is_down_is_an_error(hosts):
    hosts.write(down=["beta"])
    result = hosts.gpu("setup")
    assert result.returncode == 1
    assert "not every host answers" in result.stderr


def test_logs_of_one_host_and_of_all(hosts):
    hosts.gpu("setup")
    hosts.gpu("resume", *TRAIN, FAKE_TRAIN="echo hello; exit 0")
    assert hosts.gpu("logs", "--worker=1", "--lines=1").stdout == "[beta] hello\n"
    lines = hosts.gpu("logs", "--worker=all", "--lines=1").stdout.splitlines()
    assert sorted(lines) == ["[alpha] hello", "[beta] hello"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hosts="], "--hosts is missing"),
        (["--hosts=none"], "there is no file 'none'"),
        (["--worker=2"], "must be all or less than 2"),
        (["--worker=first"], "must be all or less than 2"),
        (["--zone=z"], "there is no option 'zone'"),
    ],
)
def test_bad_options_are_errors_that_name_them(hosts, flags, message):
    result = hosts.gpu("logs", *flags)
    assert result.returncode == 1
    assert message in result.stderr
