"""Episodes with random numbers, and the data sets of the tests that have them."""

import numpy as np

from mmrl_jax.data import formats, records
from mmrl_jax.data.mapping import FeatureMapping, Target

TEXTS = ("touch the red ball", "größe 红\u2028 👋")


def episode(actions=3, *, number=0, terminal=False, text=TEXTS[0], size=(6, 8)):
    """Returns an episode of `actions` steps with a final observation."""
    rng, steps = np.random.default_rng(number), actions + 1
    index = np.arange(steps)
    last = index == actions
    return records.Episode(
        observation={
            "pixels": rng.integers(0, 256, (steps, *size, 3), np.uint8),
            "proprio": rng.normal(size=(steps, 3)).astype(np.float32),
        },
        action=np.where(last[:, None], 0, rng.uniform(-1, 1, (steps, 2))).astype(np.float32),
        reward=np.where(last, 0, rng.normal(size=steps)).astype(np.float32),
        discount=np.where(terminal & (index >= actions - 1), 0, 1).astype(np.float32),
        is_first=index == 0,
        is_last=last,
        is_terminal=last & terminal,
        language_instruction=[text] * steps,
        privileged={"place": rng.normal(size=(steps, 2)).astype(np.float32)},
        final_observation=True,
        provenance=records.Provenance(
            policy="expert", seed=7, split="train", number=number, episode_return=1.5, success=1.0
        ),
    )


def several():
    """Returns four episodes of different lengths, two of which end by termination."""
    return [
        episode(3, number=0),
        episode(1, number=1, terminal=True, text=TEXTS[1]),
        episode(5, number=2),
        episode(2, number=3, terminal=True),
    ]


def write(directory, kind, episodes, *, per_shard=2, split="train"):
    """Writes episodes in a format, and returns the directory."""
    parts = [episodes[i : i + per_shard] for i in range(0, len(episodes), per_shard)]
    writer = formats.make_writer(
        kind,
        directory,
        name="demo",
        split=split,
        schema=records.schema_of(episodes[0]),
        shards=len(parts),
        fps=20.0,
    )
    shards = []
    for number, part in enumerate(parts):
        shards.append(writer.write_shard(number, part, shards))
    writer.finish(shards)
    return directory


def target(**changes):
    """Returns what a policy observes that fits `episode`."""
    fields = {
        "pixels": (6, 8),
        "proprio": 3,
        "action_size": 2,
        "discrete": False,
        "encode": lambda text: np.full(2, len(text), np.int32),
        "vocabulary": "any",
        "privileged": {"place": (2,)},
    }
    return Target(**fields | changes)


def mapping(source, features=None, **changes):
    """Returns the mapping of a source to `target`."""
    return FeatureMapping(
        source, features or {}, target(**changes), resize="stretch", key="bc.data.features"
    )


def assert_equal(one, two):
    """Compares two episodes value by value, except for what follows the last action."""
    count = one.actions
    assert two.actions == count
    for name, x in one.fields().items():
        y = two.fields()[name]
        assert x.dtype == y.dtype, name
        if not name.startswith("is_"):
            np.testing.assert_array_equal(x[:count], y[:count], err_msg=name)
    assert list(one.language_instruction)[:count] == list(two.language_instruction)[:count]
    assert one.is_terminal.any() == two.is_terminal.any()
    assert one.provenance == two.provenance
