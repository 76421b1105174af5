"""Tests of mmrl_jax.distributed.partition, and of loading onto a mesh of eight devices."""

import collections
import functools
import socket

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.distributed import partition
from mmrl_jax.pretrained import blueprints, orbax_format, safetensors_files, weights
from mmrl_jax.pretrained import hub as ours
from tests import hub, memory

TINY = {
    "vocab_size": 104,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def mesh_of(**axes):
    return meshes.make_mesh(8, axes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    hub.save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), path)
    return path


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    path = tmp_path_factory.mktemp("siglip")
    hub.save(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)), path)
    return path


def specs(tree, mesh, rules=partition.RULES):
    found = partition.shardings(tree, mesh, rules)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): s.spec
        for path, s in jax.tree_util.tree_leaves_with_path(found)
    }


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_the_rules_by_hand():
    block = {
        "attention": {
            "query": {"kernel": shape(16, 32), "bias": shape(32)},
            "out": {"kernel": shape(32, 16)},
        },
        "mlp_in": {"kernel": shape(16, 64)},
        "mlp_out": {"kernel": shape(64, 16)},
        "norm": {"scale": shape(16)},
    }
    adapters = {
        "query": {"adapter": {"a": shape(16, 4), "b": shape(4, 32)}},
        "out": {"adapter": {"a": shape(32, 4), "b": shape(4, 16)}},
    }
    tree = {
        "language": {"table": shape(80, 16), "head": shape(16, 80), "stack": {"block_0": block}},
        "lora": {"attention": adapters},
        "vision": {"patch_embedding": {"kernel": shape(48, 16)}, "positions": shape(9, 16)},
    }
    # 'fsdp' of 2 and 'tensor' of 4: a matrix is divided by one on each side.
    found = specs(tree, mesh_of(fsdp=2, tensor=4))
    stack = "language/stack/block_0"
    columns, rows = P(("fsdp",), ("tensor",)), P(("tensor",), ("fsdp",))
    assert found == {
        "language/table": rows,
        "language/head": columns,
        "lora/attention/query/adapter/a": P(("fsdp",), None),
        "lora/attention/query/adapter/b": P(None, ("tensor",)),
        "lora/attention/out/adapter/a": P(("tensor",), None),
        "lora/attention/out/adapter/b": P(None, ("fsdp",)),
        f"{stack}/attention/query/kernel": columns,
        f"{stack}/attention/query/bias": P(),
        f"{stack}/attention/out/kernel": rows,
        f"{stack}/mlp_in/kernel": columns,
        f"{stack}/mlp_out/kernel": rows,
        f"{stack}/norm/scale": P(),
        "vision/patch_embedding/kernel": P(None, ("tensor", "fsdp")),
        "vision/positions": P(),
    }
    # Axes that the mesh lacks are left out: only the inputs of a layer are split, or nothing.
    found = specs(tree, mesh_of(data=2, fsdp=4))
    assert found["language/table"] == P(None, ("fsdp",))
    assert found[f"{stack}/mlp_in/kernel"] == P(("fsdp",), None)
    assert found[f"{stack}/mlp_out/kernel"] == P(None, ("fsdp",))
    for sharding in jax.tree.leaves(partition.shardings(tree, mesh_of(data=8))):
        assert sharding.is_fully_replicated


def test_what_an_axis_does_not_divide_stays_whole():
    mesh = mesh_of(fsdp=2, tensor=4)
    # 'tensor' of 4 divides 12 rows and not 6; 'fsdp' of 2 divides 6 columns and not 3.
    for rows, entry in ((12, ("tensor",)), (6, None)):
        assert specs({"table": shape(rows, 3)}, mesh) == {"table": P(entry, None)}
        assert specs({"table": shape(rows, 6)}, mesh) == {"table": P(entry, ("fsdp",))}


def test_an_optimizer_s_state_lies_as_its_parameters():
    params = {"params": {"mlp_in": {"kernel": jnp.zeros((16, 64))}}}
    state = optax.adam(1e-3).init(params)
    found = specs(state, mesh_of(fsdp=2, tensor=4))
    assert sorted(map(str, found.values())) == sorted(
        map(str, [P(), *2 * [P(("fsdp",), ("tensor",))]])
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("table", P("fdsp"))], "splits over 'fdsp'.*nearest name is 'fsdp'"),
        ([("head", P())], "No rule matches 'table'"),
        ([("table", P(None, None, "fsdp"))], r"'table', .* more dimensions than \(8, 3\)"),
    ],
)
def test_rules_that_cannot_hold_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        partition.shardings({"table": shape(8, 3)}, mesh_of(fsdp=8), rules)


def test_a_mesh_of_several_axes():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.devices.ravel().tolist() == jax.devices()[:8]
    for axes, message in (
        ({"fdsp": 8}, r"\['fdsp'\]; valid names are"),
        ({"fsdp": 3}, "must be the number of devices, 8"),
        ({"data": -2, "fsdp": -4}, "must be positive"),
        ({}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            meshes.make_mesh(8, axes)


class Counted:
    """A slice of safetensors that records the parts that are read of each tensor."""

    read: dict[str, list[int]] = collections.defaultdict(list)

    def __init__(self, tensor, name):
        self._tensor, self._name = tensor, name

    def get_shape(self):
        return self._tensor.get_shape()

    def get_dtype(self):
        return self._tensor.get_dtype()

    def __getitem__(self, index):
        x = self._tensor[index]
        self.read[self._name].append(x.nbytes)
        return x


@pytest.fixture
def counted(monkeypatch):
    """Returns the bytes of each read by the name of the tensor."""
    Counted.read.clear()
    open_file = safetensors_files.open_file

    class File:
        def __init__(self, *args, **kwargs):
            self._file = open_file(*args, **kwargs)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *args):
            return self._file.__exit__(*args)

        def keys(self):
            return self._file.keys()

        def get_slice(self, name):
            return Counted(self._file.get_slice(name), name)

    monkeypatch.setattr(safetensors_files, "open_file", File)
    return Counted.read


LOADERS = {"llama": ours.load_language_model, "siglip": ours.load_vision_tower}
MESHES = [{"fsdp": 8}, {"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", LOADERS)
def test_a_mesh_holds_what_one_device_would_and_each_part_is_read_once(
    name, axes, request, counted
):
    path, load, mesh = request.getfixturevalue(name), LOADERS[name], mesh_of(**axes)
    model, whole, _ = load(path)
    counted.clear()
    placed, whole = load(path, mesh=mesh).params["params"], whole["params"]
    plan = ours.read_blueprint(blueprints.kind_of(model), path, dtype=jnp.float32, remat=False)
    expected, split = collections.defaultdict(list), 0
    for (keys, a), b, s in zip(
        jax.tree_util.tree_leaves_with_path(whole),
        jax.tree.leaves(placed),
        jax.tree.leaves(partition.shardings(whole, mesh)),
        strict=True,
    ):
        assert b.sharding == s and len(b.addressable_shards) == 8
        assert np.array_equal(a, b)
        indices = {}
        for shard in b.addressable_shards:
            assert shard.data.shape == s.shard_shape(a.shape)
            np.testing.assert_array_equal(shard.data, np.asarray(a)[shard.index])
            indices[str(shard.index)] = shard.data.nbytes
        ours_ = jax.tree_util.keystr(keys, simple=True, separator="/")
        (source,) = weights.counterparts([ours_], plan.keys).values()
        # A part is read once, however many devices hold it, and nothing beside it.
        expected[source.name] += indices.values()
        split += len(indices) > 1
    assert split > 5
    assert {k: sorted(x) for k, x in counted.items()} == {k: sorted(x) for k, x in expected.items()}


def test_rows_of_a_convolution_may_be_split_by_a_rule(siglip):
    rules = [(r"patch_embedding/kernel", P("fsdp", "tensor")), *partition.RULES]
    mesh = mesh_of(fsdp=2, tensor=4)
    placed = ours.load_vision_tower(siglip, mesh=mesh, rules=rules).params["params"]
    whole = ours.load_vision_tower(siglip).params["params"]
    kernel = placed["patch_embedding"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (96, 8)  # Of 8 * 8 * 3 by 32.
    np.testing.assert_array_equal(kernel, whole["patch_embedding"]["kernel"])


def test_frames_and_fused_matrices_are_split(tmp_path):
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6
    )
    hub.save(transformers.Qwen2_5_VLForConditionalGeneration(config), tmp_path)
    whole = ours.load_vision_language_model(tmp_path).params
    placed = ours.load_vision_language_model(tmp_path, mesh=mesh_of(fsdp=2, tensor=4)).params
    jax.tree.map(np.testing.assert_array_equal, whole, placed)
    value = placed["params"]["vision"]["stack"]["block_0"]["attention"]["value"]["kernel"]
    assert value.addressable_shards[0].data.shape == (16, 8)
    # Queries, keys and values are rows 0 to 31, 32 to 63 and 64 to 95.
    fused = load_file(tmp_path / "model.safetensors")["visual.blocks.0.attn.qkv.weight"]
    np.testing.assert_array_equal(value, fused[64:].T)


def test_a_mesh_computes_what_one_device_does(llama):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 104, (4, 6)), jnp.int32)
    logits = []
    for mesh in (None, mesh_of(fsdp=2, tensor=4)):
        model, params, _ = ours.load_language_model(llama, mesh=mesh)
        place = None if mesh is None else meshes.replicated(mesh)
        inputs = jax.device_put((tokens, jnp.ones_like(tokens, bool)), place)
        logits.append(jax.jit(model.apply)(params, *inputs))
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def test_what_lies_on_a_mesh_is_exported_and_kept_in_our_format(llama, tmp_path):
    mesh = mesh_of(fsdp=2, tensor=4)
    placed, whole = ours.load_language_model(llama, mesh=mesh), ours.load_language_model(llama)
    ours.export(placed, tmp_path / "hub", llama)
    orbax_format.save(placed, tmp_path / "ours", llama)
    again = orbax_format.load(tmp_path / "ours", mesh=mesh)
    for other in (
        ours.load_language_model(tmp_path / "hub"),
        orbax_format.load(tmp_path / "ours"),
        again,
    ):
        jax.tree.map(np.testing.assert_array_equal, whole.params, other.params)
    shardings = [x.sharding for x in jax.tree.leaves(again.params)]
    assert shardings == [x.sharding for x in jax.tree.leaves(placed.params)]
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params)
    for where in (mesh, None):
        half = orbax_format.load(tmp_path / "ours", dtype=jnp.bfloat16, mesh=where)
        assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
        jax.tree.map(np.testing.assert_array_equal, cast, half.params)


@pytest.mark.slow
def test_two_processes_read_a_half_each(llama):
    """There are two processes with one device each."""
    child = """
import sys, jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import numpy as np
from mmrl_jax.distributed import mesh
from mmrl_jax.pretrained import hub, weights
read, make = [0], weights._reader
def counting(*args):
    inner = make(*args)
    def reader(index):
        x = inner(index)
        read[0] += x.nbytes
        return x
    return reader
weights._reader = counting
placed = hub.load_language_model(sys.argv[3], mesh=mesh.make_mesh(2, {"fsdp": 2})).params
weights._reader = make
whole = hub.load_language_model(sys.argv[3]).params
total, own = 0, 0
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(placed)):
    (shard,) = b.addressable_shards
    assert np.array_equal(shard.data, np.asarray(a)[shard.index])
    total, own = total + a.nbytes, own + shard.data.nbytes
print(read[0], own, total)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = functools.partial(memory.start, child, port, devices=1)
    children = [start(i, llama) for i in range(2)]
    for read, own, total in map(memory.numbers, children):
        assert read == own and own < 0.52 * total


@pytest.mark.slow
def test_the_host_holds_about_one_tensor_beside_the_parameters(tmp_path):
    """About 400 MB on eight devices; a table of 66 MB is the largest tensor."""
    config = transformers.LlamaConfig(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    child = """
import sys, jax
from mmrl_jax.distributed import mesh
from mmrl_jax.pretrained import hub
from tests.memory import peak
where = mesh.make_mesh(8, {"fsdp": 2, "tensor": 4})
jax.block_until_ready(jax.device_put(0.0, jax.devices()[0]))
hub.read_blueprint("language_model", sys.argv[1], dtype="float32", remat=False).shapes("float32")
with peak() as grown:
    params = hub.load_language_model(sys.argv[1], mesh=where).params
    jax.block_until_ready(params)
held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print(held, max(x.nbytes for x in jax.tree.leaves(params)), grown[0])
"""
    held, largest, grown = memory.in_child(child, tmp_path, devices=8)
    print(f"held {held / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB, peak {grown / 1e6:.0f} MB")
    assert held > 300e6 and 0 <= grown - held < 2 * largest
