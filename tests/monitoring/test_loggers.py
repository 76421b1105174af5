"""Tests of loggers, with the real packages in offline mode if they are installed."""

import json
import sys
import types

import pytest

from mmrl_jax.monitoring import loggers
from mmrl_jax.monitoring.metrics import MetricWriter, read_jsonl


class Recorded(types.ModuleType):
    """A package with the interface of wandb and trackio that records its calls."""

    def __init__(self, name, failing=False):
        super().__init__(name)
        self.calls, self.failing = [], failing

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return self

    def log(self, values, step):
        if self.failing:
            raise OSError("no network")
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def write(workdir, made):
    with MetricWriter(
        workdir,
        total_steps=2,
        max_wall_s=None,
        resume_step=None,
        console_names=(),
        console_interval_s=10.0,
        loggers=made,
        tensorboard=False,
    ) as writer:
        writer.write(1, {"lr": 0.5, "loss/total": float("nan")})
        writer.write(2, {"lr": 0.25})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_and_config_arrive(name, tmp_path, monkeypatch):
    module = Recorded(name)
    monkeypatch.setitem(sys.modules, name, module)
    config = {"ppo": {"clip": 0.2}}
    made = loggers.make(("tensorboard", name), tmp_path, label="ppo", config=config)
    write(tmp_path, made)
    (_, arguments), *rest = module.calls
    assert arguments["project"] == "mmrl_jax" and arguments["config"] == {"ppo.clip": 0.2}
    assert arguments["name"] == f"{tmp_path.name}-ppo" and arguments["resume"] == "allow"
    assert rest == [("log", 1, {"lr": 0.5}), ("log", 2, {"lr": 0.25}), ("finish",)]
    assert not (tmp_path / "tensorboard").exists()


def test_a_logger_that_fails_ends_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Recorded("wandb", failing=True))
    made = loggers.make(("wandb",), tmp_path, label="", config={})
    write(tmp_path, made)
    assert capsys.readouterr().err.count("A logger failed, and the run continues: no network") == 1
    assert [row["lr"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0.5, 0.25]


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="run.loggers has 'wandb'.*pip install wandb"):
        loggers.make(("wandb",), tmp_path, label="", config={})


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, loggers.make(("wandb",), tmp_path, label="ppo", config={"seed": 1}))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_the_real_trackio_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # It is read by the import.
    pytest.importorskip("trackio")
    write(tmp_path, loggers.make(("trackio",), tmp_path, label="ppo", config={"seed": 1}))
    assert list((tmp_path / "trackio").glob("mmrl_jax*.db"))


def test_the_rows_on_disk_are_the_same_without_loggers(tmp_path):
    write(tmp_path, ())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
