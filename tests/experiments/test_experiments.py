"""End-to-end tests of the scripts in experiments/ at a tiny size."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments import quickstart, quickstarts
from mmrl_jax import config as config_lib
from mmrl_jax import envs, problems, runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands import common, evaluate, train
from mmrl_jax.distributed import multihost
from mmrl_jax.evaluation import evaluate as evaluation_lib
from mmrl_jax.training import checkpoint, loop
from tests import tiny

SPLITS = envs.splits("language_reach")[:2]  # Each compiles a reset of its own.
MODALITIES = ("pixels", "instruction", "proprio")
ENDS = ("", "_lo", "_hi")
pytestmark = pytest.mark.timeout(900)  # Where nothing is cached, the first compiles for minutes.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs a quickstart; returns (workdir, summary, number of traces of an evaluation)."""
    workdir = tmp_path_factory.mktemp("quickstart")
    traced = []
    evaluation = evaluation_lib.evaluate

    def counted(*arguments):
        traced.append(arguments)
        return evaluation(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_lib, "evaluate", counted)
        patch.setattr(envs, "splits", lambda name: SPLITS)
        problem = problems.make(tiny.config())
        with runs.claim(problem, workdir):
            summary = quickstart.quickstart(problem, workdir)
    return workdir, summary, len(traced)


def test_quickstart_writes_every_number(finished):
    workdir, summary, traced = finished
    measured = [
        "expert/train",
        "chance/train/random_object",
        "chance/train/fixed_object",
        *(f"warm_start/{split}" for split in SPLITS),
        "more_cloning/train",
        *(f"final/{split}" for split in SPLITS),
        "final/train/shuffled_pixels",
        "final/train/shuffled_instruction",
    ]
    stages = ("warm_start", "ppo", "more_cloning")
    times = {"wall_s", "compile_s", *(f"{stage}/wall_s" for stage in stages)}
    expected = {f"{name}/success{end}" for name in measured for end in ENDS} | times
    assert set(summary) == expected | {"env_steps", "env_steps_per_s"}
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in measured:
        value, low, high = (summary[f"{name}/success{end}"] for end in ENDS)
        assert 0 <= low <= value <= high <= 1
    assert summary["wall_s"] > summary["compile_s"] + sum(summary[f"{s}/wall_s"] for s in stages)
    assert summary["env_steps_per_s"] == summary["env_steps"] / summary["ppo/wall_s"]
    # 4 updates of 4 steps, which are one episode of 16, in 8 environments: none only reset.
    assert summary["env_steps"] == 128
    # One program during each stage, one for all learners at the end, one for scripted policies.
    assert traced == 3 + 2


def test_quickstart_draws_every_picture(finished):
    workdir = finished[0]
    places = (workdir, workdir / "bc", workdir / "more_cloning")
    curves = [place / "learning_curves.png" for place in places]
    for path in (*curves, workdir / "success.png", workdir / "episode.png"):
        assert path.stat().st_size > 1000
    assert (workdir / "episodes.mp4").exists() or (workdir / "episodes.gif").exists()


def test_quickstart_again_trains_nothing(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "again"
    shutil.copytree(finished[0], workdir)
    before = {p: p.read_bytes() for p in workdir.rglob("metrics.jsonl")}
    for name in ("evaluate_scripted", "evaluate_stages"):
        monkeypatch.setattr(quickstart, name, lambda *_: None)
    monkeypatch.setattr(loop, "make_dispatch", lambda *_: pytest.fail("a dispatch was made"))
    # The numbers are safe before a picture is drawn.
    (workdir / "summary.json").unlink()
    written = []

    def record_video(*_, **__) -> list:
        written.append(json.loads((workdir / "summary.json").read_text()))
        return []

    monkeypatch.setattr(quickstart, "write_episodes", record_video)
    trained = runs.train(tiny.config(), workdir)
    monkeypatch.setattr(runs, "train_stages", lambda *_: trained)
    problem = problems.make(tiny.config())
    summary = quickstart.quickstart(problem, workdir)
    assert written == [summary]
    same = ("env_steps", "compile_s", "warm_start/wall_s", "ppo/wall_s", "more_cloning/wall_s")
    assert {name: summary[name] for name in same} == {name: finished[1][name] for name in same}
    # The times of the process before are not lost.
    assert summary["wall_s"] > sum(summary[name] for name in same[1:])
    assert {p: p.read_bytes() for p in before} == before
    # A signal in the last stage, even at its end, stops all that would follow.
    run = loop.run
    monkeypatch.setattr(
        loop, "run", lambda *a, **k: dataclasses.replace(run(*a, **k), interrupted=True)
    )
    assert quickstart.quickstart(problem, workdir) is None and len(written) == 1


def test_the_quickstart_says_how_long_it_takes():
    # In PPO updates: cloning takes 0.7 * 1000 * 512 / (512 * 17) = 41.2, PPO and more cloning 132
    # each, and all else but the compilation 34, in all 339.2. The small preset takes
    # 20.6 + 2 * 33 + 34 = 120.6. Compilation takes 50 seconds.
    assert quickstart.estimated_minutes(quickstart.make_config(), 60.0) == pytest.approx(
        339.18 + 50 / 60, abs=0.01
    )
    fast, slow = (quickstart.forecast("full", seconds) for seconds in (0.9, 4.0))
    assert "about 6 minutes." in fast and "small" not in fast
    assert (
        "about 23 minutes." in slow and "in about 9 minutes: make quickstart PRESET=small" in slow
    )
    assert "about 9 minutes." in quickstart.forecast("small", 4.0)
    assert "PRESET" not in quickstart.forecast("small", 9.0)


def test_the_time_of_an_update_is_measured_on_a_policy_of_its_own():
    problem = problems.make(tiny.config())
    before = jax.device_get(problem.stage("ppo").init())
    assert quickstarts.update_seconds(problem.stage("ppo")) > 0
    after = jax.device_get(problem.stage("ppo").init())
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_run_of_one_preset_is_not_resumed_with_another(tmp_path):
    small, full = (quickstart.make_problem(0, preset) for preset in ("small", "full"))
    with runs.claim(small, tmp_path):
        (tmp_path / "bc/checkpoints/250").mkdir(parents=True)
    with pytest.raises(ValueError, match="bc.episodes: 10240 there, 12288 now"):
        runs.claim(full, tmp_path)
    with runs.claim(small, tmp_path):
        pass


def test_a_stage_of_any_number_of_devices_is_evaluated(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0] / "bc", workdir)
    config = config_lib.from_json((workdir / "config.json").read_text())
    config.mesh.data = 64
    (workdir / "config.json").write_text(config_lib.to_json(config))
    chosen = {"workdir": str(workdir), "episodes": 4, "split": "train", "which": "best"}
    chosen |= {"trust_modules": False, "accept_changes": [], "video": False}

    def table(**changes) -> dict:
        monkeypatch.setattr(evaluate, "FLAGS", types.SimpleNamespace(**(chosen | changes)))
        evaluate.main(["evaluate"])
        return json.loads((workdir / "evaluation.json").read_text())

    first = table()
    rows = ("train", *(f"train/shuffled_{modality}" for modality in MODALITIES))
    names = {f"{name}{end}" for name in ("success", "return") for end in ENDS}
    names |= {"length", "checkpoint", "episodes"}
    assert set(first) == {f"{row}/{name}" for row in rows for name in names}
    assert first["train/checkpoint"] in checkpoint.saved_steps(workdir)
    assert "train                    shuffled_pixels      success" in capsys.readouterr().out
    # Another call adds to it.
    other = SPLITS[1]
    both = table(split=other, which="4")
    assert both.items() > first.items() and both[f"{other}/checkpoint"] == 4
    for changes, message in (
        ({"split": "tran"}, "--split='tran' is unknown"),
        ({"which": "3"}, r"No checkpoint 3 in .* available steps are"),
        ({"which": "newest"}, "which is 'newest'"),
        ({"workdir": str(tmp_path)}, "holds no run"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            table(**changes)
    # A config that this version does not know is named, instead of failing somewhere below.
    stored = json.loads(config_lib.to_json(config))
    stored["ppo"]["clpi"] = stored["ppo"].pop("clip")
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="error: Unknown config key 'ppo.clpi'"):
        table()


@pytest.mark.parametrize(("summary", "code"), [(None, common.EXIT_INTERRUPTED), ({}, 0)])
def test_an_interrupted_quickstart_has_an_exit_code_of_its_own(
    summary, code, tmp_path, monkeypatch
):
    given = types.SimpleNamespace(workdir=str(tmp_path), preset="full", seed=0)
    monkeypatch.setattr(quickstarts.flags, "FLAGS", given)
    ended = quickstarts.run(
        ["quickstart"],
        workdirs={},
        make_problem=lambda seed, preset: problems.make(tiny.config()),
        forecast=lambda problem, preset: "",
        quickstart=lambda problem, workdir: summary,
        conclusion=lambda summary, directory: "",
    )
    assert ended == code


def train_main(monkeypatch, config, workdir) -> None:
    flags = types.SimpleNamespace(
        config=config, workdir=str(workdir), accept_changes=[], profile=True
    )
    monkeypatch.setattr(train, "FLAGS", flags)
    train.main(["train"])


@pytest.mark.parametrize("error", common.FAILURES)
def test_failures_of_a_run_are_errors_without_a_stack(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        known = {"transient": False} if error is multihost.OtherProcessFailed else {}
        raise error("what happened", **known)

    monkeypatch.setattr(runs, "train_stages", fail)
    with pytest.raises(SystemExit, match="error: what happened"):
        train_main(monkeypatch, tiny.config(), tmp_path)


def test_only_the_check_of_the_config_may_hide_a_stack(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*ppo\.num_minibatches=5"):
        train_main(monkeypatch, tiny.config(ppo__num_minibatches=5), tmp_path / "a")
    # Another config's workdir, with a checkpoint.
    workdir_lib.claim_workdir(tmp_path / "b", tiny.config(ppo__clip=0.1))
    (tmp_path / "b" / workdir_lib.CHECKPOINTS / "1").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"error: .*belongs to a run of another config"):
        train_main(monkeypatch, tiny.config(), tmp_path / "b")

    def fail(*_, **__):
        raise ValueError("a fault of the code")

    monkeypatch.setattr(runs, "train_stages", fail)
    with pytest.raises(ValueError, match="a fault of the code"):
        train_main(monkeypatch, tiny.config(), tmp_path / "c")


COMMANDS = {"train": "mmrl-train", "evaluate": "mmrl-evaluate"}


def shown_help(script, *arguments):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", f"experiments.{script}", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert max(map(len, done.stdout.splitlines())) <= 100
    return done


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("train", "--workdir:"),
        ("evaluate", "--workdir:"),
        ("quickstart", "--workdir:"),
        ("quickstart_vlm", "--preset:"),
        ("study", "--study:"),
    ],
)
def test_help(script, flag):
    done = shown_help(script)
    assert done.returncode == 0  # absl alone would exit with 1.
    command = COMMANDS.get(script, f"python -m experiments.{script}")
    assert command in done.stdout and flag in done.stdout


@pytest.mark.parametrize("name", ["reach_ppo", "count_grpo"])
def test_help_with_a_config_lists_its_keys(name):
    done = shown_help("train", f"--config={name}")
    assert done.returncode == 0 and "mmrl-train" in done.stdout
    listed = {line.split()[0] for line in done.stdout.splitlines() if line[:1].strip()}
    keys = set(config_lib.flatten(runs.get_config(name)))
    options = {key for key in keys if key.startswith("env.options.")}
    assert listed >= keys - options | ({"env.options"} if options else set())
    if name == "reach_ppo":  # The config sets both options.
        text = " ".join(done.stdout.split())
        assert (
            "Those of 'language_reach' and their defaults: reward='dense', episode_length=24."
            in text
        )
        assert "(dict; value: {'episode_length': 16, 'reward': 'dense'})" in text
