"""Tests of TFRecord files, whose bytes are built here to the published layout.

The data set has the structure of Open X-Embodiment: other names than ours, an action in parts, and
two cameras.
"""

import io
import json
import struct

import numpy as np
from PIL import Image
import pytest

from mmrl_jax.data import formats, tfrecord
from mmrl_jax.data.records import Invalid
from tests import episodes
from tests.data.test_crc32c import bitwise
from tests.data.test_rlds import read_all

tfds = pytest.importorskip("tensorflow_datasets")

FEATURES = {
    "pixels": "observation/image",
    "proprio": "observation/state[1:4]",
    "instruction": "observation/natural_language_instruction",
    "action": ("action/world_vector[:1]", "action/gripper"),
}


def masked(data):
    crc = bitwise(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def framed(data):
    length = struct.pack("<Q", len(data))
    return b"".join(
        [length, struct.pack("<I", masked(length)), data, struct.pack("<I", masked(data))]
    )


def png(image):
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def step_values(number, t):
    """Returns the values of a step that a mapping reads."""
    rng = np.random.default_rng([number, t])
    return {
        "image": rng.integers(0, 256, (6, 8, 3), np.uint8),
        "state": rng.normal(size=7).astype(np.float32),
        "vector": rng.uniform(-1, 1, 3).astype(np.float32),
        "gripper": rng.uniform(-1, 1, 1).astype(np.float32),
    }


def oxe(directory, lengths=((3, 2), (4,))):
    """Writes a data set of TFRecord files with the given numbers of steps in each shard."""
    f = tfds.features
    features = f.FeaturesDict(
        {
            "steps": f.Dataset(
                {
                    "observation": {
                        "image": f.Image(shape=(6, 8, 3), encoding_format="png"),
                        "wrist": f.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "state": f.Tensor(shape=(7,), dtype=np.float32),
                        "natural_language_instruction": f.Text(),
                    },
                    "action": {
                        "world_vector": f.Tensor(shape=(3,), dtype=np.float32),
                        "gripper": f.Tensor(shape=(1,), dtype=np.float32),
                    },
                    "reward": f.Scalar(np.float32),
                    "is_first": f.Scalar(np.bool_),
                    "is_last": f.Scalar(np.bool_),
                    "is_terminal": f.Scalar(np.bool_),
                }
            )
        }
    )
    directory.mkdir(parents=True)
    features.save_config(str(directory))
    number, shards = 0, []
    for part in lengths:
        records = []
        for steps in part:
            rows = []
            for t in range(steps):
                x = step_values(number, t)
                rows.append(
                    {
                        "observation": {
                            "image": png(x["image"]),
                            "wrist": b"no image at all",
                            "state": x["state"],
                            "natural_language_instruction": "größe rot",
                        },
                        "action": {"world_vector": x["vector"], "gripper": x["gripper"]},
                        "reward": np.float32(t),
                        "is_first": t == 0,
                        "is_last": t == steps - 1,
                        "is_terminal": t == steps - 1 and number == 0,
                    }
                )
            example = features.encode_example({"steps": rows})
            records.append(framed(features.serialize_example(example)))
            number += 1
        shards.append(records)
    for i, records in enumerate(shards):
        name = f"bridge-train.tfrecord-{i:05d}-of-{len(shards):05d}"
        (directory / name).write_bytes(b"".join(records))
    info = {
        "name": "bridge",
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": "train",
                "numBytes": "1",
                "shardLengths": [str(len(records)) for records in shards],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


def mapping(source, **changes):
    return episodes.mapping(source, FEATURES, **{"privileged": {}} | changes)


def assert_values(found, number, steps):
    values = [step_values(number, t) for t in range(steps)]
    assert found.final_observation and found.actions == steps - 1
    np.testing.assert_array_equal(found.observation["pixels"], [x["image"] for x in values])
    np.testing.assert_array_equal(found.observation["proprio"], [x["state"][1:4] for x in values])
    action = [[x["vector"][0], x["gripper"][0]] for x in values]
    np.testing.assert_array_equal(found.action, np.array(action, np.float32))
    np.testing.assert_array_equal(found.reward, np.arange(steps))
    assert list(found.language_instruction) == ["größe rot"] * steps
    assert found.is_terminal.any() == (number == 0)


@pytest.mark.parametrize("converted", [False, True])
def test_open_x_embodiment_is_read_value_by_value(tmp_path, converted):
    directory = oxe(tmp_path / "bridge" / "1.0.0")
    if converted:
        assert not tfrecord.to_array_record(directory, tmp_path / "new").total
        directory = tmp_path / "new"
    source = formats.open_directory(directory, "train")
    assert source.features["observation/image"].shape == (6, 8, 3)
    found, quarantine = read_all(source, mapping(source))
    assert not quarantine.total
    for number, (x, steps) in enumerate(zip(found, (3, 2, 4), strict=True)):
        assert_values(x, number, steps)


def test_tfds_reads_what_is_converted(tmp_path):
    directory = oxe(tmp_path / "bridge" / "1.0.0")
    tfrecord.to_array_record(directory, tmp_path / "new")
    builder = tfds.builder_from_directory(str(tmp_path / "new"))
    decoders = {"steps": {"observation": {"wrist": tfds.decode.SkipDecoding()}}}
    source = builder.as_data_source(split="train", decoders=decoders)
    steps = list(source[2]["steps"])
    assert len(source) == 3 and len(steps) == 4
    np.testing.assert_array_equal(steps[1]["observation"]["state"], step_values(2, 1)["state"])


def test_an_interrupted_conversion_is_resumed(tmp_path, monkeypatch):
    directory, calls = oxe(tmp_path / "bridge"), []
    read = tfrecord.Shard.read

    def failing(shard, index):
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(shard, index)

    monkeypatch.setattr(tfrecord.Shard, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        tfrecord.to_array_record(directory, tmp_path / "new")
    assert [x.name for x in (tmp_path / "new").iterdir()] == [
        "bridge-train.array_record-00000-of-00002"
    ]
    tfrecord.to_array_record(directory, tmp_path / "new")
    assert calls == [0, 1, 0, 0]  # The first shard was not read again.
    assert len(formats.open_directory(tmp_path / "new", "train")) == 3


def test_a_flipped_bit_is_found_by_the_checksums(tmp_path):
    directory = oxe(tmp_path / "bridge")
    path = directory / "bridge-train.tfrecord-00000-of-00002"
    data = path.read_bytes()
    shard = tfrecord.Shard(path)
    (first, length), (second, _) = shard._records
    flips = {
        0: ["damaged shard"] * 2,  # In the length of the first record.
        9: ["damaged shard"] * 2,  # In its checksum.
        first + length // 2: ["damaged shard"],  # In the data of the first record.
        first + length + 1: ["damaged shard"],  # In the checksum of the data.
        second - 5: ["damaged shard"],  # In the length of the second record.
    }
    for place, expected in flips.items():
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        source = formats.open_directory(directory, "train")
        found, quarantine = read_all(source, mapping(source))
        assert len(found) == 3 - len(expected)
        assert list(quarantine.counts.elements()) == expected, place
    assert "checksum of the length is wrong" in quarantine.summary()


@pytest.mark.parametrize("cut", [1, 5, 2000])
def test_a_truncated_file_loses_its_last_records_alone(tmp_path, cut):
    directory = oxe(tmp_path / "bridge")
    path = directory / "bridge-train.tfrecord-00000-of-00002"
    path.write_bytes(path.read_bytes()[:-cut])
    source = formats.open_directory(directory, "train")
    found, quarantine = read_all(source, mapping(source))
    assert quarantine.counts == {"truncated shard": 3 - len(found)} and len(found) in (1, 2)
    # The converter counts the same, also when its files are there already.
    for _ in range(2):
        lost = tfrecord.to_array_record(directory, tmp_path / "new")
        assert lost.counts == {"damaged shard": 3 - len(found)}
    assert len(formats.open_directory(tmp_path / "new", "train")) == len(found)


def test_a_file_that_ends_at_a_record_lacks_the_declared_ones(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(framed(b"a"))
    shard = tfrecord.Shard(path)
    assert len(shard) == 1 and shard.read(0) == b"a" and shard.damage is None
    with pytest.raises(Invalid, match="truncated shard: x has 1 records"):
        shard.read(1)


def test_an_image_that_nobody_reads_is_not_decoded(tmp_path):
    source = formats.open_directory(oxe(tmp_path / "bridge"), "train")
    raw = source.read(0, ["observation/wrist"])
    assert raw.fields["observation/wrist"] == [b"no image at all"] * 3
    wrist = episodes.mapping(source, FEATURES | {"pixels": "observation/wrist"}, privileged={})
    with pytest.raises(Invalid, match="damaged image: 'observation/wrist' at step 0"):
        wrist(source.read(0, wrist.wanted))


def test_array_record_is_not_converted(tmp_path):
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    with pytest.raises(ValueError, match="format array_record, not tfrecord"):
        tfrecord.to_array_record(directory, tmp_path / "new")
