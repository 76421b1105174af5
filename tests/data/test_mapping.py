"""Tests of records, of their checks, and of the mapping from the fields of a data set."""

import numpy as np
import pytest

from mmrl_jax.data import records
from mmrl_jax.data.images import encode_png
from mmrl_jax.data.records import Feature, Invalid, InvalidData, RawEpisode
from tests import episodes

NAN = float("nan")
FEATURES = {
    "observation/image": Feature((6, 8, 3), "image"),
    "observation/state": Feature((7,), "float64"),
    "observation/gripper": Feature((), "float32"),
    "action": Feature((2,), "float32"),
    "language_instruction": Feature((), "str"),
    "reward": Feature((), "float32"),
    "is_terminal": Feature((), "bool"),
}
GIVEN = {"pixels": "observation/image", "proprio": "observation/state[0:3]"}


class Source:
    """A data set in memory."""

    def __init__(self, features=FEATURES, **changed):
        self.features = dict(features)
        self.defaults = {
            "instruction": "language_instruction",
            "pixels": "observation/pixels",
            "proprio": "observation/proprio",
        }
        self.changed = changed

    def raw(self, steps=4, final=True):
        rng = np.random.default_rng(0)
        fields = {
            "observation/image": [
                encode_png(rng.integers(0, 256, (6, 8, 3), np.uint8)) for _ in range(steps)
            ],
            "observation/state": rng.normal(size=(steps, 7)),
            "observation/gripper": rng.normal(size=steps),
            "action": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
            "language_instruction": ["grüße"] * steps,
            "reward": np.arange(steps, dtype=np.float32),
            "is_terminal": np.zeros(steps, bool),
        }
        return RawEpisode(fields | self.changed, final, records.Provenance())


def make(features=GIVEN, source=None, **changes):
    source = source or Source()
    return episodes.mapping(source, features, **{"privileged": {}} | changes), source.raw()


def test_names_are_sliced_and_concatenated():
    features = GIVEN | {"proprio": ("observation/state[-2:]", "observation/gripper")}
    mapping, raw = make(features)
    found = mapping(raw)
    state, gripper = raw.fields["observation/state"], raw.fields["observation/gripper"]
    expected = np.concatenate([state[:, -2:], gripper[:, None]], 1).astype(np.float32)
    np.testing.assert_array_equal(found.observation["proprio"], expected)
    assert found.actions == 3 and list(found.language_instruction) == ["grüße"] * 4
    assert mapping.wanted == {
        "observation/image",
        "observation/state",
        "observation/gripper",
        "action",
        "language_instruction",
        "reward",
        "is_terminal",
    }


@pytest.mark.parametrize(
    "features, match",
    [
        ({}, "'proprio' is read from 'observation/proprio', which the data set does not have"),
        ({"proprio": "state"} | {"pixels": "observation/image"}, "nearest.*'observation/state'"),
        (GIVEN | {"pixel": "x"}, "'pixel', which the policy does not use.*'pixels'"),
        (GIVEN | {"proprio": "observation/state"}, r"with 7 numbers, but the environment has 3.*"),
        (GIVEN | {"proprio": "observation/state"}, r"'observation/state\[0:3\]'"),
        (GIVEN | {"pixels": "observation/state"}, "float64.*needs one field of type image"),
        (GIVEN | {"instruction": "observation/image"}, "needs one field of type str"),
        (GIVEN | {"action": "language_instruction"}, "needs numbers"),
        (GIVEN | {"reward": "rewards"}, "'reward' is read from 'rewards'"),
    ],
)
def test_a_mapping_that_does_not_fit_names_the_field(features, match):
    with pytest.raises(InvalidData, match=match):
        make(features)


def test_rewards_and_terminations_may_be_absent():
    features = {k: v for k, v in FEATURES.items() if k not in ("reward", "is_terminal")}
    mapping, raw = make(source=Source(features))
    found = mapping(raw)
    assert not mapping.has_reward and not found.reward.any() and not found.is_terminal.any()
    assert found.discount.tolist() == [1, 1, 1, 1]
    assert make()[0].has_reward


def test_the_discount_is_0_at_the_last_action_of_a_terminated_episode():
    terminal = np.arange(4) == 3
    mapping, raw = make(source=Source(is_terminal=terminal))
    assert mapping(raw).discount.tolist() == [1, 1, 0, 0]
    without_final = raw._replace(final_observation=False)
    assert mapping(without_final).discount.tolist() == [1, 1, 1, 0]


def test_images_are_resized_unless_they_have_the_size():
    mapping, raw = make(pixels=(3, 4))
    assert mapping(raw).observation["pixels"].shape == (4, 3, 4, 3)
    pixels = np.zeros((4, 6, 8, 3), np.uint8)
    features = FEATURES | {"observation/image": Feature((6, 8, 3), "uint8")}
    source = Source(features, **{"observation/image": pixels})
    np.testing.assert_array_equal(make(source=source)[0](source.raw()).observation["pixels"], 0)


def test_images_of_any_size_may_not_be_mixed_within_an_episode():
    features = FEATURES | {"observation/image": Feature((None, None, 3), "image")}
    for sizes, valid in (([(6, 8)] * 4, True), ([(6, 8)] * 3 + [(6, 9)], False)):
        images = [encode_png(np.zeros((*size, 3), np.uint8)) for size in sizes]
        mapping, raw = make(source=Source(features, **{"observation/image": images}))
        if valid:
            assert mapping(raw).observation["pixels"].shape == (4, 6, 8, 3)
        else:
            with pytest.raises(Invalid, match=r"mixed image sizes.*\[\(6, 8\), \(6, 9\)\]"):
                mapping(raw)


def nonfinite(x, *place, value=NAN):
    x = np.array(x)
    x[place] = value
    return x


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"action": nonfinite(np.zeros((4, 2), np.float32), 1, 0)}, "non-finite action"),
        ({"action": nonfinite(np.zeros((4, 2)), 1, 0, value=np.inf)}, "non-finite action"),
        ({"reward": nonfinite(np.zeros(4), 2)}, "non-finite reward"),
        ({"observation/state": nonfinite(np.zeros((4, 7)), 3, 1)}, "non-finite observation"),
        ({"observation/state": np.zeros((3, 7))}, "wrong schema"),
        ({"observation/state": np.full((4, 7), "x")}, "wrong schema"),
        ({"action": np.zeros((4, 3))}, "wrong schema"),
        ({"observation/image": [b"no image"] * 4}, "damaged image"),
        ({"observation/image": [encode_png(np.zeros((6, 9, 3), np.uint8))] * 4}, "mixed image"),
        ({"is_first": np.zeros(4, bool)}, "wrong flags"),
        ({"is_terminal": np.array([0, 1, 0, 0], bool)}, "wrong flags"),
        ({"is_last": np.ones(4, bool)}, "wrong flags"),
    ],
)
def test_an_episode_that_cannot_be_used_has_a_reason(changed, reason):
    mapping, raw = make(source=Source(**changed))
    with pytest.raises(Invalid, match=reason) as caught:
        mapping(raw)
    assert caught.value.reason.startswith(reason)


def test_what_follows_the_last_action_may_be_anything():
    action, reward = nonfinite(np.zeros((4, 2)), 3, 0), nonfinite(np.zeros(4), 3)
    mapping, raw = make(source=Source(action=action, reward=reward))
    assert mapping(raw).actions == 3
    with pytest.raises(Invalid, match="non-finite action"):
        mapping(raw._replace(final_observation=False))


def test_missing_fields_and_empty_episodes():
    mapping, raw = make()
    del raw.fields["action"]
    with pytest.raises(Invalid, match="missing field: 'action'"):
        mapping(raw)
    for steps, final in ((0, True), (1, True), (0, False)):
        mapping, _ = make()
        raw = Source().raw(steps, final)
        with pytest.raises(Invalid, match="empty episode"):
            mapping(raw)


def test_an_instruction_that_the_policy_cannot_read():
    def encode(text):
        raise ValueError(f"{text!r} has unknown words")

    mapping, raw = make(encode=encode)
    with pytest.raises(Invalid, match="unknown instruction: 'grüße' has unknown words"):
        mapping(raw)
    assert make(encode=None)[0](raw).language_instruction == [""] * 4


def test_discrete_actions():
    features = FEATURES | {"action": Feature((1,), "int64")}
    for values, valid in (([0, 4, 1, 9], True), ([0, 5, 1, 0], False), ([0, -1, 1, 0], False)):
        source = Source(features, action=np.array(values)[:, None])
        mapping, raw = make(source=source, discrete=True, action_size=5)
        if valid:  # The last one is that of the final observation.
            found = mapping(raw).action
            assert found.tolist() == [0, 4, 1, 0] and found.dtype == np.int32
        else:
            with pytest.raises(Invalid, match=r"is not an integer in \[0, 5\)"):
                mapping(raw)


def test_a_recorded_episode_is_checked_against_the_schema_of_the_others():
    one = episodes.episode()
    schema = records.schema_of(one)
    records.check(one, schema)
    other = episodes.episode(size=(4, 8))
    with pytest.raises(Invalid, match="mixed image sizes: 'observation/pixels'"):
        records.check(other, schema)
    with pytest.raises(Invalid, match="missing field: 'privileged/place'"):
        records.check(one._replace(privileged={}), schema)
    with pytest.raises(Invalid, match="wrong schema: 'privileged/more'"):
        more = one.privileged | {"more": one.privileged["place"]}
        records.check(one._replace(privileged=more), schema)
    with pytest.raises(Invalid, match="wrong schema: 'action' is float64"):
        records.check(one._replace(action=one.action.astype(float)), schema)
    with pytest.raises(Invalid, match="invalid text"):
        records.check(one._replace(language_instruction=[b"x"] * 4), schema)


def test_the_quarantine_counts_and_keeps_the_first():
    quarantine = records.Quarantine()
    assert quarantine.summary() == ""
    for i in range(30):
        quarantine.add(f"episode {i}", Invalid("missing video", "x.mp4"))
    quarantine = quarantine + records.Quarantine({"damaged shard": 1}, [("y", "damaged")])
    assert quarantine.total == 31 and len(quarantine.examples) == records.MAX_EXAMPLES
    assert "(30 missing video, 1 damaged shard)" in quarantine.summary()
    assert records.Quarantine(**quarantine.to_json()).counts == quarantine.counts
