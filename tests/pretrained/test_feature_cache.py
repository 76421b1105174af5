"""Tests of the cache of vision features: reading, computing and rejecting entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained.feature_cache import FeatureCache, tower_hash
from tests import hub

PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "size": 8}


def images(count=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


class Encoder:
    """Computes the mean and a bfloat16 row of each image, and records its inputs."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        x = jnp.asarray(batch, jnp.float32)
        return {"pooled": x.mean((1, 2)), "tokens": x[:, 0].astype(jnp.bfloat16)}


def open_cache(path, tower="t", preprocessing=PREPROCESSING):
    return FeatureCache(path, tower=tower, preprocessing=preprocessing)


def counts(cache):
    return cache.hits, cache.misses, cache.unreadable


def same(features, batch):
    for name, x in Encoder()(batch).items():
        assert features[name].dtype == x.dtype
        np.testing.assert_array_equal(features[name], x)


def test_an_image_is_encoded_once_also_by_another_process(tmp_path):
    encode, cache = Encoder(), open_cache(tmp_path)
    same(cache.get_or_compute(images(), encode), images())
    assert counts(cache) == (0, 4, 0)
    cache = open_cache(tmp_path)
    same(cache.get_or_compute(images()[::-1], encode), images()[::-1])
    assert counts(cache) == (4, 0, 0) and len(encode.batches) == 1


def test_only_missing_images_are_encoded_in_batches_of_one_size(tmp_path):
    encode, cache = Encoder(), open_cache(tmp_path)
    cache.get_or_compute(images()[:2], encode)
    same(cache.get_or_compute(images(), encode), images())
    assert counts(cache) == (2, 4, 0)
    np.testing.assert_array_equal(encode.batches[1], images()[[2, 3, 2, 3]])


@pytest.mark.parametrize(
    "change", [{"tower": "u"}, {"preprocessing": PREPROCESSING | {"size": 9}}], ids=str
)
def test_another_tower_or_preprocessing_finds_nothing(tmp_path, change):
    open_cache(tmp_path).get_or_compute(images(), Encoder())
    cache = open_cache(tmp_path, **change)
    cache.get_or_compute(images(), Encoder())
    assert counts(cache) == (0, 4, 0)


def test_the_same_bytes_in_another_shape_are_another_image(tmp_path):
    cache = open_cache(tmp_path)
    cache.get_or_compute(images(), Encoder())
    wide = images().reshape(4, 4, 16, 3)
    same(cache.get_or_compute(wide, Encoder()), wide)
    assert counts(cache) == (0, 8, 0)


@pytest.mark.parametrize(
    "damage",
    [lambda x: x[:-3], lambda x: b"", lambda x: x[:-1] + bytes([x[-1] ^ 1])],
    ids=["cut", "empty", "one bit"],
)
def test_a_damaged_entry_is_computed_anew_and_counted(tmp_path, damage):
    open_cache(tmp_path).get_or_compute(images(), Encoder())
    entry = next(path for path in sorted(tmp_path.rglob("*")) if path.is_file())
    entry.write_bytes(damage(entry.read_bytes()))
    cache = open_cache(tmp_path)
    same(cache.get_or_compute(images(), Encoder()), images())
    assert counts(cache) == (3, 1, 1)
    same(cache.get_or_compute(images(), Encoder()), images())
    assert counts(cache) == (7, 1, 1)


def test_an_augmentation_is_refused_unless_it_is_part_of_the_key(tmp_path):
    with pytest.raises(ValueError, match="augmentation='shift'"):
        open_cache(tmp_path).get_or_compute(images(), Encoder(), augmentation="shift")
    cache = open_cache(tmp_path, preprocessing=PREPROCESSING | {"augmentation": "mirror"})
    cache.get_or_compute(images(), Encoder(), augmentation="mirror")
    for other in (None, "shift"):
        with pytest.raises(ValueError, match="mirror"):
            cache.get_or_compute(images(), Encoder(), augmentation=other)
    assert counts(cache) == (0, 4, 0)


@pytest.mark.parametrize("bad", [images().astype(np.float32), images()[0], images()[:0]])
def test_other_than_a_batch_of_uint8_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="uint8"):
        open_cache(tmp_path).get_or_compute(bad, Encoder())


def test_the_hash_of_a_tower_changes_with_any_weight_and_with_its_config(tmp_path):
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    hub.save(transformers.CLIPVisionModel(config), tmp_path)
    first, again = (ours.load_vision_tower(tmp_path) for _ in range(2))
    hashes = {tower_hash(first.params, first.config), tower_hash(again.params, again.config)}
    assert len(hashes) == 1
    leaves, structure = jax.tree.flatten(first.params)
    changed = jax.tree.unflatten(structure, [*leaves[:-1], leaves[-1] * 1.0001])
    hashes.add(tower_hash(changed, first.config))
    hashes.add(tower_hash(first.params, first.config | {"patch_size": 2}))
    assert len(hashes) == 3
