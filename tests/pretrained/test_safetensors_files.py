"""Tests which files of a directory are read, as in transformers, and unreadable files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.pretrained import safetensors_files as files
from mmrl_jax.pretrained import weights

CONFIG = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def write(directory, seed, **options):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model.save_pretrained(directory, **options)


def whole(directory):
    write(directory / "whole", 0)
    shutil.copy(directory / "whole" / files.WEIGHTS, directory)


def shards(directory):
    write(directory, 1, max_shard_size="1KB")


def shards_of_another_size(directory):
    write(directory, 2, max_shard_size="2KB")


def copy_under_another_name(directory):
    write(directory / "copy", 3)
    shutil.copy(directory / "copy" / files.WEIGHTS, directory / "model_ema.safetensors")


def variant(directory):
    write(directory, 4, variant="zz")


def pickle(directory):
    torch.save({"model.norm.weight": torch.zeros(8)}, directory / "pytorch_model.bin")


PAIRS = [
    (whole, shards),
    (shards, whole),
    (whole, copy_under_another_name),
    (whole, variant),
    (whole, pickle),
    (shards, shards_of_another_size),
    (shards, copy_under_another_name),
    (shards, variant),
    (shards, pickle),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " and ".join(x.__name__ for x in pair))
def test_the_files_that_are_read_are_those_that_transformers_reads(pair, tmp_path):
    for lay in pair:
        lay(tmp_path)
    transformers.LlamaConfig(**CONFIG).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    ours = files.tensor_files(tmp_path)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        assert np.array_equal(load_file(path)[name], theirs[name]), name


def small(directory, **tensors):
    save_file(tensors or {"a": np.ones((2, 3), np.float32)}, directory / files.WEIGHTS)
    return directory


def index(directory, weight_map):
    (directory / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(directory, *words):
    with pytest.raises(ValueError) as error:
        files.tensor_files(directory)
    assert all(word in str(error.value) for word in (str(directory), *words)), error.value


def test_copies_without_the_model_s_name_are_named(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "b.safetensors")
    refused(tmp_path, "b.safetensors", "model.safetensors.index.json", "name the file")
    save_file({"a": np.ones(2)}, tmp_path / "c.safetensors")
    refused(tmp_path, "b.safetensors, c.safetensors")


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    small(tmp_path)
    save_file({"a": np.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert files.tensor_files(tmp_path) == {"a": tmp_path / files.WEIGHTS}
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter_model.safetensors", "separate directory")


def test_an_index_names_files_of_its_directory_only(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model").mkdir()
    for outside in ("../x.safetensors", str(tmp_path / "x.safetensors"), "sub/x.safetensors"):
        index(tmp_path / "model", {"a": outside})
        refused(tmp_path / "model", outside, "of its own directory")
    # The hub's cache is made of links, whose names are plain.
    (tmp_path / "model" / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    index(tmp_path / "model", {"a": "x.safetensors"})
    assert list(files.tensor_files(tmp_path / "model")) == ["a"]


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    for name in ("x", "y"):
        save_file({"a": np.ones(2)}, tmp_path / f"{name}.safetensors")
    index(tmp_path, {"a": "x.safetensors", "b": "z.safetensors"})
    refused(tmp_path, "z.safetensors", "1 of 2", "Download")
    index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    refused(tmp_path, "['b']", "none of its files")
    index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    refused(tmp_path, "['a']", "x.safetensors", "y.safetensors")
    for damaged in ('{"weight_map": {"a": ', "[]", "{}", '{"weight_map": ["a"]}', "\xff"):
        (tmp_path / files.INDEX).write_bytes(damaged.encode("latin-1"))
        refused(tmp_path, files.INDEX, "download it again")


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-3], lambda x: x[:9], lambda x: b"", lambda x: b"version https://git-l"]
)
def test_a_damaged_file_is_named(damage, tmp_path):
    path = small(tmp_path) / files.WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, files.WEIGHTS, "download it again")


def load(directory, dtype=jnp.float32, shardings=None):
    like = {"a": jax.ShapeDtypeStruct((4, 3), dtype)}
    return weights.load(directory, like, {"x": "a"}, shardings=shardings)


def test_dtypes_of_quantized_checkpoints_are_refused(tmp_path):
    from safetensors import torch as st

    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")):
        st.save_file({"x": torch.ones(4, 3).to(dtype)}, tmp_path / files.WEIGHTS)
        with pytest.raises(ValueError, match=rf"model.safetensors: x has dtype {name}"):
            load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sharded", [False, True])
def test_values_that_are_not_finite_are_refused_by_name(value, sharded, tmp_path):
    x = np.ones((4, 3), np.float32)
    shardings = None
    if sharded:
        mesh = mesh_lib.make_mesh(2)
        shardings = {"a": mesh_lib.batch_sharding(mesh, 0)}
    assert np.array_equal(load(small(tmp_path, x=x), shardings=shardings)["a"], x)
    x[3, 1] = value
    with pytest.raises(ValueError, match=r"model.safetensors: x: 1 of \d+ values are NaN"):
        load(small(tmp_path, x=x), shardings=shardings)


def test_values_beyond_the_dtype_asked_for_are_refused(tmp_path):
    x = np.full((4, 3), 1e5, np.float32)
    load(small(tmp_path, x=x), jnp.bfloat16)
    with pytest.raises(ValueError, match="x: 12 values are beyond the range of float16"):
        load(tmp_path, jnp.float16)


def test_the_fingerprint_is_of_what_is_read_and_not_of_the_files(tmp_path):
    write(tmp_path / "one", 0)
    write(tmp_path / "many", 0, max_shard_size="1KB")
    write(tmp_path / "other", 1)
    one = weights.fingerprint(tmp_path / "one")
    assert weights.fingerprint(tmp_path / "many") == one
    assert weights.fingerprint(tmp_path / "other") != one
    copy_under_another_name(tmp_path / "one")
    assert weights.fingerprint(tmp_path / "one") == one
    tensors = load_file(tmp_path / "one" / files.WEIGHTS)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, tmp_path / "one" / files.WEIGHTS)
    changed = weights.fingerprint(tmp_path / "one")
    assert changed != one
    renamed = {name.replace("q_proj", "k_proj_"): x for name, x in tensors.items()}
    save_file(renamed, tmp_path / "one" / files.WEIGHTS)
    assert weights.fingerprint(tmp_path / "one") not in (one, changed)
