"""What an explanation says in words, and how its method is chosen."""

import numpy as np

from mmrl_jax.interpretability import control
from mmrl_jax.reporting import explanation, explanation_text


def numbers(**changes):
    """Returns the numbers of a policy whose explanation can be trusted."""
    share = {"pixels": 0.6, "instruction": 0.395, "proprio": 0.005}
    modalities = {name: {"share": share} for name in ("behavior", "prediction")}
    good = {part: [2.0, 1.0, 3.0] for part in explanation_text.PARTS}
    return {
        "modalities": modalities,
        "method": "occlusion",
        "faithfulness": {"occlusion": good | changes.pop("gains", {})},
        "randomization_correlation": 0.1,
    } | changes


def test_the_last_sentence_says_what_can_be_trusted():
    lines = explanation_text.sentences(numbers())
    assert lines[1] == "The actions do not depend on proprio."
    assert lines[-1] == "The heat maps and the colors of the words can be trusted."
    random = [0.1, -0.1, 0.3]
    assert explanation_text.sentences(numbers(gains={"all": random}))[-1].startswith("Do not trust")
    lines = explanation_text.sentences(numbers(gains={"words": random}))
    assert lines[-1] == "Do not trust the colors of the words."
    assert "words by occlusion is no better than random" in lines[-3]
    assert explanation_text.sentences(numbers(randomization_correlation=0.9))[-1].startswith(
        "Do not"
    )


def test_the_method_is_chosen_on_other_episodes_than_it_is_tested_on():
    # 'a' is better on the even episodes, 'b' on the odd ones.
    even = np.tile([1.0, 0.0], 4)
    gain = {"a": {"all": even}, "b": {"all": 0.9 - even}}
    method, table = explanation.choose(gain, np.ones((1, 8)))
    assert method == "a"
    assert table["a"]["all"] == [0, 0, 0] and np.allclose(table["b"]["all"], 0.9)


def test_the_change_by_another_instruction_is_relative_to_the_distance_of_episodes():
    running, action = np.ones((1, 3)), np.zeros((1, 3, 1))
    swap = control.Swap(
        played=control.Played({}, action, running),
        action=action,
        swapped_action=action,
        differs=np.array([True, False, True]),
        change=np.array([[1.0, 5.0, 3.0]]),
        spread=np.array([[2.0, 9.0, 2.0]]),
    )
    # The episodes whose instruction differs change by 1 / 2 and 3 / 2.
    assert explanation._swap_numbers(swap)["instruction_swap"] == [1.0, 0.5, 1.5]
    same = swap._replace(differs=np.zeros(3, bool))
    assert explanation._swap_numbers(same) == {}
