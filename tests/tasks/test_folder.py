"""Tests of records from files: reading, rejection, and the batch of an update."""

import io
import json
import sys

import numpy as np
from PIL import Image
import pytest

from mmrl_jax.data import files
from mmrl_jax.data import images as images_lib
from mmrl_jax.tasks.folder import open_folder, open_tfds

KEYS = {"size": (4, 6), "batch_size": 4, "seed": 3, "max_rejected": 0.0}


def color(i):
    return (10 * i, 255 - 10 * i, 7)


def png(i, size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, color(i)).save(data, "PNG")
    return data.getvalue()


def folder(path, count=6, extra=()):
    """Writes a folder of `count` valid records, followed by the lines `extra`."""
    (path / "a").mkdir(parents=True)
    lines = []
    for i in range(count):
        (path / f"a/{i}.png").write_bytes(png(i))
        line = {"file_name": f"a/{i}.png", "prompt": f"which of {i} ?", "answer": i, "level": i % 2}
        lines.append(json.dumps(line))
    (path / "metadata.jsonl").write_text("\n".join([*lines, *extra]) + "\n")
    return path


def test_what_a_record_says_stays_with_its_image(tmp_path):
    records = open_folder(folder(tmp_path), **KEYS)
    assert len(records) == 6 and records.rejected == ()
    batch = records.batch(0)
    assert batch.images.shape == (4, 4, 6, 3) and batch.images.dtype == np.uint8
    for b, i in enumerate(batch.records):
        np.testing.assert_array_equal(batch.images[b], np.broadcast_to(color(i), (4, 6, 3)))
        assert batch.prompts[b] == f"which of {i} ?"
        assert batch.answers[b] == str(i)
        assert batch.columns[b] == {"level": i % 2}


def test_batches_depend_on_the_update_alone(tmp_path):
    folder(tmp_path)
    records = open_folder(tmp_path, **KEYS)
    in_order = np.concatenate([records.batch(u).records for u in range(6)])
    # 6 updates of 4 are 4 epochs of 6, each a permutation, and not all the same one.
    epochs = in_order.reshape(4, 6)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(6), (4, 1)))
    assert len(np.unique(epochs, axis=0)) > 1
    # Another process that starts in the middle.
    again = open_folder(tmp_path, **KEYS)
    for update in (5, 1, 4):
        np.testing.assert_array_equal(again.batch(update).records, in_order.reshape(6, 4)[update])
    other = open_folder(tmp_path, **(KEYS | {"seed": 4}))
    assert not np.array_equal(np.concatenate([other.batch(u).records for u in range(6)]), in_order)


def parts_of(path, **changes):
    """Returns the images of each part of a folder as the colors of their files."""
    sizes = {"test": 3, "validation": 4} | changes.pop("sizes", {})
    records = open_folder(path, **(KEYS | changes))
    return records.split(sizes, seed=changes.get("split_seed", 0))


def digests(records):
    return {info.digest for info in records.images}


def test_parts_share_no_image_and_do_not_depend_on_names_lines_or_the_runs_seed(tmp_path):
    folder(tmp_path / "d", count=12)
    lines = (tmp_path / "d/metadata.jsonl").read_text().splitlines()
    # A second question about every image, and a copy of one under another name.
    second = [line.replace("which of", "what is") for line in lines]
    (tmp_path / "d/a/copy.png").write_bytes(png(0))
    copy = lines[0].replace("a/0.png", "a/copy.png")
    (tmp_path / "d/metadata.jsonl").write_text("\n".join([*lines, *second, copy]))
    parts = parts_of(tmp_path / "d")
    assert list(parts) == ["test", "validation", "train"]
    assert sum(len(part) for part in parts.values()) == 25
    assert 3 <= len(parts["test"]) <= 5 and 4 <= len(parts["validation"]) <= 6
    for one, other in ("test", "train"), ("validation", "train"), ("test", "validation"):
        assert not digests(parts[one]) & digests(parts[other])
    assert len(set.union(*map(digests, parts.values()))) == 12
    # The part is that of what the batches hold.
    asked = parts["test"].read(range(len(parts["test"]))).prompts
    assert len({prompt.split()[2] for prompt in asked}) == len(digests(parts["test"])) == 2

    for i in range(12):
        (tmp_path / f"d/a/{i}.png").rename(tmp_path / f"d/{11 - i}.png")
    moved = [
        json.dumps(json.loads(x) | {"file_name": f"{11 - i}.png"}) for i, x in enumerate(lines)
    ]
    (tmp_path / "d/metadata.jsonl").write_text("\n".join([*moved[::-1], *moved, copy]))
    again = parts_of(tmp_path / "d", seed=5, batch_size=2)
    assert {name: digests(x) for name, x in again.items()} == {
        name: digests(x) for name, x in parts.items()
    }


def test_the_first_part_depends_on_its_own_size_and_seed_alone(tmp_path):
    folder(tmp_path, count=20)
    records = open_folder(tmp_path, **KEYS)

    def part(seed=0, **sizes):
        return [records.split(sizes, seed=seed)[name].names for name in sizes]

    ((few,), (more,)) = part(test=3), part(test=6)
    assert few == more[:3] and len(few) == 3
    assert part(test=3, validation=4) == [few, part(test=3, validation=9)[1][:4]]
    assert part(seed=1, test=6) != [more]
    # An image more takes its place in the order; of the others at most one changes sides.
    (tmp_path / "a/0.png").write_bytes(png(21))
    fewer = digests(open_folder(tmp_path, **KEYS).split({"test": 6}, seed=0)["test"])
    before = digests(records.split({"test": 6}, seed=0)["test"])
    assert len(fewer & before) >= 5 - 1
    with pytest.raises(ValueError, match=r"\{'test': 20\} of 20 records of 20 images leave none"):
        part(test=20)


def bad_lines(path):
    """Returns invalid lines with a part of the reason for each."""
    (path / "a/text.png").write_text("no image")
    (path / "a/cut.png").write_bytes(png(1, size=(64, 64))[:-60])
    line = {"file_name": "a/0.png", "prompt": "p", "answer": "x"}
    return {
        json.dumps(line | {"file_name": "a/none.png"}): "No such file",
        json.dumps(line | {"file_name": "a/text.png"}): "it is no image of a format that PIL reads",
        json.dumps(line | {"file_name": "a/cut.png"}): "truncated",
        json.dumps(line | {"answer": " "}): "answer=' ' is not a non-empty text",
        json.dumps(line | {"answer": True}): "answer=True is not a non-empty text",
        json.dumps(line | {"answer": float("nan")}): "answer=nan is not a non-empty text",
        json.dumps({"file_name": "a/0.png", "question": "p"}): (
            "prompt=None is not a non-empty text. The record has only ['file_name', 'question']."
        ),
        json.dumps(line | {"prompt": ["p"] * 1000}): (
            f"prompt={repr(['p'] * 1000)[:80]}... is not a non-empty text."
        ),
        json.dumps(line | {"file_name": "../0.png"}): "is outside the folder",
        '["a/0.png"]': "is not an object",
        "{": "JSONDecodeError",
    }


def test_bad_records_are_set_aside_with_their_reasons(tmp_path):
    folder(tmp_path / "d")
    bad = bad_lines(tmp_path / "d")
    (tmp_path / "0.png").write_bytes(png(0))
    metadata = tmp_path / "d/metadata.jsonl"
    metadata.write_text("\n".join([*bad, metadata.read_text()]))
    records = open_folder(tmp_path / "d", **(KEYS | {"max_rejected": 11 / 17}))
    assert len(records) == 6
    assert [r.name for r in records.rejected] == [f"metadata.jsonl:{1 + i}" for i in range(11)]
    for rejected, reason in zip(records.rejected, bad.values(), strict=True):
        assert reason in rejected.reason
    for batch in (records.batch(0), records.batch(1)):
        assert batch.prompts == tuple(f"which of {i} ?" for i in batch.records)
    with pytest.raises(ValueError, match=r"11 of 17 rec.*max_rejected=0.64(.|\n)*jsonl:1: File"):
        open_folder(tmp_path / "d", **(KEYS | {"max_rejected": 0.64}))


def test_lines_are_read_one_by_one_from_bytes(tmp_path):
    folder(tmp_path)
    # A byte order mark, a separator of lines within a text, the ends of lines of Windows, and a
    # byte that is no UTF-8, which costs its own record only.
    line = {"file_name": "a/0.png", "prompt": "p\u2028q", "answer": 0.5}
    good = json.dumps(line, ensure_ascii=False).encode()
    bad = good.replace(b"p\xe2\x80\xa8q", b"\xff")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good, good, bad]))
    records = open_folder(tmp_path, **(KEYS | {"batch_size": 2, "max_rejected": 0.5}))
    batch = records.batch(0)
    assert batch.prompts == ("p\u2028q",) * 2 and batch.answers == ("0.5",) * 2
    assert [r.name for r in records.rejected] == ["metadata.jsonl:3"]
    assert "UnicodeDecodeError" in records.rejected[0].reason


def test_images_are_turned_as_their_camera_says(tmp_path):
    folder(tmp_path, count=1)
    stored = np.zeros((6, 4, 3), np.uint8)
    stored[:3] = 255  # The upper half.
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned clockwise, by which the top comes to the right.
    Image.fromarray(stored).save(tmp_path / "a/0.png", exif=exif)
    (image,) = open_folder(tmp_path, **(KEYS | {"batch_size": 1})).batch(0).images
    np.testing.assert_array_equal(image[..., 0], np.tile([0, 0, 0, 255, 255, 255], (4, 1)))


def test_images_are_resized(tmp_path):
    (folder(tmp_path) / "a/0.png").write_bytes(png(0, size=(30, 20)))
    records = open_folder(tmp_path, **KEYS)
    # Two batches of 4 hold all 6.
    batches = records.batch(0), records.batch(1)
    place = np.concatenate([batch.records for batch in batches]).tolist().index(0)
    image = np.concatenate([batch.images for batch in batches])[place]
    np.testing.assert_array_equal(image, np.broadcast_to(color(0), (4, 6, 3)))


def test_images_keep_their_aspect_ratio_unless_they_are_to_be_stretched(tmp_path):
    (folder(tmp_path, count=1) / "a/0.png").write_bytes(png(0, size=(30, 10)))
    padded, stretched = (
        open_folder(tmp_path, resize=resize, **(KEYS | {"batch_size": 1})).batch(0).images[0]
        for resize in ("letterbox", "stretch")
    )
    # 30 x 10 in 6 x 4 is 6 x 2, with a black row above it and below it.
    np.testing.assert_array_equal(padded[1:3], np.broadcast_to(color(0), (2, 6, 3)))
    np.testing.assert_array_equal(padded[[0, 3]], np.zeros((2, 6, 3)))
    np.testing.assert_array_equal(stretched, np.broadcast_to(color(0), (4, 6, 3)))


def test_gray_of_more_than_8_bits_is_a_ramp_and_not_white(tmp_path):
    folder(tmp_path, count=1)
    ramp = np.linspace(0, 65535, 24).round().reshape(4, 6)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a/0.png")
    (image,) = open_folder(tmp_path, **(KEYS | {"batch_size": 1})).batch(0).images
    np.testing.assert_allclose(image[..., 0], ramp / 257, atol=0.5)


@pytest.fixture
def decoded(monkeypatch):
    """Returns a list whose length is the number of decoded images."""
    calls = []

    def spy(data, read_rgb=images_lib.read_rgb):
        calls.append(data)
        return read_rgb(data)

    monkeypatch.setattr(images_lib, "read_rgb", spy)
    return calls


def test_an_image_is_decoded_once_however_often_its_folder_is_opened(tmp_path, decoded):
    two = '{"file_name": "a/0.png", "prompt": "another", "answer": "x"}'
    first = open_folder(folder(tmp_path, extra=[two]), **KEYS)
    assert len(decoded) == 6
    again = open_folder(tmp_path, **(KEYS | {"size": (8, 8), "seed": 4, "batch_size": 1}))
    assert len(decoded) == 6 and again.images == first.images and len(again) == 7
    # One that was changed is decoded again, and so is one that could not be used.
    (tmp_path / "a/1.png").write_bytes(png(2, size=(7, 5)))
    (tmp_path / "a/2.png").write_bytes(b"no image")
    for calls in (8, 9):
        changed = open_folder(tmp_path, **(KEYS | {"max_rejected": 0.5}))
        assert len(decoded) == calls and len(changed) == 6
        assert changed.images[1].width == 7 and first.images[1].width == 6


@pytest.mark.parametrize(
    "stored",
    [b"", b"\xff{", b"[]", b'{"version": 0, "images": {}}', b"{", b'{"images": 3}', None],
    ids=["empty", "no text", "a list", "of another version", "cut", "no version", "no entries"],
)
def test_a_damaged_index_is_written_anew(tmp_path, decoded, monkeypatch, stored):
    monkeypatch.setattr(files, "cache_directory", lambda: tmp_path / "cache")
    folder(tmp_path / "d")
    open_folder(tmp_path / "d", **KEYS)
    (path,) = (tmp_path / "cache" / "images").iterdir()
    if stored is None:  # Of this version, but with an entry that is none.
        stored = json.dumps(json.loads(path.read_bytes()) | {"images": {"a/0.png": [1]}}).encode()
    path.write_bytes(stored)
    for calls in (12, 12):
        assert len(open_folder(tmp_path / "d", **KEYS)) == 6 and len(decoded) == calls


def test_an_index_that_cannot_be_written_is_no_error(tmp_path, decoded, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(files, "cache_directory", lambda: tmp_path / "file" / "cache")
    folder(tmp_path / "d")
    for calls in (6, 12):
        assert len(open_folder(tmp_path / "d", **KEYS)) == 6 and len(decoded) == calls


def test_a_record_that_is_lost_later_is_an_error(tmp_path):
    records = open_folder(folder(tmp_path), **KEYS)
    for path in (tmp_path / "a").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"metadata.jsonl:\d could be read when"):
        records.batch(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_rejected": 1.1}, "max_rejected=1.1"),
        ({"max_rejected": -0.1}, "max_rejected=-0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_folder(folder(tmp_path), **(KEYS | changes))


def test_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metadata.jsonl does not exist"):
        open_folder(tmp_path, **KEYS)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no records"):
        open_folder(tmp_path, **KEYS)
    with pytest.raises(ValueError, match="update=-1"):
        open_folder(folder(tmp_path / "d"), **KEYS).batch(-1)


def write_tfds(path, steps):
    """Writes two valid records and one without answer; with `steps`, in two episodes."""
    import tensorflow_datasets as tfds

    step = {
        "observation": {"image": tfds.features.Tensor(shape=(4, 6, 3), dtype=np.uint8)},
        "question": tfds.features.Text(),
        "answer": tfds.features.Text(),
        "level": np.int64,
    }
    features = {"steps": tfds.features.Dataset(step)} if steps else step

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "asked"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            rows = [
                {
                    "observation": {"image": np.full((4, 6, 3), color(i), np.uint8)},
                    "question": f"which of {i} ?",
                    "answer": ("a0", "a1", "")[i],
                    "level": i,
                }
                for i in range(3)
            ]
            if steps:
                yield "0", {"steps": rows[:1]}
                yield "1", {"steps": rows[1:]}
            else:
                yield from ((str(i), row) for i, row in enumerate(rows))

    builder = Builder(data_dir=path, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


FIELDS = {"image": "observation/image", "prompt": "question", "answer": "answer", "level": "level"}


def test_without_tfds_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    keys = KEYS | {"batch_size": 2, "max_rejected": 0.5, "split": "train"}
    with pytest.raises(ImportError, match=r"make setup-dev.*'\.\[data\]'"):
        open_tfds(tmp_path, fields=FIELDS, **keys)


@pytest.mark.parametrize("steps", [False, True], ids=["tfds", "rlds"])
def test_data_sets_of_tfds_are_read(tmp_path, steps):
    directory = write_tfds(tmp_path, steps)
    keys = KEYS | {"batch_size": 2, "max_rejected": 0.5, "split": "train"}
    records = open_tfds(directory, fields=FIELDS, **keys)
    assert len(records) == 2
    (rejected,) = records.rejected
    assert "answer='' is not a non-empty text" in rejected.reason
    batch = records.batch(0)
    # TFDS shuffles what it writes: the question tells which record it is.
    assert sorted(batch.prompts) == ["which of 0 ?", "which of 1 ?"]
    for b, prompt in enumerate(batch.prompts):
        i = int(prompt.split()[2])
        np.testing.assert_array_equal(batch.images[b], np.broadcast_to(color(i), (4, 6, 3)))
        assert batch.answers[b] == f"a{i}" and batch.columns[b] == {"level": i}
    with pytest.raises(ValueError, match=r"lacks \['prompt'\]"):
        open_tfds(directory, fields={"image": "a", "answer": "b"}, **keys)
    with pytest.raises(ValueError, match="'ask' is not in the example; at 'ask' it has"):
        open_tfds(directory, fields=FIELDS | {"prompt": "ask"}, **keys)


def test_weights_leave_out_and_repeat_records(tmp_path):
    records = open_folder(folder(tmp_path), **KEYS)
    equal = records.with_weights(np.ones(6))
    for update in range(6):
        np.testing.assert_array_equal(records.batch(update).records, equal.batch(update).records)
    weighted = records.with_weights(np.array([1.0, 0, 2, 0, 0, 1])).with_batch_size(3)
    assert weighted.names == tuple(records.names[i] for i in (0, 2, 5))
    # An epoch has 3 records, and 3 * w / 4 of each: 0.75, 1.5 and 0.75. A batch is an epoch here.
    counts = [np.bincount(weighted.batch(u).records, minlength=3) for u in range(40)]
    assert {tuple(x) for x in counts} <= {(1, 1, 1), (0, 2, 1), (1, 2, 0)}
    assert len({tuple(x) for x in counts}) > 1
