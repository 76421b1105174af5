"""End-to-end tests of the vision-language quickstart, with tiny random models and random digits."""

import json

import numpy as np
import pytest

from experiments import quickstart_vlm as vlm
from experiments import quickstarts
from mmrl_jax import problems, runs
from mmrl_jax.configs import vlm_quickstart
from mmrl_jax.tasks import digits
from mmrl_jax.training import loop
from tests import fake_digits, processors

ENDS = ("", "_lo", "_hi")
MEASURED = [
    "aligned/train",
    "aligned/caption",
    *(f"{stage}/{split}" for stage in ("warm_start", "more_sft", "final") for split in vlm.TESTED),
    "final/train/shuffled_image",
]
STAGE = {"num_updates": 2, "eval_interval": 2, "checkpoint_interval": 1}
TINY = {
    "mesh": {"data": 1},
    "run": {"eval_episodes": 4},
    "task": {"height": 16, "width": 24},
    "model": {"vision_size": 16},
    "align": STAGE | {"examples": 8, "batch_size": 4},
    "sft": STAGE | {"examples": 8, "batch_size": 4},
    "grpo": STAGE | {"prompts_per_update": 4, "num_completions": 2},
}


@pytest.fixture(scope="module", autouse=True)
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load", fake_digits.load)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    tower = tmp_path_factory.mktemp("dinov2")
    processors.save_dinov2(tower)
    decoder = processors.save_decoder(tmp_path_factory.mktemp("llama"))
    models = {"model": {"checkpoint": str(decoder), "vision_encoder": str(tower)}}
    return problems.complete(vlm_quickstart.CONFIG, TINY, models)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Runs the quickstart; returns (problem, workdir, summary)."""
    workdir = tmp_path_factory.mktemp("quickstart_vlm")
    problem = problems.make(config)
    with runs.claim(problem, workdir):
        return problem, workdir, vlm.quickstart(problem, workdir)


def test_every_stage_is_compared_and_written(finished):
    _, workdir, summary = finished
    stages = ("align", "sft", "grpo", "more_sft")
    times = {"wall_s", "compile_s", *(f"{stage}/wall_s" for stage in stages)}
    rates = {f"{name}/accuracy{end}" for name in MEASURED for end in ENDS}
    assert set(summary) == rates | times | {"env_steps", "env_steps_per_s", "memory_gb"}
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in MEASURED:
        value, low, high = (summary[f"{name}/accuracy{end}"] for end in ENDS)
        assert 0 <= low <= value <= high <= 1
    # This process has more than JAX's own 100 MB, and this machine has less than 2 TB.
    assert 0.1 < summary["memory_gb"] < 2000
    for place in (workdir, *(workdir / stage for stage in ("align", "sft", "more_sft"))):
        assert (place / "learning_curves.png").stat().st_size > 1000
    assert (workdir / "accuracy.png").stat().st_size > 1000
    for page in (workdir / "samples.html", workdir / "sft" / "samples.html"):
        assert page.read_text().count("<img ") == runs.SAMPLES
    text = vlm.conclusion(summary, "runs/x")
    assert f"{summary['final/train/accuracy']:.1%} after GRPO" in text
    assert f"was {summary['warm_start/train/accuracy']:.1%} after fine-tuning" in text


def test_again_it_trains_nothing_and_ends_with_the_same_policies(finished, monkeypatch):
    problem, workdir, summary = finished
    before = {path: path.read_bytes() for path in workdir.rglob("metrics.jsonl")}
    monkeypatch.setattr(loop, "make_dispatch", lambda *_: pytest.fail("a dispatch was made"))
    again = vlm.quickstart(problem, workdir)
    assert {path: path.read_bytes() for path in before} == before
    for name in (f"{x}/accuracy" for x in MEASURED):
        assert again[name] == summary[name]


def test_more_fine_tuning_continues_the_warm_start_on_other_batches(config):
    problem = problems.make(config)
    start = problem.initial_variables()
    first = problem.stage("sft", start=start)
    more = vlm.more_fine_tuning(problem, start)
    assert (more.name, more.num_updates, first.name, first.num_updates) == (
        "more_sft",
        200,
        "sft",
        2,
    )
    a, b = first.init(), more.init()
    np.testing.assert_array_equal(
        first.constants.data.completions.tokens, more.constants.data.completions.tokens
    )
    assert (np.asarray(a.rng) != np.asarray(b.rng)).any()


def test_it_says_how_long_it_takes_and_how_much_memory(config, monkeypatch):
    full, small = vlm.make_config(), vlm.make_config("small")
    # What a resumed run cannot change differs, so that no run is resumed with another preset.
    assert full.align.examples != small.align.examples
    # Updates: 400 of alignment of 5 s, 100 of fine-tuning of 10 s, and 2 * 200 of GRPO of 8 s, are
    # 6200 s. More fine-tuning makes 200 * 8 / 10 = 160. Evaluations have 64 prompts: two of each of
    # 2 * 3 + 3 + 5 + 5 during training, and 12 with 4 * 64, in all 86 * 64, each of a quarter of
    # 8 s / 8 prompts, are 1376 s. Compilation takes 120 s.
    assert vlm.estimated_minutes(full, 5.0, 10.0, 8.0) == pytest.approx((6200 + 1376 + 120) / 60)
    # 20 * 5 + 10 * 10 + 2 * 10 * 8 s; 16 prompts, twice 2 * 2 + 2 + 2 + 2, and 48, in all 68 * 16,
    # are 272 s.
    assert vlm.estimated_minutes(small, 5.0, 10.0, 8.0) == pytest.approx((360 + 272 + 120) / 60)
    seconds = iter(2 * (5.0, 10.0, 8.0))
    monkeypatch.setattr(vlm, "update_seconds", lambda stage: next(seconds))
    problem = problems.make(config)
    monkeypatch.setattr(problem, "config", full)
    monkeypatch.setattr(problem, "stage", lambda name: name)
    monkeypatch.setattr(vlm, "peak_memory_gb", lambda: 2.34)
    text = vlm.forecast(problem, "full")
    assert "5.0 s in alignment, 10.0 s in fine-tuning and 8.0 s in GRPO" in text
    assert "2.3 GB of memory" in text and "about 128 minutes" in text
    assert "in about 13 minutes: make quickstart-vlm PRESET=small" in text
    assert "PRESET" not in vlm.forecast(problem, "small")


def test_updates_are_timed_on_a_policy_of_their_own(config):
    problem = problems.make(config)
    assert quickstarts.update_seconds(problem.stage("align")) > 0
