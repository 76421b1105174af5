import signal

TRAIN = ("python", "-m", "experiments.train", "--config=x", "--workdir=/shared/x")


def job(cloud):
    """Environment of the batch script of a job that was submitted from the checkout."""
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\neval "$FAKE_TRAIN"\n')
    python.chmod(0o755)
    # Slurm runs a copy.
    script = cloud.checkout / "tpu_scripts" / "slurm.sbatch"
    script.chmod(0o755)
    return {"SLURM_SUBMIT_DIR": str(cloud.checkout), "SLURM_JOB_ID": "42"}


def test_the_command_runs_under_srun_and_finds_its_processes_itself(cloud):
    result = cloud.run("slurm.sbatch", *TRAIN, **job(cloud))
    assert result.returncode == 0, result.stderr
    assert cloud.calls("srun") == [["--kill-on-bad-exit=1", *TRAIN, "--distributed"]]
    assert result.stdout.strip() == " ".join(TRAIN[1:]) + " --distributed"
    assert cloud.calls("scontrol") == []


def test_its_failure_is_the_failure_of_the_job(cloud):
    result = cloud.run("slurm.sbatch", *TRAIN, **job(cloud), FAKE_TRAIN="exit 5")
    assert result.returncode == 5
    assert cloud.calls("scontrol") == []


def test_before_the_time_limit_it_saves_and_is_queued_again(cloud):
    # srun hands the signal on; here it is the process itself.
    cloud.add_program(
        "srun", 'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
    )
    with cloud.start("slurm.sbatch", *TRAIN, **job(cloud)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        stdout, stderr = process.communicate(timeout=60)
    assert (stdout, process.returncode) == ("saved\n", 0), stderr
    assert cloud.calls("scontrol") == [["requeue", "42"]]


def test_without_a_command_or_slurm_it_says_so(cloud):
    result = cloud.run("slurm.sbatch", **job(cloud))
    assert result.returncode == 2
    assert "the command to run is missing" in result.stderr
    result = cloud.run("slurm.sbatch", *TRAIN, SLURM_SUBMIT_DIR="")
    assert "submit this file with sbatch" in result.stderr
