"""Tests of the layouts of a folder: tables as JSON lines and as parquet, texts and messages."""

import base64
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrl_jax.data import images as images_lib
from mmrl_jax.tasks import tables
from mmrl_jax.tasks.folder import open_folder
from mmrl_jax.tasks.samples import read_sample
from tests.tasks.test_folder import KEYS, color, decoded, png  # noqa: F401


def user(text, *images):
    return {
        "role": "user",
        "content": [*images, {"type": "text", "text": text}] if images else text,
    }


def assistant(text):
    return {"role": "assistant", "content": text}


MARK = {"type": "image"}
# A record by layout, from its number and its image, and whether its prompt is messages.
RECORDS = {
    "imagefolder": lambda i, x: {"file_name": x, "prompt": f"which of {i} ?", "answer": i},
    "trl": lambda i, x: {"images": [x], "prompt": f"which of {i} ?", "answer": str(i)},
    "trl messages": lambda i, x: {
        "image": x, "prompt": [user(f"which of {i} ?", MARK)], "answer": str(i),
    },
    "chat": lambda i, x: {"images": [x], "messages": [user(f"which of {i} ?"), assistant(str(i))]},
    "chat with parts": lambda i, x: {
        "messages": [user(f"which of {i} ?", {"type": "image", "image": x}), assistant(str(i))],
    },
}  # fmt: skip


def write(path, layout, count=6, rows=None, parquet=False, **options):
    """Writes a folder of `count` records in a layout, with a column 'level'."""
    path.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        if not parquet:
            (path / f"{i}.png").write_bytes(png(i))
        image = {"bytes": png(i), "path": f"{i}.png"} if parquet else f"{i}.png"
        records.append(RECORDS[layout](i, image) | {"level": i % 2})
    if parquet:
        pq.write_table(
            pa.Table.from_pylist(records), path / "train-00000-of-00001.parquet", **options
        )
    else:
        name = "metadata.jsonl" if layout == "imagefolder" else "train.jsonl"
        (path / name).write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


CASES = [(layout, False) for layout in RECORDS] + [
    (layout, True) for layout in RECORDS if layout not in ("imagefolder", "chat with parts")
]


@pytest.mark.parametrize(("layout", "parquet"), CASES)
def test_every_layout_has_the_same_records(layout, parquet, tmp_path):
    records = open_folder(write(tmp_path, layout, parquet=parquet, row_group_size=4), **KEYS)
    assert len(records) == 6 and records.rejected == ()
    batch = records.read(range(6))
    for i in range(6):
        np.testing.assert_array_equal(batch.images[i], np.broadcast_to(color(i), (4, 6, 3)))
    assert batch.prompts == tuple(f"which of {i} ?" for i in range(6))
    assert batch.answers == tuple("012345")
    assert batch.columns == tuple({"level": i % 2} for i in range(6))
    name = {True: "train-00000-of-00001.parquet"}.get(
        parquet, "metadata.jsonl" if layout == "imagefolder" else "train.jsonl"
    )
    assert records.names == tuple(f"{name}:{i + 1}" for i in range(6))
    # Image data stays out of the messages, which reward functions get.
    content = (
        "which of 5 ?" if layout == "chat" else [MARK, {"type": "text", "text": "which of 5 ?"}]
    )
    spoken = layout not in ("imagefolder", "trl")
    expected = ({"role": "user", "content": content},) if spoken else None
    assert batch.messages[5] == expected and batch.take([1, 5]).messages[1] == expected
    # The split by the content of the images does not depend on the layout.
    folder = open_folder(write(tmp_path / "other", "imagefolder"), **KEYS)
    for part in ("test", "train"):
        split, other = (x.split({"test": 2}, seed=0)[part] for x in (records, folder))
        assert sorted(split.read(range(len(split))).answers) == sorted(
            other.read(range(len(other))).answers
        )


def test_a_system_message_comes_before_the_users():
    record = {
        "image": "x.png",
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("Why?", MARK),
            assistant("so"),
        ],
        "source": "web",
    }
    sample = read_sample(record, {})
    assert sample.prompt == "Be brief.\n\nWhy?" and sample.answer == "so"
    assert [x["role"] for x in sample.messages] == ["system", "user"]
    assert sample.columns == {"source": "web"}


def test_columns_have_other_names_and_stay_columns():
    record = {
        "photo": {"path": "x.png"},
        "problem": "Where?",
        "box": [1, 2, 3, 4.5],
        "answer": None,
    }
    sample = read_sample(record, {"image": "photo", "prompt": "problem", "answer": "box"})
    assert sample[:3] == ("x.png", "Where?", "[1, 2, 3, 4.5]")
    assert sample.columns == {"problem": "Where?", "box": [1, 2, 3, 4.5]}


def test_a_column_with_the_name_of_an_argument_is_no_further_column():
    record = {"image": "x.png", "prompt": "p", "completion": "a"}
    sample = read_sample(record, {"answer": "completion"})
    assert sample.answer == "a" and sample.columns == {}


def test_what_another_column_replaces_stays_a_column_unless_its_name_is_an_argument():
    turns = [user("q", MARK)]
    record = {"image": "x.png", "problem": "p", "prompt": "old", "messages": turns, "answer": "b"}
    sample = read_sample(record | {"right": "a"}, {"prompt": "problem", "answer": "right"})
    assert sample.prompt == "p" and sample.answer == "a" and sample.messages is None
    assert sample.columns == {"problem": "p", "messages": turns, "right": "a"}


def test_image_data_of_further_columns_stays_out_of_them():
    data = {"bytes": png(0), "path": None}
    kept = {"note": b"text", "path": {"path": "y.png"}, "box": [[1, 2]], "none": None}
    further = {"mask": data, "crops": [data, data], "raw": png(1), "pair": {"left": data}}
    assert read_sample(GOOD | kept | further, {}).columns == kept


def test_answers_in_json_keep_their_letters():
    sample = read_sample(GOOD | {"answer": ["\u732b", "caf\u00e9"]}, {})
    assert sample.answer == '["\u732b", "caf\u00e9"]'


def test_trls_completions_are_answers_if_they_are_named():
    record = {"image": "x.png", "prompt": [user("p")], "completion": [assistant("a")]}
    remedy = r"dataset.columns=\{'answer': 'completion'\}"
    with pytest.raises(ValueError, match=f"answer=None is not a non-empty text.*{remedy}"):
        read_sample(record, {})
    sample = read_sample(record, {"answer": "completion"})
    assert sample.answer == "a" and sample.columns == {}


GOOD = {"image": "x.png", "prompt": "p", "answer": "a"}
TURNS = [user("p"), assistant("a"), user("q")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, r"image=None is not an image\.$"),
        ({"image": 3}, "image=3 is not an image"),
        ({"image": {"bytes": b"", "path": None}}, "image=None is not an image"),
        ({"images": ["y.png"]}, r"\['image', 'images'\], of which only one may have a value"),
        ({"image": None, "images": []}, "images has 0 images; a prompt has one"),
        ({"image": None, "images": ["x.png", "y.png"]}, "images has 2 images; a prompt has one"),
        ({"prompt": " "}, "prompt=' ' is not a non-empty text"),
        ({"prompt": []}, "the roles .. before the answer"),
        ({"prompt": ["p"]}, r"prompt=\['p'\] is not a non-empty text"),
        ({"messages": TURNS}, r"\['prompt', 'messages'\], of which only one"),
        ({"prompt": TURNS}, r"roles \['user', 'assistant', 'user'\] before .*Split other"),
        ({"prompt": [assistant("a")]}, r"the roles \[\] before the answer"),
        ({"prompt": [user("p"), assistant("b")]}, "an answer in 'answer' and a message of an ass"),
        ({"prompt": [user("p")], "answer": None}, "answer=None is not a non-empty text"),
        ({"prompt": [user("p", MARK, MARK)]}, "Its messages have 2 images"),
        ({"prompt": [user("p", {"type": "image", "image": "y.png"})]},
        "an image in 'image' and one"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}, MARK]}]},
         "An image comes after text"),
        ({"prompt": [user("p", {"type": "audio"})]}, r"the part \{'type': 'audio'\}, not a text"),
        ({"prompt": [{"role": "user", "content": None}]}, "the content None, which has no text"),
        ({"prompt": [{"role": "user"}]}, "the content None, which has no text"),
        ({"answer": []}, r"answer=\[\] is not a non-empty text"),
        ({"answer": [float("nan")]}, "not JSON compliant"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used_are_refused_with_a_reason(changes, message):
    assert read_sample(GOOD, {})
    with pytest.raises(ValueError, match=message):
        read_sample(GOOD | changes, {})


def test_a_column_that_is_missing_is_named_with_those_that_are_there():
    message = r"file_name=None is not an image. The record has only \['prompt', 'answer'\]"
    with pytest.raises(ValueError, match=message):
        read_sample({"prompt": "p", "answer": "a"}, {})
    with pytest.raises(ValueError, match="solution=None is not .* The record has only .'image', "):
        read_sample(GOOD, {"answer": "solution"})


def test_bad_rows_of_a_table_are_set_aside_and_named(tmp_path):
    good = {"image": {"bytes": png(0), "path": None}, "prompt": "p", "answer": "a"}
    rows = [
        good,
        good | {"image": {"bytes": b"no image", "path": None}},
        good | {"image": None},
        good | {"image": {"bytes": None, "path": "none.png"}},
        good | {"image": {"bytes": None, "path": "../0.png"}},
        good | {"answer": None},
        good | {"image": {"bytes": png(0, size=(64, 64))[:-60], "path": None}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "0.png").write_bytes(png(1))
    records = open_folder(tmp_path, **(KEYS | {"max_rejected": 0.9}))
    assert records.names == ("a.parquet:1",)
    reasons = {r.name: r.reason for r in records.rejected}
    for row, reason in {
        2: "it is no image of a format", 3: "image=None is not an image", 4: "No such file",
        5: "'../0.png' of the image is outside the folder", 6: "answer=None", 7: "truncated",
    }.items():  # fmt: skip
        assert reason in reasons[f"a.parquet:{row}"]
    with pytest.raises(
        ValueError, match=r"6 of 7 records cannot be used(.|\n)*a.parquet:2: OSError"
    ):
        open_folder(tmp_path, **KEYS)


def test_the_row_groups_of_all_tables_share_a_bounded_memory(tmp_path, monkeypatch):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        write(tmp_path, "trl", count=64, parquet=True, row_group_size=32)
        (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / name)
    sizes, made, kept = [], [], []
    original = tables.RowGroups.get

    def spy(self, key, read):
        def counted():
            sizes.append((table := read()).nbytes)
            return table

        made.append(self)
        table = original(self, key, counted)
        with self._lock:
            kept.append(sum(x.nbytes for x, _ in self._groups.values()))
        return table

    monkeypatch.setattr(tables.RowGroups, "get", spy)
    records = open_folder(tmp_path, **KEYS)
    # All four groups fit, and neighbors share a read, though several threads read them.
    assert len(set(made)) == 1 and len(sizes) == 4 and max(kept) == sum(sizes)
    assert records.read([127, 0]).answers == ("63", "0") and len(sizes) == 4
    bound = 2 * max(sizes)
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", bound)
    sizes.clear()
    records = open_folder(tmp_path, **KEYS)
    kept.clear()
    for numbers in ([127, 126], [0, 1], [40, 70], [127, 0]):
        assert records.read(numbers).answers == tuple(str(i % 64) for i in numbers)
    assert len(sizes) > 4 and 0 < min(kept) and max(kept) <= bound


def test_images_in_parquet_are_decoded_once_however_often_it_is_opened(tmp_path, decoded):  # noqa: F811
    write(tmp_path, "trl", parquet=True)
    first = open_folder(tmp_path, **KEYS)
    assert len(decoded) == 6
    assert open_folder(tmp_path, **KEYS).images == first.images and len(decoded) == 6
    path = tmp_path / "train-00000-of-00001.parquet"
    write(tmp_path, "trl", count=7, parquet=True)
    os.utime(path, ns=(1, 1))
    assert open_folder(tmp_path, **KEYS).images[:6] == first.images and len(decoded) == 7


def test_images_of_another_column_are_other_images(tmp_path):
    rows = [
        {"before": {"bytes": png(i)}, "after": {"bytes": png(i + 5)}, "prompt": "p", "answer": "a"}
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    before, after = (
        open_folder(tmp_path, names={"image": column}, **KEYS).images
        for column in ("before", "after")
    )
    assert not {x.digest for x in before} & {x.digest for x in after}


def test_tables_of_several_splits_are_chosen_by_a_pattern(tmp_path):
    write(tmp_path / "data", "trl", parquet=True)
    (path,) = (tmp_path / "data").iterdir()
    assert len(open_folder(tmp_path, **KEYS)) == 6
    path.with_name("test-00000-of-00001.parquet").write_bytes(path.read_bytes())
    path.with_name("train-00001-of-00002.parquet").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"choose those of one split .* 'data/test\*.parquet'"):
        open_folder(tmp_path, **KEYS)
    records = open_folder(tmp_path, files="data/train-*.parquet", **KEYS)
    assert len(records) == 12 and records.names[6] == "data/train-00001-of-00002.parquet:1"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "metadata.jsonl does not exist; .* or give a directory with"),
        ("*.csv", "table.csv is a table of unknown format; use .jsonl, .parquet"),
        ("*.arrow", r"dataset.files='\*.arrow' matches no file in"),
        ("../*.jsonl", r"dataset.files='../\*.jsonl' must be relative"),
        ("/tmp/*.jsonl", "must be relative"),
        ("bad.parquet", "bad.parquet cannot be read .*; write it again"),
    ],
)
def test_tables_that_cannot_be_found_are_refused(files, message, tmp_path):
    (tmp_path / "table.csv").touch()
    (tmp_path / "sub").mkdir()
    if files == "bad.parquet":
        (tmp_path / files).write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path, files=files, **KEYS)


def test_two_periods_in_the_name_of_a_directory_are_not_its_parent(tmp_path):
    write(tmp_path / "data..v2", "trl")
    found = tables.find_tables(tmp_path, "data..v2/*.jsonl")
    assert found == [tmp_path / "data..v2/train.jsonl"]


def test_encoded_images_in_lines_are_refused_with_a_short_reason(tmp_path):
    text = base64.b64encode(png(0) * 100_000).decode()
    lines = [{"image": x, "prompt": "p", "answer": "a"} for x in (text, text[:4096])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="looks like encoded data; give a path") as error:
        open_folder(tmp_path, **KEYS)
    assert len(str(error.value)) < 2000 and "a.jsonl:2: OSError" in str(error.value)


def test_large_row_groups_are_refused(tmp_path, monkeypatch):
    write(tmp_path, "trl", parquet=True)
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match=r"has a row group of \d+ bytes.* row_group_size=100\)"):
        open_folder(tmp_path, **KEYS)


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path, "trl", parquet=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pyarrow .*pip install -e '.\[data\]'"):
        open_folder(tmp_path, **KEYS)


def test_tables_are_known_by_their_contents(tmp_path):
    write(tmp_path / "a", "trl")
    text = tmp_path / "a/train.jsonl"
    assert tables.fingerprint(text) == text.read_bytes()
    write(tmp_path / "b", "trl", parquet=True)
    (path,) = (tmp_path / "b").iterdir()
    before = tables.fingerprint(path)
    assert len(before) == 64
    write(tmp_path / "b", "trl", count=5, parquet=True)
    assert tables.fingerprint(path) != before


def test_images_are_decoded_by_batch(tmp_path, monkeypatch):
    records = open_folder(write(tmp_path, "trl", parquet=True), **KEYS)
    seen = []
    monkeypatch.setattr(
        images_lib, "read_rgb", lambda x, read=images_lib.read_rgb: seen.append(1) or read(x)
    )
    records.batch(0)
    assert len(seen) == 4
