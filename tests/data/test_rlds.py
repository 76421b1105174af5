"""Tests of RLDS data sets: what we write, what TFDS reads of it, and what is damaged."""

import json

import numpy as np
import pytest

from mmrl_jax.data import formats, records
from mmrl_jax.data.records import Invalid, InvalidData
from mmrl_jax.data.rlds import Rlds
from tests import episodes

tfds = pytest.importorskip("tensorflow_datasets")


def read_all(source, mapping):
    """Returns the episodes of a source, and the quarantine of the others."""
    found, quarantine = [], records.Quarantine()
    for i in range(len(source)):
        try:
            found.append(mapping(source.read(i, mapping.wanted)))
        except Invalid as error:
            quarantine.add(source.name(i), error)
    return found, quarantine


def test_what_is_written_is_read_value_by_value(tmp_path):
    written = episodes.several()
    source = formats.open_directory(episodes.write(tmp_path / "d", "rlds", written), "train")
    assert isinstance(source, Rlds) and len(source) == 4
    found, quarantine = read_all(source, episodes.mapping(source))
    assert not quarantine.total
    for one, two in zip(written, found, strict=True):
        episodes.assert_equal(one, two)
        # Nothing is lost after the last action either.
        for name, x in one.fields().items():
            np.testing.assert_array_equal(x, two.fields()[name], err_msg=name)
    # Any order can be read.
    last = episodes.mapping(source)(source.read(3, source.features))
    episodes.assert_equal(written[3], last)


def test_tfds_reads_what_is_written(tmp_path):
    written = episodes.several()
    directory = episodes.write(tmp_path / "demo" / "1.0.0", "rlds", written)
    builder = tfds.builder_from_directory(str(directory))
    assert builder.info.name == "demo" and builder.info.splits["train"].num_examples == 4
    source = tfds.data_source("demo", split="train", data_dir=str(tmp_path))
    assert len(source) == 4
    for one, example in zip(written, source, strict=True):
        steps = list(example["steps"])
        assert len(steps) == one.actions + 1
        for t, step in enumerate(steps):
            for path, x in one.fields().items():
                value = step
                for key in path.split("/"):
                    value = value[key]
                np.testing.assert_array_equal(value, x[t], err_msg=path)
            assert step["language_instruction"].decode() == one.language_instruction[t]
        assert example["episode_metadata"]["policy"] == b"expert"
        assert example["episode_metadata"]["number"] == one.provenance.number


@pytest.mark.parametrize("steps", [0, 1])
def test_an_episode_without_actions_is_counted(tmp_path, steps):
    written = episodes.several()
    empty = episodes.episode(0)  # The final observation alone.
    if steps == 0:
        cut = {name: getattr(empty, name)[:0] for name in ("action", "reward", "discount")}
        cut |= {name: getattr(empty, name)[:0] for name in ("is_first", "is_last", "is_terminal")}
        for name in ("observation", "privileged"):
            cut[name] = {key: x[:0] for key, x in getattr(empty, name).items()}
        empty = empty._replace(language_instruction=[], **cut)
    directory = episodes.write(tmp_path / "d", "rlds", [*written, empty])
    source = Rlds(directory, "train")
    found, quarantine = read_all(source, episodes.mapping(source))
    assert len(found) == 4 and quarantine.counts == {"empty episode": 1}


def shard(directory, number):
    (path,) = directory.glob(f"*.array_record-0000{number}-of-*")
    return path


def test_a_truncated_or_missing_shard_is_counted(tmp_path):
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    path = shard(directory, 0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = Rlds(directory, "train")
    found, quarantine = read_all(source, episodes.mapping(source))
    assert [x.provenance.number for x in found] == [2, 3]
    assert quarantine.counts == {"truncated shard": 2}
    shard(directory, 1).unlink()
    source = Rlds(directory, "train")
    _, quarantine = read_all(source, episodes.mapping(source))
    assert quarantine.counts == {"truncated shard": 2, "damaged shard": 2}
    assert "00001-of-00002 does not exist" in quarantine.summary()


def test_a_flipped_bit_changes_no_value_unnoticed(tmp_path):
    written = episodes.several()
    directory = episodes.write(tmp_path / "d", "rlds", written)
    path = shard(directory, 0)
    data = path.read_bytes()
    places = [i for i, byte in enumerate(data) if byte]
    lost = 0
    for place in places[:: len(places) // 40]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        source = Rlds(directory, "train")
        found, quarantine = read_all(source, episodes.mapping(source))
        assert len(found) + quarantine.total == 4
        lost += quarantine.total
        for x in found:
            episodes.assert_equal(written[x.provenance.number], x)
    assert lost > 40  # Most of the flips are in a record.


def test_a_record_of_another_schema_is_counted(tmp_path):
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    other = episodes.write(
        tmp_path / "other",
        "rlds",
        [x._replace(privileged={}) for x in episodes.several()],
    )
    shard(directory, 0).write_bytes(shard(other, 0).read_bytes())
    source = Rlds(directory, "train")
    found, quarantine = read_all(source, episodes.mapping(source))
    assert len(found) == 2 and quarantine.counts == {"wrong schema": 2}
    assert "features.json" in quarantine.summary()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda d: (d / "features.json").unlink(), "features.json cannot be read"),
        (lambda d: (d / "dataset_info.json").write_text("{"), "dataset_info.json cannot be read"),
        (lambda d: (d / "dataset_info.json").unlink(), "neither dataset_info.json"),
    ],
)
def test_damaged_metadata_are_an_error(tmp_path, change, match):
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    change(directory)
    with pytest.raises(InvalidData, match=match):
        formats.open_directory(directory, "train")


def test_an_unknown_split_and_a_wrong_level_are_named(tmp_path):
    directory = episodes.write(tmp_path / "demo" / "1.0.0", "rlds", episodes.several())
    with pytest.raises(InvalidData, match="split='trian'.*nearest names are 'train'"):
        formats.open_directory(directory, "trian")
    with pytest.raises(InvalidData, match="Give the directory of a version.*demo/1.0.0"):
        formats.open_directory(tmp_path / "demo", "train")
    with pytest.raises(InvalidData, match="does not exist"):
        formats.open_directory(tmp_path / "nothing", "train")


def test_examples_that_are_no_episodes_are_an_error(tmp_path):
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    features = json.loads((directory / "features.json").read_text())
    del features["featuresDict"]["features"]["steps"]
    (directory / "features.json").write_text(json.dumps(features))
    with pytest.raises(InvalidData, match="examples with .'episode_metadata'."):
        Rlds(directory, "train")
