"""The command `experiments.explain` on a tiny run."""

import json

import pytest

import mmrl_jax
from mmrl_jax.commands import explain
from tests import tiny


@pytest.mark.slow
def test_the_command_writes_a_page_numbers_and_a_figure(tmp_path, capsys):
    # All episodes have one instruction, and the same proprioception (the time) at each step.
    config = tiny.config(
        "recall_ppo",
        last__num_updates=1,
        run__probes=("modality_shares",),
        run__probe_interval=1,
    )
    mmrl_jax.train(config, tmp_path)
    result = explain.explain(tmp_path, episodes=8)
    numbers = json.loads((tmp_path / "explanation.json").read_text())
    for target in ("behavior", "prediction"):
        assert abs(sum(numbers["modalities"][target]["share"].values()) - 1) < 1e-5
        assert numbers["modalities"][target]["share"]["instruction"] < 1e-4
    methods = {
        "occlusion", "integrated_gradients", "gradient_times_input", "relevance", "rollout",
    }  # fmt: skip
    assert set(numbers["faithfulness"]) == methods
    assert set(numbers["frames"]["behavior"]["share"]) == {f"frame {i}" for i in range(4)}
    assert numbers["method"] in numbers["faithfulness"]
    assert numbers["completeness_error"] < 0.2
    assert (tmp_path / "explanation.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "explanation.html").read_text()
    assert page.count(" steps</h3>") == 8 and "none could be swapped" in page
    assert "Shares of the modalities in the actions</h3>" in page  # Curves of the probe.
    assert "instruction_swap" not in numbers
    course = result.course
    assert course.value.shape == course.advantage.shape == course.running.shape
    assert course.running[result.steps].shape == result.frames.shape[:2]
    assert result.patches.shape[:2] == result.frames.shape[:2] == result.word_scores.shape[:2]
    printed = capsys.readouterr().out
    assert "Shares of the modalities in the actions" in printed
    (unused,) = (x for x in printed.splitlines() if x.startswith("The actions do not depend on"))
    assert unused == "The actions do not depend on instruction or proprio."
    assert "trust" in printed.splitlines()[-2]
