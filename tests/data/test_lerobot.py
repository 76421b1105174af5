"""Tests of LeRobot data sets, whose published layouts v2.1 and v3.0 are built here.

The layouts are those of LeRobotDataset in huggingface/lerobot: data files with several episodes in
one group of rows, tasks as the index of a pandas table, and videos that concatenate episodes.
"""

import json

import numpy as np
import pytest

from mmrl_jax.data import formats, records
from mmrl_jax.data.lerobot import LeRobot
from mmrl_jax.data.records import Invalid, InvalidData
from tests import episodes
from tests.data.test_rlds import read_all
from tests.data.test_tfrecord import png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FPS, LENGTHS, TASKS = 10, (3, 2, 4), ("pick up the can", "größe\u2028rot")
STATE, FRONT, WRIST = "observation.state", "observation.images.front", "observation.images.wrist"
FEATURES = {"pixels": FRONT, "proprio": f"{STATE}[:3]", "action": "action[1:3]"}


def values(episode, t):
    """Returns state and action of a frame."""
    rng = np.random.default_rng([episode, t])
    return rng.normal(size=5).astype(np.float32), rng.uniform(-1, 1, 3).astype(np.float32)


def frame(episode, t, size=(32, 48)):
    """Returns an image of one color, which a video keeps nearly."""
    color = np.array([20 + 40 * episode, 30 + 40 * t, 128], np.uint8)
    return np.broadcast_to(color, (*size, 3)).copy()


def rows(episode, first):
    """Returns the frames of an episode as columns, without images."""
    count = LENGTHS[episode]
    states, actions = zip(*(values(episode, t) for t in range(count)), strict=True)
    return {
        STATE: [x.tolist() for x in states],
        "action": [x.tolist() for x in actions],
        "timestamp": [t / FPS for t in range(count)],
        "frame_index": list(range(count)),
        "episode_index": [episode] * count,
        "index": list(range(first, first + count)),
        "task_index": [episode % 2] * count,
        "next.reward": [float(t == count - 1) for t in range(count)],
        "next.done": [t == count - 1 for t in range(count)],
    }


def schema(image):
    fields = {
        STATE: pa.list_(pa.float32(), 5),
        "action": pa.list_(pa.float32(), 3),
        "timestamp": pa.float32(),
        "frame_index": pa.int64(),
        "episode_index": pa.int64(),
        "index": pa.int64(),
        "task_index": pa.int64(),
        "next.reward": pa.float32(),
        "next.done": pa.bool_(),
    }
    if image:
        fields[FRONT] = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(list(fields.items()))


def table(numbers, image=True):
    """Returns the frames of some episodes as a table."""
    columns = {}
    for episode in numbers:
        part = rows(episode, sum(LENGTHS[:episode]))
        if image:
            part[FRONT] = [
                {"bytes": png(frame(episode, t)), "path": f"frame-{t:06d}.png"}
                for t in range(LENGTHS[episode])
            ]
        for name, x in part.items():
            columns.setdefault(name, []).extend(x)
    return pa.table(columns, schema=schema(image))


def info(version, kind, **changes):
    shape = {"shape": [32, 48, 3], "names": ["height", "width", "channels"]}
    features = {
        STATE: {"dtype": "float32", "shape": [5], "names": list("abcde")},
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        FRONT: {"dtype": kind} | shape,
    }
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        dtype = "float32" if name == "timestamp" else "int64"
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    common = {
        "robot_type": "so100",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "features": features,
    }
    return common | {"codebase_version": version} | changes


def write_video(path, frames):
    """Writes frames uint8 [N, H, W, 3] as a video."""
    import imageio_ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=FPS, quality=10, macro_block_size=1
    )
    writer.send(None)
    for x in frames:
        writer.send(np.ascontiguousarray(x))
    writer.close()


def video_frames(episode):
    return [frame(episode, t) for t in range(LENGTHS[episode])]


def v21(root, kind="image"):
    """Writes the layout v2.1: one file for each episode."""
    for episode, length in enumerate(LENGTHS):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([episode], kind == "image"), path)
        if kind == "video":
            name = f"videos/chunk-000/{FRONT}/episode_{episode:06d}.mp4"
            write_video(root / name, video_frames(episode))
        del length
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
        "total_chunks": 1,
        "total_videos": len(LENGTHS),
    }
    meta = root / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info("v2.1", kind, **paths)))
    lines = [
        {"episode_index": i, "tasks": [TASKS[i % 2]], "length": n} for i, n in enumerate(LENGTHS)
    ]
    tasks = [{"task_index": i, "task": text} for i, text in enumerate(TASKS)]
    for name, entries in (("episodes", lines), ("tasks", tasks)):
        # U+2028 stays as it is, as with ensure_ascii=False in LeRobot.
        text = "\n".join(json.dumps(x, ensure_ascii=False) for x in entries)
        (meta / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
    return root


def v30(root, kind="image", index="__index_level_0__"):
    """Writes the layout v3.0: the first two episodes share a file and a group of rows."""
    files = ((0, 1), (2,))
    episode_rows = []
    for file, numbers in enumerate(files):
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(numbers, kind == "image"), path)
        start = 0
        for episode in numbers:
            length = LENGTHS[episode]
            first = sum(LENGTHS[:episode])
            row = {
                "episode_index": episode,
                "tasks": [TASKS[episode % 2]],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": first,
                "dataset_to_index": first + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                "stats/action/min": [-1.0],
            }
            if kind == "video":
                row |= {
                    f"videos/{FRONT}/chunk_index": 0,
                    f"videos/{FRONT}/file_index": file,
                    f"videos/{FRONT}/from_timestamp": start / FPS,
                    f"videos/{FRONT}/to_timestamp": (start + length) / FPS,
                }
            start += length
            episode_rows.append(row)
        if kind == "video":
            frames = [x for episode in numbers for x in video_frames(episode)]
            write_video(root / f"videos/{FRONT}/chunk-000/file-{file:03d}.mp4", frames)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episode_rows), path)
    pq.write_table(
        pa.table({"task_index": list(range(2)), index: list(TASKS)}), root / "meta/tasks.parquet"
    )
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info("v3.0", kind, **paths)))
    return root


LAYOUTS = {"v2.1": v21, "v3.0": v30}


def mapping(source, **changes):
    return episodes.mapping(source, FEATURES, **{"privileged": {}, "pixels": (32, 48)} | changes)


@pytest.mark.parametrize("version", LAYOUTS)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_published_layout_is_read_value_by_value(tmp_path, version, kind):
    source = formats.open_directory(LAYOUTS[version](tmp_path / "d", kind), "train")
    assert isinstance(source, LeRobot) and len(source) == 3
    found, quarantine = read_all(source, mapping(source))
    assert not quarantine.total, quarantine.summary()
    for episode, (x, count) in enumerate(zip(found, LENGTHS, strict=True)):
        assert not x.final_observation and x.actions == count
        expected = [values(episode, t) for t in range(count)]
        np.testing.assert_array_equal(x.observation["proprio"], [s[:3] for s, _ in expected])
        np.testing.assert_array_equal(x.action, [a[1:3] for _, a in expected])
        np.testing.assert_array_equal(x.reward, np.arange(count) == count - 1)
        np.testing.assert_array_equal(x.is_terminal, np.arange(count) == count - 1)
        assert list(x.language_instruction) == [TASKS[episode % 2]] * count
        frames = np.stack(video_frames(episode)).astype(int)
        # A video is lossy; frames of one color keep it within a few levels.
        limit = 0 if kind == "image" else 6
        assert np.abs(x.observation["pixels"].astype(int) - frames).max() <= limit


@pytest.mark.parametrize("version", LAYOUTS)
def test_episodes_are_read_in_any_order(tmp_path, version):
    source = LeRobot(LAYOUTS[version](tmp_path / "d", "video"), "train")
    make = mapping(source)
    for episode in (2, 0, 1, 0):
        x = make(source.read(episode, make.wanted))
        assert x.actions == LENGTHS[episode]
        first = x.observation["pixels"][0].astype(int)
        assert np.abs(first - frame(episode, 0)).max() <= 6


def test_the_index_of_the_tasks_may_have_a_name(tmp_path):
    source = LeRobot(v30(tmp_path / "d", index="task"), "train")
    assert source.read(1, ["task"]).fields["task"] == [TASKS[1]] * 2


def test_what_is_written_is_read_value_by_value(tmp_path):
    written = episodes.several()
    source = formats.open_directory(episodes.write(tmp_path / "d", "lerobot", written), "train")
    found, quarantine = read_all(source, episodes.mapping(source))
    assert not quarantine.total
    for one, two in zip(written, found, strict=True):
        episodes.assert_equal(one, two)
        assert not two.final_observation


def test_pandas_reads_the_tasks_as_lerobot_does(tmp_path):
    pandas = pytest.importorskip("pandas")
    root = episodes.write(tmp_path / "d", "lerobot", episodes.several())
    tasks = pandas.read_parquet(root / "meta/tasks.parquet")
    assert tasks.index.tolist() == list(episodes.TEXTS) and tasks.index.name == "task"
    assert tasks["task_index"].tolist() == [0, 1]
    declared = json.loads((root / "meta/info.json").read_text())
    assert declared["total_frames"] == 3 + 1 + 5 + 2 and declared["fps"] == 20
    data = pandas.concat([pandas.read_parquet(x) for x in sorted(root.glob("data/*/*.parquet"))])
    assert data["index"].tolist() == list(range(11))
    assert data["episode_index"].tolist() == [0] * 3 + [1] + [2] * 5 + [3] * 2
    assert data["next.done"].sum() == 4 and data["next.truncated"].sum() == 2
    # Statistics over all frames, merged from those of the episodes.
    stats = json.loads((root / "meta/stats.json").read_text())["action"]
    actions = np.stack(data["action"].tolist())
    np.testing.assert_allclose(stats["mean"], actions.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], actions.std(0), rtol=1e-6)
    np.testing.assert_allclose(stats["max"], actions.max(0), rtol=1e-6)
    assert stats["count"] == [11]
    for name, feature in declared["features"].items():
        assert name in data.columns, name
        assert feature["dtype"] in ("image", "float32", "int64", "bool")


@pytest.mark.parametrize("version", LAYOUTS)
def test_missing_and_truncated_videos_are_counted(tmp_path, version):
    root = LAYOUTS[version](tmp_path / "d", "video")
    (first, *_, last) = sorted(root.glob("videos/**/*.mp4"))
    first.unlink()
    last.write_bytes(last.read_bytes()[:300])
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    missing = 2 if version == "v3.0" else 1
    assert len(found) == 2 - missing
    assert quarantine.counts == {"missing video": missing, "truncated video": 1}


def test_a_video_with_too_few_frames_is_counted(tmp_path):
    root = v30(tmp_path / "d", "video")
    (path,) = root.glob("videos/**/file-001.mp4")
    write_video(path, video_frames(2)[:-1])
    source = LeRobot(root, "train")
    _, quarantine = read_all(source, mapping(source))
    assert quarantine.counts == {"truncated video": 1}
    assert "3 frames that can be decoded, but frames 0 to 3" in quarantine.summary()


@pytest.mark.parametrize("version", LAYOUTS)
def test_damaged_and_missing_files_are_counted(tmp_path, version):
    root = LAYOUTS[version](tmp_path / "d")
    first, *_, last = sorted(root.glob("data/**/*.parquet"))
    first.write_bytes(first.read_bytes()[:-100])
    last.unlink()
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    lost = 3 if version == "v3.0" else 2
    assert len(found) == 3 - lost and quarantine.counts == {"damaged shard": lost}


def test_a_flipped_bit_in_what_we_write_changes_no_value_unnoticed(tmp_path):
    # Images have checksums of their own, and are left out.
    written = [
        x._replace(observation={"proprio": x.observation["proprio"]}) for x in episodes.several()
    ]
    root = episodes.write(tmp_path / "d", "lerobot", written, per_shard=4)
    (path,) = root.glob("data/**/*.parquet")
    data, lost = path.read_bytes(), 0
    for place in range(4, len(data) - 4, len(data) // 300):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        source = LeRobot(root, "train")
        found, quarantine = read_all(source, episodes.mapping(source, pixels=None))
        assert len(found) + quarantine.total == 4
        lost += quarantine.total
        for x in found:
            episodes.assert_equal(written[x.provenance.number], x)
    assert lost > 100


def test_checksums_of_pages_are_verified(tmp_path):
    root = v21(tmp_path / "d")
    path = root / "data/chunk-000/episode_000000.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table([0]), path, **options)
    data, number = path.read_bytes(), values(0, 1)[0][2].tobytes()
    place = data.index(number)
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    assert len(found) == 2 and quarantine.counts == {"damaged shard": 1}
    assert "CRC" in quarantine.summary()


def test_a_file_that_was_changed_on_purpose_can_be_read(tmp_path):
    root = episodes.write(tmp_path / "d", "lerobot", episodes.several())
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path), path)
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, episodes.mapping(source))
    assert len(found) == 2 and "delete that file" in quarantine.summary()
    (root / "meta/checksums.json").unlink()
    source = LeRobot(root, "train")
    assert len(read_all(source, episodes.mapping(source))[0]) == 4


def test_fewer_frames_than_declared_are_counted(tmp_path):
    root = v21(tmp_path / "d")
    path = root / "data/chunk-000/episode_000002.parquet"
    pq.write_table(table([2]).slice(0, 3), path)
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    assert len(found) == 2 and quarantine.counts == {"truncated shard": 1}
    assert "episode 2 has 3 frames, but 4 are declared" in quarantine.summary()


def test_a_missing_field_and_a_missing_image_are_counted(tmp_path):
    root = v21(tmp_path / "d")
    paths = sorted(root.glob("data/**/*.parquet"))
    pq.write_table(table([0]).drop_columns(["action"]), paths[0])
    images = table([1])
    column = pa.array([{"bytes": None, "path": "lost.png"}] * 2, images.schema.field(FRONT).type)
    pq.write_table(images.set_column(images.column_names.index(FRONT), FRONT, column), paths[1])
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    assert len(found) == 1
    assert quarantine.counts == {"missing field": 1, "missing image": 1}


def test_an_image_may_be_a_file(tmp_path):
    root = v21(tmp_path / "d")
    (root / "images").mkdir()
    (root / "images/0.png").write_bytes(png(frame(1, 0)))
    images = table([1])
    column = pa.array(
        [{"bytes": None, "path": "images/0.png"}] * 2, images.schema.field(FRONT).type
    )
    path = root / "data/chunk-000/episode_000001.parquet"
    pq.write_table(images.set_column(images.column_names.index(FRONT), FRONT, column), path)
    source = LeRobot(root, "train")
    x = mapping(source)(source.read(1, mapping(source).wanted))
    np.testing.assert_array_equal(x.observation["pixels"], [frame(1, 0)] * 2)


def test_mixed_image_sizes_are_counted(tmp_path):
    root = v21(tmp_path / "d")
    for episode, sizes in ((0, ((32, 48), (32, 48), (16, 48))), (1, ((16, 24),) * 2)):
        images = table([episode])
        pictures = [{"bytes": png(frame(episode, 0, size)), "path": None} for size in sizes]
        column = pa.array(pictures, images.schema.field(FRONT).type)
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        pq.write_table(images.set_column(images.column_names.index(FRONT), FRONT, column), path)
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    assert len(found) == 1 and quarantine.counts == {"mixed image sizes": 2}
    assert "sizes [(16, 48), (32, 48)]" in quarantine.summary()


def test_an_episode_without_frames_is_counted(tmp_path):
    root = v21(tmp_path / "d")
    path = root / "meta/episodes.jsonl"
    lines = [json.loads(x) for x in path.read_bytes().split(b"\n") if x]
    lines[0]["length"] = 0
    path.write_text("\n".join(json.dumps(x) for x in lines))
    pq.write_table(table([0]).slice(0, 0), root / "data/chunk-000/episode_000000.parquet")
    source = LeRobot(root, "train")
    found, quarantine = read_all(source, mapping(source))
    assert len(found) == 2 and quarantine.counts == {"empty episode": 1}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"codebase_version": "v1.6"}, "codebase_version='v1.6'"),
        ({"total_episodes": 4}, "lists 3 episodes, but meta/info.json declares 4"),
        ({"features": None}, "metadata of .* cannot be read"),
        ({"splits": {"test": "0:3"}}, "split='train'.*'test'"),
    ],
)
@pytest.mark.parametrize("version", LAYOUTS)
def test_damaged_metadata_are_an_error(tmp_path, version, change, match):
    root = LAYOUTS[version](tmp_path / "d")
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidData, match=match):
        LeRobot(root, "train")


def test_a_split_is_a_range_of_episodes(tmp_path):
    root = v30(tmp_path / "d")
    path = root / "meta/info.json"
    changed = json.loads(path.read_text()) | {"splits": {"train": "0:1", "val": "1:3"}}
    path.write_text(json.dumps(changed))
    source = LeRobot(root, "val")
    assert [source.name(i) for i in range(len(source))] == ["episode 1", "episode 2"]


def test_an_unknown_task_is_counted(tmp_path):
    root = v21(tmp_path / "d")
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": TASKS[0]}))
    source = LeRobot(root, "train")
    with pytest.raises(Invalid, match="task_index 1 is in no table"):
        source.read(1, ["task"])


def test_channels_may_be_declared_first(tmp_path):
    root = v21(tmp_path / "d")
    path = root / "meta/info.json"
    declared = json.loads(path.read_text())
    declared["features"][FRONT] |= {
        "shape": [3, 32, 48], "names": ["channels", "height", "width"]
    }  # fmt: skip
    path.write_text(json.dumps(declared))
    assert LeRobot(root, "train").features[FRONT] == records.Feature((32, 48, 3), "image")
