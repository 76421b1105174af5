"""Health checks: each alarm is raised by its own failure, and by nothing else."""

import dataclasses

import pytest

from mmrl_jax import problems
from mmrl_jax.monitoring import health_checks, metrics
from mmrl_jax.training.loop import run
from tests import tiny


def rows(count=30, **changes):
    """Returns rows of a healthy run; `changes` gives a metric as a function of the row's index."""
    healthy = {
        "completion/reward": lambda i: 0.1 + 0.01 * i,
        "reward/zero_std_groups": lambda i: 0.9,
        "completion/length": lambda i: 20.0 - 0.1 * i,
        "policy/entropy": lambda i: 1.0 / (1 + i),
        "eval/train/accuracy_lo": lambda i: 0.4,
        "eval/train/shuffled_image/accuracy": lambda i: 0.2,
        "modality_share/behavior/pixels": lambda i: 0.3,
        "optimizer/steps": lambda i: 3.0,
        "optimizer/skipped_spikes": lambda i: 1.0,
    }
    named = healthy | {name.replace("__", "/"): x for name, x in changes.items()}
    return [{name: value(i) for name, value in named.items()} for i in range(count)]


def raised(lines):
    checks = health_checks.HealthChecks()
    for row in lines:
        checks.update(row)
    return checks.raised


def test_an_alarm_is_new_once():
    checks = health_checks.HealthChecks()
    new = [checks.update(row) for row in rows(completion__reward=lambda i: 0.0)]
    assert [bool(x) for x in new] == [i == health_checks.WINDOW - 1 for i in range(30)]
    assert list(checks.raised) == ["reward_constant"]


def test_a_healthy_run_raises_none():
    assert raised(rows()) == {}
    assert raised([]) == {}
    assert raised(rows(policy__entropy=lambda i: None)) == {}
    assert raised([{"loss/total": 1.0}] * 50) == {}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reward_constant", {"completion__reward": lambda i: 0.0}),
        ("zero_std_groups", {"reward__zero_std_groups": lambda i: 1.0}),
        ("completions_short", {"completion__length": lambda i: 20.0 if i < 5 else 4.0}),
        ("entropy_low", {"policy__entropy": lambda i: 1.0 if i < 5 else 0.01}),
        ("images_unused", {"eval__train__shuffled_image__accuracy": lambda i: 0.45}),
        ("modality_unused", {"modality_share__behavior__pixels": lambda i: 0.3 if i < 5 else 0}),
        # In the last 20 rows, 2 of 4 steps each.
        (
            "steps_skipped",
            {
                "optimizer__steps": lambda i: 4.0 if i < 10 else 2.0,
                "optimizer__skipped_spikes": lambda i: 0.0 if i < 10 else 2.0,
            },
        ),
    ],
)
def test_each_is_raised_by_what_it_is_about(name, changes):
    assert list(raised(rows(**changes))) == [name]
    # No alarm is raised before there are enough rows.
    assert raised(rows(count=1, **changes)) == {}


def test_what_is_over_is_no_longer_raised():
    late = rows(completion__reward=lambda i: 0.0 if i < 29 else 0.5)
    assert raised(late[:-1]) and not raised(late)
    blind = rows(eval__train__shuffled_image__accuracy=lambda i: 0.45 if i < 29 else 0.1)
    assert "images_unused" not in raised(blind)


def test_the_loop_logs_and_tells_them_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(health_checks, "WINDOW", 2)
    # A policy that cannot count and always gives one answer: all rewards are 0.
    config = tiny.token_config(
        stages=("grpo",),
        mesh__data=1,
        task__counts=(1, 1),
        last__format_penalty=0.0,
        last__optimizer__learning_rate=1e-9,
    )

    def stage():
        return problems.make(config).stage("grpo")

    # A resumed run knows the alarms that were raised before, and does not print them again.
    run(dataclasses.replace(stage(), num_updates=3), workdir=tmp_path, config=config)
    run(stage(), workdir=tmp_path, config=config)
    logged = metrics.read_jsonl(tmp_path / metrics.JSONL_NAME)
    assert "alarm/reward_constant" not in logged[0]
    assert logged[-1]["alarm/reward_constant"] == 1
    assert capsys.readouterr().err.count("completion/reward has been 0") == 1
