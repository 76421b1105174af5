"""The labels of stages on the task of digits: of which split they are, and how many are wrong."""

import numpy as np
import pytest

from mmrl_jax import problems
from mmrl_jax.tasks import digits
from tests import fake_digits

LABELS = {"num_updates": 2, "batch_size": 4, "examples": 64}


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.setattr(digits, "load", fake_digits.load)


def config(**align):
    return problems.complete(
        {
            "problem": "task",
            "stages": ("align", "sft", "grpo"),
            "task": {"name": "digits", "height": 16, "width": 24},
            "model": {"width": 16, "layers": 1, "heads": 2, "patch_hidden": 16},
            "align": LABELS | {"split": "caption", "trainable": "params/vision/.*"} | align,
            "sft": LABELS | {"label_noise": 0.5},
            "grpo": {"num_updates": 2, "prompts_per_update": 4, "num_completions": 2},
            "run": {"eval_episodes": 4},
            "mesh": {"data": 1},
        }
    )


def test_labels_are_of_the_split_of_their_stage():
    problem = problems.make(config())
    texts = problem.task.texts
    for stage, text in (("align", digits.TEXTS[1]), ("sft", digits.TEXTS[0])):
        data = problem.source(stage).data
        prompts, completions = data.prompt, data.completions
        assert {texts.prompts[i] for i in np.asarray(prompts.text[0])} == {text}
        labels = texts.parse(completions.tokens[0, :, 0], completions.mask[0, :, 0])
        wrong = np.sum(np.asarray(labels) != np.asarray(prompts.answer[0]))
        # Half of 64 labels are those of other prompts, few of which have the same answer.
        assert wrong == 0 if stage == "align" else 16 < wrong < 48, wrong


@pytest.mark.parametrize("split", ["heldout_pair", "test"])
def test_no_stage_learns_from_what_is_held_out(split):
    with pytest.raises(
        ValueError, match=f"align.split='{split}' must be .* not held out: 'train', 'caption'"
    ):
        problems.make(config(split=split))


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="task.name='digit' is unknown: choose 'shapes', 'digits'"):
        problems.make(problems.complete({"problem": "task", "stages": ("grpo",)},
                                        {"task": {"name": "digit"}}))  # fmt: skip
