"""Tests of experiments.study and of the benchmarks' harness, with values derived by hand."""

import csv
import json
import pathlib
import types

import pytest

from experiments import study
from experiments.benchmarks import harness
from mmrl_jax import config as config_lib
from mmrl_jax import envs, problems
from tests import tiny

# File -> arguments that it is run with.
STUDIES = {
    "count": [""],
    "deep_sea": [""],
    "grid_agent": [""],
    "offline": [""],
    "quickstart": [""],
    "reach": [""],
    "vs_brax": [":inverted_pendulum", ":reacher", ":hopper", ":halfcheetah"],
}


@pytest.fixture
def made_up(monkeypatch):
    """Returns a study of two variants and three seeds with trivial runs, and its list of runs."""
    ran = []
    scores = {"plain": (0.1, 0.2, 0.6), "better": (0.5, 0.7, 0.9)}

    def run_one(config, seed, workdir):
        ran.append((config, seed))
        if len(ran) == 4 and not interrupted:
            interrupted.append(True)
            return None
        workdir.mkdir(parents=True)
        return {
            "final/train/success": scores[config][seed],
            "wall_s": 60.0,
            "commit": "abc",
            "hardware": "a computer",
        }

    interrupted = []
    monkeypatch.setattr(study, "run_one", run_one)
    module = types.SimpleNamespace(
        VARIANTS={"plain": {}, "better": {}},
        SEEDS=3,
        MAIN="final/train/success",
        get_config=lambda variant: variant,
    )
    return module, ran


def test_a_study_goes_on_where_it_was_stopped(made_up, tmp_path):
    module, ran = made_up
    arguments = (module, tmp_path, list(module.VARIANTS), range(module.SEEDS))
    assert not study.run(*arguments)
    # Seed by seed, so that the variants can be compared at any time.
    done = [("plain", 0), ("better", 0), ("plain", 1)]
    assert ran == [*done, ("better", 1)]
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["variant"], row["seeds"]) for row in rows[::2]] == [
        ("plain", "2"),
        ("better", "1"),
    ]
    del ran[:]
    assert study.run(*arguments)
    assert ran == [("better", 1), ("plain", 2), ("better", 2)]
    assert study.run(*arguments) and len(ran) == 3


def test_seeds_can_be_chosen():
    assert list(study.chosen_seeds(None, 3)) == list(study.chosen_seeds([], 3)) == [0, 1, 2]
    assert study.chosen_seeds(["2", "0"], 3) == [2, 0]
    for text in ("3", "-1", "one", "01"):
        with pytest.raises(ValueError, match=f"--seeds has '{text}', but .* are 0 to 2"):
            study.chosen_seeds([text], 3)


def test_processes_with_different_seeds_share_a_study(made_up, tmp_path):
    module, ran = made_up
    for seeds in ([2], [0]):
        assert study.run(module, tmp_path, ["plain"], seeds)
    assert ran == [("plain", 2), ("plain", 0)]
    row = next(csv.DictReader((tmp_path / "table.csv").open()))
    assert row["seeds"] == "2" and float(row["iqm"]) == pytest.approx((0.1 + 0.6) / 2)


def test_a_study_writes_its_tables(made_up, tmp_path):
    module, _ = made_up
    while not study.run(module, tmp_path, list(module.VARIANTS), range(module.SEEDS)):
        pass
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert list(rows[0]) == ["variant", "metric", "iqm", "lo", "hi", "seeds"]
    first = rows[0]
    assert (first["variant"], first["metric"], first["seeds"]) == ("plain", module.MAIN, "3")
    # Of three scores no whole one is cut off: the IQM is the mean, (0.1 + 0.2 + 0.6) / 3.
    assert float(first["iqm"]) == pytest.approx(0.3)
    assert 0.1 <= float(first["lo"]) < 0.3 < float(first["hi"]) <= 0.6
    assert {row["metric"] for row in rows} == {module.MAIN, "wall_s"}
    text = (tmp_path / "table.md").read_text()
    columns = f"| variant | {module.MAIN}, IQM [95 %] | ratio to plain | better than plain |"
    assert text.startswith(columns)
    # 'better' is above 'plain' in 8 of 9 pairs: all but 0.5 against 0.6.
    assert "| better | 0.7 [" in text and "| 0.89 [" in text and "commit abc; a computer" in text
    assert "| 2.33 [" in text  # 0.7 / 0.3.
    assert (tmp_path / "study.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)  # Where nothing is cached, it compiles for minutes.
def test_a_run_of_a_study_measures_every_split(tmp_path, monkeypatch):
    splits = envs.splits("language_reach")[:2]  # Each compiles a reset of its own.
    monkeypatch.setattr(envs, "splits", lambda name: splits)
    result = study.run_one(tiny.config("reach_ppo", last__num_updates=2), 3, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    for split in splits:
        assert 0 <= result[f"final/{split}/success"] <= 1
    assert result["env_steps"] == 64 and result["commit"] and result["hardware"]


def test_a_variant_may_have_a_runner_of_its_own(made_up, tmp_path):
    module, ran = made_up
    module.RUNNERS = {"better": lambda config, seed, workdir: None}
    assert not study.run(module, tmp_path, ["better"], [0]) and not ran
    assert study.run(module, tmp_path, ["plain"], [0]) and ran == [("plain", 0)]


def test_every_public_study_is_tested():
    files = {path.stem for path in pathlib.Path("experiments/studies").glob("*.py")}
    assert files - {"__init__"} == set(STUDIES)


@pytest.mark.parametrize(
    "spec", [f"experiments/studies/{name}.py{a}" for name, many in STUDIES.items() for a in many]
)
def test_the_public_studies_are_sound(spec):
    module = study.load_study(spec)
    first = next(iter(module.VARIANTS))
    assert not module.VARIANTS[first]
    baseline = module.get_config(first)
    for variant, changes in module.VARIANTS.items():
        config = module.get_config(variant)
        problems.make(config)
        if ":" in spec:
            assert config.env.name.endswith(spec.partition(":")[2])
        asked, flat = config_lib.flatten(changes), config_lib.flatten(config)
        assert asked.items() <= flat.items()
        # The settings of a stage come and go with it.
        gone = set(baseline.stages) ^ set(config.stages)
        different = set(config_lib.diff_configs(baseline, config))
        assert {x for x in different if x.partition(".")[0] not in gone} == {
            x for x in asked if x.partition(".")[0] not in gone
        }


def test_what_is_no_study_is_refused():
    with pytest.raises(ValueError, match="has no VARIANTS"):
        study.load_study("configs/reach_ppo.py")
    with pytest.raises(ValueError, match="Did you mean 'experiments/studies/reach.py'"):
        study.load_study("experiments/studies/rech.py")


def test_comparisons_alternate_after_a_warm_up():
    calls = []

    def measure(name, values):
        values = iter(values)

        def call():
            calls.append(name)
            return next(values)

        return call

    ours, peer = measure("ours", [99, 4, 8, 6]), measure("peer", [99, 2, 1, 3])
    row = harness.compare("a thing", ours, peer, unit="m/s", runs=3)
    assert calls == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    # Medians of 4, 8, 6 and of 2, 1, 3; what was measured cold counts for nothing.
    assert (row.ours, row.peer, row.ratio, row.runs) == (6, 2, 3, 3)
    alone = harness.compare("a thing", measure("ours", [1, 2]), None, unit="m/s", runs=1)
    assert (alone.ours, alone.peer, alone.ratio) == (2, None, None)
