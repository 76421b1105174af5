"""Tests of the command that audits data: files in, files and an exit code out."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mmrl_jax.auditing import reading
from mmrl_jax.commands import audit
from mmrl_jax.data import images as images_lib
from mmrl_jax.data import records
from mmrl_jax.data import weights as weights_lib
from mmrl_jax.tasks import folder as folder_lib
from tests import episodes as episodes_lib
from tests.auditing import planted
from tests.commands.test_commands import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder(path, count=12, *, hostile="?", aspect=1.0):
    """Writes records, of which one is noise and one has a truncated image."""
    path.mkdir()
    rng = np.random.default_rng(0)
    pixels, labels = planted.shapes(rng, count, aspect=aspect)
    pixels[3] = rng.integers(0, 256, pixels[3].shape)
    lines = []
    for i, image in enumerate(pixels):
        data = images_lib.encode_png(image)
        (path / f"{i}.png").write_bytes(data[: len(data) // 2] if i == 5 else data)
        prompt = hostile if i == 3 else f"Question {i}?"
        line = {"file_name": f"{i}.png", "prompt": prompt, "answer": planted.NAMES[labels[i]]}
        lines.append(json.dumps(line))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("aspect", [1.0, 4 / 3])
def test_records_in_and_weights_and_a_page_out(aspect, tmp_path):
    data = folder(tmp_path / "data", hostile="<script>alert(1)</script>", aspect=aspect)
    report = audit.audit([str(data)], tmp_path / "out")
    assert report.failed == ["unreadable", "noise_image"]
    weights = {x["id"]: x for x in lines_of(tmp_path / "out" / "weights.jsonl")}
    assert len(weights) == 12
    bad = {name: x["flags"] for name, x in weights.items() if x["weight"] == 0}
    assert bad == {"metadata.jsonl:4": ["noise_image"], "metadata.jsonl:6": ["unreadable"]}
    assert weights["metadata.jsonl:6"]["digest"] == ""
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<img") == page.count("alt='Image of metadata.jsonl:4'") == 1
    assert "http" not in page and "are shown" not in page
    (lost,) = json.loads((tmp_path / "out" / "audit.json").read_text())["unreadable"]["samples"]
    assert lost["id"] == "metadata.jsonl:6" and "truncated" in lost["reason"]


def test_weights_are_those_of_image_prompt_and_answer(tmp_path):
    data = folder(tmp_path / "data", count=4)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[0]) | {"prompt": "What else?"})
    audited = tmp_path / "out"

    def weights(lines):
        (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        opened = folder_lib.open_folder(data, size=(8, 8), batch_size=1, seed=0, max_rejected=0.0)
        path = str(audited / "weights.jsonl")
        return weights_lib.select(path, opened.names, opened.digests, key="dataset.weights")

    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    audit.audit([str(data)], audited)
    np.testing.assert_array_equal(weights(lines), [1, 1, 1, 0])
    # Two questions about one image: the line of a record says which one it is.
    with pytest.raises(records.InvalidData, match="for other contents of 'metadata.jsonl:1'"):
        weights([lines[1], lines[0], *lines[2:]])


def test_results_within_the_data_are_refused(tmp_path):
    data = folder(tmp_path / "data", count=4)
    for output in (data, data / "deep" / "out"):
        with pytest.raises(ValueError, match=r"--output=.* is in --data=.*; give a directory out"):
            audit.audit([str(data)], output)
    assert sorted(x.name for x in data.iterdir()) == sorted(
        [*map("{}.png".format, range(4)), "metadata.jsonl"]
    )
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output=.*file cannot be made .*; give another"):
        audit.audit([str(data)], tmp_path / "file")


def test_the_page_says_how_many_samples_it_leaves_out(tmp_path):
    data = folder(tmp_path / "data", count=20)
    audit.audit([str(data)], tmp_path / "out", thresholds=["answer_imbalance=0"])
    # One of the 20 cannot be read.
    assert "The worst 12 of 19 are shown." in (tmp_path / "out" / "audit.html").read_text()


def test_labels_of_splits_are_unique():
    def label(*choices):
        return reading.split_labels([reading.Part(pathlib.Path("d"), x) for x in choices])

    assert label("train", "test") == ("train", "test")
    assert label("a", "a", "a-0") == ("a-1", "a-2", "a-0")
    assert label("*", "?") == ("data-0", "data-1")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"meta/info.json": "{}"}, "meta/info.json has no splits, and total_episodes=None is no"),
        ({"meta/info.json": '{"total_episodes": "x"}'}, "total_episodes='x' is no number of ep"),
        (
            {"dataset_info.json": '{"name": "x", "splits": [{"shardLengths": ["1"]}]}'},
            "dataset_info.json cannot be read .KeyError: 'name'",
        ),
        ({"reach/1.0.0/dataset_info.json": "{}"}, "give the directory of a version.*reach/1.0.0"),
        ({"train-0.jsonl": "", "test-0.jsonl": ""}, "choose those of one split with --files, for"),
        ({"metadata.jsonl": "[]\n[]\n"}, "2 of 2 records cannot be used, so that none is left"),
    ],
)
def test_directories_that_cannot_be_audited_have_messages(files, message, tmp_path):
    for name, text in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        audit.audit([str(tmp_path / "data")], tmp_path / "out")
    assert "max_rejected" not in str(caught.value)


def test_a_copy_in_the_test_split_is_found(tmp_path):
    train, test = folder(tmp_path / "train"), folder(tmp_path / "test")
    report = audit.audit([str(train), str(test)], tmp_path / "out")
    # 11 of the 12 records of each split can be read, and each has a copy in the other.
    assert report.results["split_leak"].flagged.sum() == 22
    assert {x["weight"] for x in lines_of(tmp_path / "out" / "weights-test.jsonl")} == {0}


def demonstrations(path, kind, aspect):
    """Writes 12 episodes, of which number 2 has noise for images and number 7 a NaN."""
    rng = np.random.default_rng(0)
    several = []
    for number in range(12):
        one = planted.episode(rng, aspect=aspect)
        steps = len(one["action"])
        record = episodes_lib.episode(steps - 1, number=number)
        pixels = one["pixels"]
        if number == 2:
            pixels = rng.integers(0, 256, pixels.shape).astype(np.uint8)
        action = one["action"].copy()
        if number == 7:
            action[3, 1] = np.nan
        several.append(
            record._replace(
                observation={"pixels": pixels, "proprio": one["proprio"]},
                action=action,
                privileged={},
                language_instruction=[one["template"].format(one["name"])] * steps,
            )
        )
    return episodes_lib.write(path, kind, several, per_shard=6)


@pytest.mark.parametrize(("kind", "aspect"), [("rlds", 4 / 3), ("lerobot", 1.0)])
def test_demonstrations_are_read_and_broken_ones_found(kind, aspect, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    data = demonstrations(tmp_path / "data", kind, aspect)
    report = audit.audit([str(data)], tmp_path / "out")
    assert {"unreadable", "broken_images"} <= set(report.failed)
    samples = report.samples
    assert len(samples) == 11 and samples.frames.first.shape == (11, 32, 32, 3)
    (lost,) = samples.unreadable
    assert "non-finite action" in lost.reason
    (broken,) = np.flatnonzero(report.results["broken_images"].flagged)
    assert broken == 2 and report.flags(2) == ("broken_images",)
    weights = lines_of(tmp_path / "out" / "weights.jsonl")
    assert len(weights) == 12 and sum(x["weight"] == 0 for x in weights) == 2
    # A run that can read the episode leaves it out.
    assert len({x["digest"] for x in weights}) == 1 and weights[0]["digest"]
    assert "base64" in (tmp_path / "out" / "audit.html").read_text()


def test_fields_of_other_data_sets_are_found_by_their_names():
    image, state = records.Feature((48, 96, 3), "image"), records.Feature((7,), "float32")

    class Source:
        features = {
            "observation.images.wrist": image,
            "observation.state": state,
            "task": records.Feature((), "str"),
            "action": records.Feature((6,), "float32"),
        }
        defaults = {"pixels": "observation.images.pixels", "instruction": "task"}

    found = reading.infer_features(Source(), {})
    assert found["pixels"] == ("observation.images.wrist",)
    assert found["instruction"] == ("task",) and found["proprio"] == ("observation.state",)
    target = reading.target_of(Source(), found)
    # The smaller edge, which is between 32 and 64.
    assert target.pixels == (48, 48) and target.proprio == 7
    assert target.action_size == 6 and not target.discrete
    found = reading.infer_features(Source(), {"proprio": ("observation.state[0:3]",)})
    assert reading.target_of(Source(), found).proprio == 3
    with pytest.raises(records.InvalidData, match="--features=pixels=front: "):
        reading.infer_features(Source(), {"pixels": ("front",)})
    with pytest.raises(records.InvalidData, match="--features=image=.* is unknown"):
        reading.infer_features(Source(), {"image": ("task",)})
    Source.features = {"action": state}
    with pytest.raises(records.InvalidData, match="--features=proprio=FIELD"):
        reading.infer_features(Source(), {})


def command(*arguments):
    call = [sys.executable, "-m", "experiments.audit", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def test_the_exit_code_is_for_ci(tmp_path):
    data = folder(tmp_path / "data")
    arguments = [f"--data={data}", f"--output={tmp_path / 'out'}"]
    done = command(*arguments)
    assert done.returncode == 2 and "unreadable, noise_image" in done.stderr
    limits = ["--limit=unreadable=0.1", "--limit=noise_image=0.1"]
    assert command(*arguments, *limits).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": ["nois=0.1"]}, "'nois' is no check"),
        ({"limits": ["noise_image"]}, "--limit=NAME=VALUE"),
        ({"thresholds": ["noise_image=high"]}, "--threshold=noise_image=high: give a finite num"),
        ({"thresholds": ["unreadable=0.5"]}, "'unreadable' is no check .* with a threshold"),
        ({"limits": ["noise_image=nan"]}, "--limit=noise_image=nan: give a finite number"),
        ({"limits": ["noise_image=5"]}, r"--limit=noise_image=5: give a fraction in \[0, 1\]"),
        ({"columns": ["promt=question"]}, "--columns=promt=question is unknown; name one of"),
        ({"splits": ["train"]}, "choose records by --files"),
        ({"features": ["pixels=x"]}, "--features is for demonstrations"),
        ({"directories": ["/no/such"]}, "--data=/no/such does not exist"),
    ],
)
def test_mistakes_have_messages(arguments, message, tmp_path):
    directories = arguments.pop("directories", None) or [str(folder(tmp_path / "data"))]
    with pytest.raises(ValueError, match=message):
        audit.audit(directories, tmp_path / "out", **arguments)
