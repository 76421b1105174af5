"""Tests of packed episodes and their batches: exact positions, epochs, and value targets."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.data import files, formats, packed, pipeline
from mmrl_jax.data.records import InvalidData
from mmrl_jax.rl import advantages
from tests import episodes

pytest.importorskip("tensorflow_datasets")


class Counting:
    """A source that counts how often an episode is read."""

    def __init__(self, source):
        self.source, self.reads = source, 0
        self.features, self.defaults = source.features, source.defaults

    def __len__(self):
        return len(self.source)

    def name(self, index):
        return self.source.name(index)

    def read(self, index, fields):
        self.reads += 1
        return self.source.read(index, fields)


@pytest.fixture
def data(tmp_path):
    """Returns a data set of four episodes with 3, 1, 5 and 2 actions, and its cache."""
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    return Counting(formats.open_directory(directory, "train")), tmp_path / "cache"


def pack(source, cache, *, count=None, fingerprint="a", **changes):
    mapping = episodes.mapping(source, **changes)
    return packed.pack(source, mapping, episodes=count, fingerprint=fingerprint, cache=cache)


def make(data, **changes):
    source, cache = data
    arguments = {
        "tokens": np.array([[1, 2], [3, 0]], np.int32),
        "batch_size": 4,
        "seed": 0,
        "history": 1,
        "discount": 0.9,
        "one_step": False,
        "scaling": "none",
        "key": "bc.data.action_scaling",
    }
    return pipeline.Pipeline(pack(source, cache), **arguments | changes)


def test_rows_are_the_steps_of_the_episodes(data):
    source, cache = data
    found, written = pack(source, cache), episodes.several()
    assert found.starts.tolist() == [0, 4, 6, 12, 15] and found.numbers.tolist() == [0, 1, 2, 3]
    for i, one in enumerate(written):
        part = slice(found.starts[i], found.starts[i + 1])
        for name in ("pixels", "proprio"):
            np.testing.assert_array_equal(found.arrays[name][part], one.observation[name])
        for name in ("action", "reward", "is_terminal"):
            np.testing.assert_array_equal(found.arrays[name][part], getattr(one, name))
        np.testing.assert_array_equal(
            found.arrays["privileged/place"][part], one.privileged["place"]
        )
        assert found.arrays["has_action"][part].tolist() == [True] * one.actions + [False]
        texts = [found.texts[i] for i in found.arrays["text"][part]]
        assert texts == one.language_instruction
    actions = np.concatenate([x.action[: x.actions] for x in written])
    np.testing.assert_allclose(found.statistics["mean"], actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.statistics["high"], np.quantile(actions, 0.99, 0), rtol=1e-5)


def test_arrays_are_made_once_for_each_data_set_and_mapping(data):
    source, cache = data
    for changes, reads in (
        ({}, 4),
        ({}, 4),
        ({"fingerprint": "b"}, 8),
        ({"count": 3}, 11),
        ({"pixels": (3, 4)}, 15),
        ({"vocabulary": "other"}, 19),
        ({"count": 3}, 19),
    ):
        found = pack(source, cache, **changes)
        assert source.reads == reads, changes
    assert len(found.numbers) == 3
    assert not list(cache.glob(".new-*"))


def test_an_interrupted_reading_begins_anew(data, monkeypatch):
    source, cache = data
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(source, cache)
    assert not list(cache.iterdir())
    assert len(pack(source, cache).numbers) == 4


def test_a_full_disk_is_named(data, monkeypatch):
    source, cache = data
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(packed, "_make", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(InvalidData, match="XDG_CACHE_HOME"):
        pack(source, cache)
    assert not list(cache.iterdir())


def test_unusable_episodes_are_set_aside_and_the_others_kept(tmp_path):
    written = episodes.several()
    broken = written[1]._replace(action=np.full_like(written[1].action, np.nan))
    written[1] = broken
    directory = episodes.write(tmp_path / "d", "rlds", written)
    source = formats.open_directory(directory, "train")
    found = pack(source, tmp_path / "cache")
    assert found.numbers.tolist() == [0, 2, 3]
    assert found.quarantine.counts == {"non-finite action": 1}
    assert "00000-of-00002:1" in found.quarantine.summary()
    directory = episodes.write(tmp_path / "e", "rlds", [broken] * 2)
    source = formats.open_directory(directory, "train")
    with pytest.raises(InvalidData, match="No episode can be used. 2 episodes.*2 non-finite"):
        pack(source, tmp_path / "cache", fingerprint="e")
    with pytest.raises(InvalidData, match="5 episodes are to be used, but the data set has 2"):
        pack(source, tmp_path / "cache", count=5)


def test_every_epoch_has_each_step_once_in_another_order(data):
    line = make(data)
    rows = np.concatenate([line.rows(u, np.arange(4)) for u in range(22)])
    assert len(line) == 11  # 3 + 1 + 5 + 2 actions.
    expected = [0, 1, 2, 4, 6, 7, 8, 9, 10, 12, 13]
    epochs = rows.reshape(8, 11)
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    other = make(data, seed=1)
    assert other.rows(0, np.arange(4)).tolist() != rows[:4].tolist()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_positions_are_exact_across_processes_and_a_resume(data, processes):
    line = make(data)
    whole = [line.batch(u).rows for u in range(9)]

    def part(u, process):
        places = pipeline.places_of_process(4, process, processes)
        return make(data).batch(u, places).rows  # A new pipeline: as after a restart.

    # Update 5 is in the middle of the second epoch: samples 20 to 23 of 11 in each.
    for u in (0, 2, 5, 8):
        parts = [part(u, process) for process in range(processes)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[u])
    with pytest.raises(ValueError, match="batch_size=4 is no multiple of 3"):
        pipeline.places_of_process(4, 0, 3)


def test_a_batch_may_be_larger_than_the_data_set(data):
    rows = make(data, batch_size=25).batch(1).rows
    whole = [make(data).rows(u, np.arange(4)) for u in range(13)]
    np.testing.assert_array_equal(rows, np.concatenate(whole)[25:50])


def test_a_batch_has_the_values_of_its_steps(data):
    line = make(data)
    batch = line.batch(1)
    written, starts = episodes.several(), line.packed.starts
    for i, row in enumerate(batch.rows):
        number = int(np.searchsorted(starts, row, side="right")) - 1
        one, t = written[number], row - starts[number]
        np.testing.assert_array_equal(batch.action[i], one.action[t])
        np.testing.assert_array_equal(batch.observation["pixels"][i], one.observation["pixels"][t])
        last = one.observation["proprio"][one.actions]
        np.testing.assert_array_equal(batch.next_observation["proprio"][i], last)
        np.testing.assert_array_equal(batch.privileged["place"][i], one.privileged["place"][t])
        text = list(episodes.TEXTS).index(one.language_instruction[t])
        assert batch.observation["instruction"]["tokens"][i].tolist() == [[1, 2], [3, 0]][text]
        assert batch.observation["instruction"]["mask"][i].tolist() == [True, text == 0]


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("kind", ["rlds", "lerobot"])
def test_value_targets_are_those_of_recorded_demonstrations(tmp_path, kind, one_step):
    written = episodes.several()
    directory = episodes.write(tmp_path / "d", kind, written)
    source = formats.open_directory(directory, "train")
    found = pack(source, tmp_path / "cache")
    returns, weights, bootstrap = pipeline.value_targets(found, 0.9, one_step=one_step)
    for i, one in enumerate(written):
        count, start = one.actions, found.starts[i]
        last = (np.arange(count) == count - 1).astype(np.float32)
        terminal = one.is_terminal.any()
        expected_returns, expected_weights, step = advantages.bootstrapped_returns(
            reward=jnp.asarray(one.reward[:count, None]),
            terminated=jnp.asarray(last * terminal)[:, None],
            # Targets of one reward are those of episodes that are truncated after every step.
            truncated=jnp.asarray(np.maximum(last * (1 - terminal), one_step))[:, None],
            discount=0.9,
        )
        part = slice(start, start + count)
        np.testing.assert_allclose(returns[part], expected_returns[:, 0], rtol=1e-6)
        np.testing.assert_allclose(weights[part], expected_weights[:, 0], rtol=1e-6)
        # LeRobot has no observation after the last action, and the last one takes its place.
        after = np.minimum(step[:, 0], count - (kind == "lerobot"))
        np.testing.assert_array_equal(bootstrap[part], start + after)


def test_a_history_begins_with_the_episode(data):
    line = make(data, history=3, batch_size=11)
    batch = line.batch(0)
    proprio = line.packed.arrays["proprio"]
    place = {int(row): i for i, row in enumerate(batch.rows)}
    # Episode 2 has the rows 6 to 11; frames before it are its first.
    for row, frames in ((6, [6, 6, 6]), (7, [6, 6, 7]), (10, [8, 9, 10]), (0, [0, 0, 0])):
        expected = proprio[frames]
        np.testing.assert_array_equal(batch.observation["proprio"][place[row]], expected)
    assert batch.observation["pixels"].shape == (11, 3, 6, 8, 3)
    np.testing.assert_array_equal(batch.next_observation["proprio"][place[7]], proprio[[9, 10, 11]])


def test_actions_are_scaled_by_their_range(tmp_path):
    # Dimension 0 from 2 to 6, dimension 1 always 5.
    actions = np.array([[2, 5], [3, 5], [6, 5], [0, 0]], np.float32)
    one = episodes.episode(3)._replace(action=actions)
    source = formats.open_directory(episodes.write(tmp_path / "d", "rlds", [one]), "train")
    data = source, tmp_path / "cache"
    batch = make(data, batch_size=3, scaling="min_max").batch(0)
    scaled = batch.action[np.argsort(batch.rows)]
    np.testing.assert_allclose(scaled, [[-1, 0], [-0.5, 0], [1, 0]], atol=1e-6)
    clipped = make(data, batch_size=3, scaling="quantiles").batch(0).action
    assert clipped.min() == -1 and clipped.max() == 1
    with pytest.raises(InvalidData, match=r"actions are in \[2, 6\].*action_scaling"):
        make(data, scaling="none")


def test_the_fingerprint_is_of_names_and_contents(tmp_path):
    directory = episodes.write(tmp_path / "d", "rlds", episodes.several())
    before = files.fingerprint(directory)
    (directory / ".hidden").write_text("x")
    path = directory / "demo-train.array_record-00001-of-00002"
    data = path.read_bytes()
    path.write_bytes(data)  # The same, with another time.
    assert files.fingerprint(directory) == before
    path.write_bytes(data[:-1] + b"!")
    assert files.fingerprint(directory) != before
    path.write_bytes(data)
    assert files.fingerprint(directory) == before
    path.rename(directory / "other")
    assert files.fingerprint(directory) != before


@pytest.mark.parametrize("stored", [b"{", b"[]", b'{"a": [1]}'])
def test_a_damaged_index_of_files_is_written_anew(tmp_path, monkeypatch, stored):
    monkeypatch.setattr(files, "cache_directory", lambda: tmp_path / "cache")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("y")
    before = files.fingerprint(tmp_path / "d")
    (path,) = (tmp_path / "cache" / "files").iterdir()
    path.write_bytes(stored)
    assert files.fingerprint(tmp_path / "d") == before
    assert list(json.loads(path.read_bytes())) == ["x"]


def test_weights_of_episodes_leave_out_and_repeat_their_steps(data):
    # The episodes have 3, 1, 5 and 2 actions, and a final observation each: rows 0 to 2, 4, 6 to 10
    # and 12 to 13.
    plain = make(data)
    equal = make(data, weights=np.ones(4))
    for update in range(6):
        np.testing.assert_array_equal(plain.batch(update).rows, equal.batch(update).rows)
    weighted = make(data, weights=np.array([1.0, 3.0, 0.0, 1.0]))
    assert len(weighted) == 6
    np.testing.assert_array_equal(weighted.sampled, [0, 1, 2, 4, 12, 13])
    # An epoch has 6 steps, and 6 * w / 8 of each: 0.75 of those of weight 1, and 2.25 of row 4.
    # Eight epochs are 12 batches of 4.
    rows = np.concatenate([weighted.rows(update, np.arange(4)) for update in range(12)])
    assert set(rows) == {0, 1, 2, 4, 12, 13}
    for epoch in rows.reshape(8, 6):
        assert 2 <= (epoch == 4).sum() <= 3
    # A batch depends on the number of its update alone.
    again = make(data, weights=np.array([1.0, 3.0, 0.0, 1.0]))
    np.testing.assert_array_equal(again.rows(7, np.arange(4)), rows[28:32])
