"""The command `experiments.explain` on a tiny run."""

import json

import numpy as np

import mmrl_jax
from mmrl_jax.commands import explain
from mmrl_jax.reporting import explanation
from tests import tiny


def test_the_command_writes_numbers_and_a_figure(tmp_path, capsys):
    # The environment has one instruction, on which nothing can depend.
    config = tiny.config("recall_ppo", last__num_updates=1)
    mmrl_jax.train(config, tmp_path)
    result = explain.explain(tmp_path, episodes=8)
    numbers = json.loads((tmp_path / "explanation.json").read_text())
    for target in ("behaviour", "prediction"):
        assert abs(sum(numbers["modalities"][target]["share"].values()) - 1) < 1e-5
        assert numbers["modalities"][target]["share"]["instruction"] < 1e-4
    assert set(numbers["faithfulness"]) == set(explanation.control.METHODS)
    assert numbers["method"] in numbers["faithfulness"]
    assert numbers["completeness_error"] < 0.2
    assert (tmp_path / "explanation.png").read_bytes()[:4] == b"\x89PNG"
    assert result.patches.shape[:2] == result.frames.shape[:2] == result.word_scores.shape[:2]
    printed = capsys.readouterr().out
    assert "Shares of the modalities in the actions" in printed
    assert "The actions do not depend on instruction." in printed
    assert "trust" in printed.splitlines()[-2]


def numbers(**changes):
    """Returns the numbers of a policy whose explanation can be trusted."""
    share = {"pixels": 0.6, "instruction": 0.395, "proprio": 0.005}
    modalities = {name: {"share": share} for name in ("behaviour", "prediction")}
    good = {part: [2.0, 1.0, 3.0] for part in explanation.PARTS}
    return {
        "modalities": modalities,
        "method": "occlusion",
        "faithfulness": {"occlusion": good | changes.pop("gains", {})},
        "randomization_correlation": 0.1,
    } | changes


def test_the_last_sentence_says_what_can_be_trusted():
    lines = explanation.sentences(numbers())
    assert lines[1] == "The actions do not depend on proprio."
    assert lines[-1] == "The heat maps and the colors of the words can be trusted."
    random = [0.1, -0.1, 0.3]
    assert explanation.sentences(numbers(gains={"all": random}))[-1].startswith("Do not trust")
    lines = explanation.sentences(numbers(gains={"words": random}))
    assert lines[-1] == "Do not trust the colors of the words."
    assert "words by occlusion is no better than random" in lines[-3]
    assert explanation.sentences(numbers(randomization_correlation=0.9))[-1].startswith("Do not")


def test_the_method_is_chosen_on_other_episodes_than_it_is_tested_on():
    # 'a' is better on the even episodes, 'b' on the odd ones.
    even = np.tile([1.0, 0.0], 4)
    gain = {"a": {"all": even}, "b": {"all": 0.9 - even}}
    method, table = explanation.choose(gain, np.ones((1, 8)))
    assert method == "a"
    assert table["a"]["all"] == [0, 0, 0] and np.allclose(table["b"]["all"], 0.9)
