"""Tests of the model card: what it takes from the files of a run, and its metadata."""

import json

from etils import epath
import huggingface_hub
import pytest

import mmrl_jax
from mmrl_jax import config as config_lib
from mmrl_jax.reporting import model_card
from mmrl_jax.training import fingerprints

CHANGES = {
    "model": {"checkpoint": "/home/me/models/SmolVLM", "lora": {"rank": 4}},
    "dataset": {"directory": "/home/me/pictures", "validation_size": 2, "test_size": 2},
    "rewards": {"functions": ("my_rewards:length",)},
    "grpo": {"num_updates": 20},
}


def interval(name, mean, low, high):
    return {name: mean, f"{name}_lo": low, f"{name}_hi": high}


EVALUATION = {
    **interval("test/return", 0.75, 0.5, 1.0),
    **interval("test/reward/length", 0.5, 0.25, 0.75),
    **{"test/checkpoint": 20, "test/episodes": 64},
    **interval("test/shuffled_image/return", 0.25, 0.125, 0.375),
    **{"test/shuffled_image/checkpoint": 20, "test/shuffled_image/episodes": 64},
    **interval("validation/return", 0.1, 0.0, 0.2),
    **{"validation/checkpoint": 10, "validation/episodes": 8},
}
SUMMARY = {**interval("final/test/return", 0.8, 0.7, 0.9), "wall_s": 90.0}


@pytest.fixture
def workdir(tmp_path):
    config = mmrl_jax.get_config("vlm_grpo", CHANGES)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    made_with = {"commit": "1f34dc7+", "hardware": "1 x H100", "versions": {"jax": "0.10.2"}}
    run = fingerprints.Run("grpo", {"records": "ab12"})
    fingerprints.write(tmp_path, run, made_with=made_with)
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return epath.Path(tmp_path)


def write(workdir, **changes):
    """Writes a card and returns it as the hub reads it, with its lines."""
    exported = model_card.ExportedModel(
        name="me/counting", base="HuggingFaceTB/SmolVLM", stage="grpo", step=20, adapter=True,
        dtype="float32",
    )  # fmt: skip
    model_card.write(workdir, exported._replace(**changes), workdir)
    card = huggingface_hub.ModelCard.load(workdir / "README.md")
    return card.data.to_dict(), card.text


def test_the_metadata_are_those_of_the_hub(workdir):
    data, _ = write(workdir)
    assert data == {
        "base_model": "HuggingFaceTB/SmolVLM",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmrl_jax", "grpo", "lora"],
    }
    data, _ = write(workdir, adapter=False, base=None)
    assert data["library_name"] == "transformers" and "base_model" not in data
    assert data["tags"] == ["mmrl_jax", "grpo"]


def test_the_card_has_what_the_run_recorded(workdir):
    _, text = write(workdir)
    lines = text.splitlines()
    for line in (
        "# counting",
        "| stages | grpo (20 updates) |",
        "| checkpoint | update 20 of the stage grpo |",
        "| problem | dataset |",
        "| data | pictures |",
        "| reward functions | my_rewards:length |",
        "| hardware | 1 x H100 |",
        "| wall time | 1.5 minutes |",
        "| commit of mmrl_jax | 1f34dc7+ |",
        "| versions | jax 0.10.2 |",
        "| fingerprint: records | ab12 |",
        "| `model.lora.rank` | `4` | `8` |",
        "| `model.checkpoint` | `'SmolVLM'` | `None` |",
        "| `stages` | `('grpo',)` |  |",
        "| test | its own | return | 0.750 [0.500, 1.000] | 64 |",
        "| test | its own | reward/length | 0.500 [0.250, 0.750] | 64 |",
        "| test | image of another sample | return | 0.250 [0.125, 0.375] | 64 |",
        'model = PeftModel.from_pretrained(base, "me/counting")',
        'base = AutoModelForImageTextToText.from_pretrained("HuggingFaceTB/SmolVLM")',
    ):
        assert line in lines, line
    # The results of another checkpoint are not those of the model, nor are directories public.
    assert "validation |" not in text and "/home/me" not in text
    # An option with its default is left out.
    assert "`grpo.num_epochs`" not in text


def test_without_an_evaluation_the_results_of_the_summary_are_those_of_the_last_checkpoint(workdir):
    (workdir / "evaluation.json").unlink()
    _, text = write(workdir)
    assert "| test | its own | return | 0.800 [0.700, 0.900] |  |" in text
    assert "do not show whether it uses its images" in text
    _, text = write(workdir, step=10)
    assert "0.800" not in text and "No results of update 10 were recorded" in text
    (workdir / "summary.json").write_text("damaged")
    assert "No results of update 20 were recorded" in write(workdir)[1]


def test_a_merged_model_is_loaded_by_transformers(workdir):
    _, text = write(workdir, adapter=False, dtype="bfloat16", base=None)
    assert 'model = AutoModelForImageTextToText.from_pretrained("me/counting")' in text
    assert "rounded to bfloat16" in text and "model `SmolVLM`, fine-tuned" in text
    assert "peft" not in text and "--config.model.checkpoint=hf://me/counting`" in text
    _, text = write(workdir, adapter=False, name="tuned")
    assert 'hub.load_vision_language_model(chat.directory_of("tuned"))' in text


def test_a_table_survives_a_pattern_and_a_line_break():
    table = model_card._table(("a", "b"), [("`x|y`", "one\ntwo")])
    assert table == "| a | b |\n| --- | --- |\n| `x\\|y` | one two |"


def test_paths_inside_of_options_are_shortened():
    options = {"files": ("/home/me/a.py", 3), "deep": {"model": "/home/me/b/"}, "name": "a/b"}
    expected = {"files": ("a.py", 3), "deep": {"model": "b"}, "name": "a/b"}
    assert model_card._shortened(options) == expected
