"""The labels of stages on the task of digits: of which split they are, and how many are wrong."""

import jax
import numpy as np
import pytest

from mmrl_jax import problems
from mmrl_jax.tasks import digits
from tests import fake_digits

LABELS = {"num_updates": 2, "batch_size": 4, "examples": 64}


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.setattr(digits, "load", fake_digits.load)


def config(stages=("align", "sft", "grpo"), **align):
    return problems.complete(
        {
            "problem": "task",
            "stages": stages,
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


def images(problem, stage):
    return np.asarray(problem.source(stage).data.prompt.images[0])


def test_two_stages_learn_from_different_images():
    problem = problems.make(config(split="train"))
    first, second = (images(problem, stage) for stage in ("align", "sft"))
    shown = {image.tobytes() for image in first}
    assert not any(image.tobytes() in shown for image in second)


@pytest.mark.parametrize("stages", [("align", "sft"), ("align",), ("sft",)])
def test_the_first_labels_are_those_of_the_stream_of_data(stages):
    # So that a run with one stage of labels has the same ones whatever else the library can do.
    problem = problems.make(config(stages=stages, split="train"))
    key = jax.random.fold_in(jax.random.PRNGKey(problem.config.seed), 1)
    expected = problem.task.sample(key, LABELS["examples"], "train").images
    np.testing.assert_array_equal(images(problem, stages[0]), expected)


def test_a_stage_is_evaluated_on_the_split_that_it_learns_from(monkeypatch):
    problem = problems.make(config())
    measured = {"train": 0.25, "caption": 0.75}
    monkeypatch.setattr(problem, "evaluator", lambda *_, **__: None)
    monkeypatch.setattr(
        problem, "_measure", lambda _: lambda _, split: {"accuracy": measured[split]}
    )
    for name, split in (("align", "caption"), ("sft", "train"), ("grpo", "train")):
        stage = problem.stage(name)
        # With the training split too, so that all stages are in one curve.
        expected = {f"eval/{x}/accuracy": measured[x] for x in {"train", split}}
        assert stage.evaluate(stage.init().learner) == expected
        assert stage.best_metric == f"eval/{split}/accuracy" and stage.best_metric in stage.console
    assert problem.best_metric == "eval/train/accuracy"


@pytest.mark.parametrize("split", ["heldout_pair", "test"])
def test_no_stage_learns_from_what_is_held_out(split):
    with pytest.raises(
        ValueError, match=f"align.split='{split}' must be .* it has 'train', 'caption'; a class"
    ):
        problems.make(config(split=split))


def test_a_key_of_another_task_is_named_as_such():
    for group, key in (("task", "kinds"), ("sft", "counts")):
        mistaken = problems.complete(config(), {group: {key: ("count",)}})
        with pytest.raises(
            ValueError, match=f"'{group}.{key}', which is a key of the task 'shapes'"
        ):
            problems.make(mistaken)


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="task.name='digit' is unknown: choose 'shapes', 'digits'"):
        problems.make(problems.complete({"problem": "task", "stages": ("grpo",)},
                                        {"task": {"name": "digit"}}))  # fmt: skip
