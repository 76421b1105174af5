import pytest

TRAIN = ("--", "python", "-m", "experiments.train", "--config=x", "--workdir=gs://b/x")
CLUSTER = ["--cluster=c", "--project=p", "--zone=us-central1-c"]


@pytest.fixture
def xpk(cloud):
    """A cloud whose `xpk` calls xpk.sh."""

    def run(command, *arguments, **env):
        flags = ("--name=w", "--tpu_type=tpu7x-16", "--image=registry/mmrl_jax", "--yes")
        return cloud.run("xpk.sh", command, *CLUSTER, *flags, *arguments, **env)

    cloud.xpk = run
    return cloud


def test_image_is_built_from_the_commit(xpk):
    (xpk.checkout / "requirements.lock").write_text("not committed\n")
    xpk.add_program(
        "docker", 'echo "docker $*"; case $1 in build) tar -xzO requirements.lock ;; esac'
    )
    result = xpk.xpk("image")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    image = lines[-1].removeprefix("Pushed ").removesuffix(".")
    assert image.startswith("registry/mmrl_jax:") and len(image.split(":")[1]) == 12
    assert lines[0] == f"docker build --file=tpu_scripts/Dockerfile --tag={image} -"
    assert lines[1] == "jax==9.9.9"
    assert lines[2] == f"docker push {image}"


@pytest.mark.parametrize(
    ("flags", "capacity"),
    [
        ([], "--spot"),
        (["--provisioning=on-demand"], "--on-demand"),
        (["--provisioning=flex-start"], "--flex"),
        (["--provisioning=reserved", "--reservation=r"], "--reservation=r"),
    ],
)
def test_create_states_the_cost(xpk, flags, capacity):
    result = xpk.xpk("create", *flags)
    assert result.returncode == 0, result.stderr
    # The size of tpu7x counts two cores a chip: 8 x 12.00.
    assert "8 chips x $12.00 = $96.00 an hour" in result.stdout
    assert xpk.calls("xpk") == [
        ["cluster", "create", "--tpu-type=tpu7x-16", "--num-slices=1", capacity, *CLUSTER]
    ]


def test_launch_submits_a_workload_that_restarts_after_an_interruption(xpk):
    result = xpk.xpk("launch", *TRAIN)
    assert result.returncode == 0, result.stderr
    call = xpk.calls("xpk")[-1]
    assert call[:2] == ["workload", "create"]
    assert {"--workload=w", "--max-restarts=10", "--termination-grace-period-seconds=120"} < set(
        call
    )
    command = next(word for word in call if word.startswith("--command="))
    # worker.sh turns the exit code of an interrupted run, 0, into 143.
    assert command == (
        "--command=exec bash /mmrl_jax/tpu_scripts/worker.sh foreground "
        "python -m experiments.train --config=x --workdir=gs://b/x --distributed"
    )


def test_launch_twice_submits_once(xpk):
    xpk.write(workloads=["w2", "w"])
    result = xpk.xpk("launch", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert "there already" in result.stdout
    assert [call[1] for call in xpk.calls("xpk")] == ["list"]
    xpk.write(workloads=["w2"])
    xpk.xpk("launch", *TRAIN)
    assert xpk.calls("xpk")[-1][1] == "create"


def test_logs_are_of_worker_0_or_of_all(xpk):
    assert xpk.xpk("logs").returncode == 0
    assert xpk.calls("gcloud")[0][:4] == ["container", "clusters", "get-credentials", "c"]
    selector = "--selector=jobset.sigs.k8s.io/jobset-name=w"
    assert f"{selector},batch.kubernetes.io/job-completion-index=0" in xpk.calls("kubectl")[0]
    assert xpk.xpk("logs", "--worker=all").returncode == 0
    assert selector in xpk.calls("kubectl")[1]


def test_stop_and_delete_are_of_the_workload_and_of_the_cluster(xpk):
    xpk.xpk("stop")
    xpk.xpk("delete")
    assert xpk.calls("xpk") == [
        ["workload", "delete", "--workload=w", "--force", *CLUSTER],
        ["cluster", "delete", *CLUSTER],
    ]


@pytest.mark.parametrize(
    "command", ["image", "create", "launch", "logs", "status", "stop", "delete"]
)
def test_a_dry_run_calls_nothing(xpk, command):
    result = xpk.xpk(command, "--dry_run", *(TRAIN if command == "launch" else ()))
    assert result.returncode == 0, result.stderr
    assert result.stdout
    for program in ("xpk", "docker", "kubectl", "gcloud"):
        assert xpk.calls(program) == []


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("create", ["--cluster="], "--cluster is missing"),
        ("create", ["--tpu_type=v9-8"], "--tpu_type: the type 'v9' is not one of"),
        ("create", ["--provisioning=reserved"], "--reservation is missing"),
        ("launch", ["--", "python", "-m", "x", "--workdir=runs/x"], "is lost with the container"),
        ("launch", [], "the command to run is missing"),
        ("logs", ["--worker=3"], "must be 0 or all"),
    ],
)
def test_bad_options_are_errors_that_name_them(xpk, command, flags, message):
    result = xpk.xpk(command, *flags)
    assert result.returncode == 1
    assert message in result.stderr
