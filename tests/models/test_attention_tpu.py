"""Attention as the TPU's own compiler sees it, for chips of which none is here."""

import os

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from mmrl_jax.distributed import mesh as meshes
from mmrl_jax.models.attention import attend, attention_by
from mmrl_jax.models.masks import Mask, causal_mask

pytestmark = pytest.mark.slow
BATCH, LENGTH = 8, 600  # No multiple of a tile.


@pytest.fixture(scope="module")
def chips():
    install = f"needs the TPU's compiler: pip install 'jax[tpu]=={jax.__version__}'"
    pytest.importorskip("libtpu", reason=install)
    # Of a chip, one process at a time may use the library; a compiler may run beside others.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc("v5e:2x4", platform="tpu").devices


def compiled(chips, shape, make_mask, *, heads, key_heads, size, softcap=None, length=LENGTH):
    """The gradient of attention on a mesh of chips."""
    with meshes.described_devices(chips):
        axes = dict(zip(meshes.AXES, shape, strict=True))
        mesh = meshes.make_mesh(shape[0] * shape[1] * shape[2], axes)
    split = PartitionSpec(meshes.batch_axes(mesh), None, meshes.TENSOR)

    def shapes(count):
        sharding = jax.NamedSharding(mesh, split)
        shape = (BATCH, length, count, size)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    ids = jax.ShapeDtypeStruct((BATCH, length), jnp.int32, sharding=meshes.batch_sharding(mesh, 0))

    def loss(query, key, value, ids):
        with meshes.on_mesh(mesh):
            out = attend(query, key, value, make_mask(ids), softcap=softcap)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    arrays = shapes(heads), shapes(key_heads), shapes(key_heads), ids
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')


CASES = {
    "decoder": (lambda ids: causal_mask(ids > 0), 14, 2, 64, None),
    "decoder of wide heads": (lambda ids: causal_mask(ids > 0, contiguous=True), 8, 1, 256, 50.0),
    "window": (
        lambda ids: causal_mask(ids > 0, contiguous=True).within(128, ids, ids), 4, 1, 256, None
    ),
    "prompt": (lambda ids: causal_mask(ids > 0).replace(prefix=ids < 300), 8, 1, 256, None),
    "readouts": (lambda ids: causal_mask(ids > 0).replace(readouts=2), 9, 3, 64, None),
    "vision tower": (lambda ids: Mask(), 16, 16, 72, None),
    "images": (lambda ids: Mask(segments=ids), 16, 16, 80, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_compiles_for_models_of_the_hub(case, chips):
    mask, heads, key_heads, size, softcap = CASES[case]
    program = compiled(
        chips, (1, 1, 1), mask, heads=heads, key_heads=key_heads, size=size, softcap=softcap
    )
    # The output, the gradient of the queries, and that of keys and values; of a prompt twice.
    assert kernels(program) == (6 if case == "prompt" else 3)


def test_the_kernel_needs_a_tenth_of_the_memory(chips):
    def temporary_bytes(name):
        with attention_by(name):
            program = compiled(
                chips,
                (1, 1, 1),
                lambda ids: causal_mask(ids > 0),
                heads=16,
                key_heads=4,
                size=128,
                length=1024,
            )
        assert kernels(program) == (3 if name == "auto" else 0)
        return program.memory_analysis().temp_size_in_bytes

    ours, theirs = (temporary_bytes(name) for name in ("xla", "auto"))
    print(f"XLA needs {ours / 1e6:.0f} MB, the kernel {theirs / 1e6:.0f} MB.")
    assert theirs < ours / 10


def test_on_a_mesh_chips_exchange_nothing(chips):
    program = compiled(
        chips, (2, 2, 2), lambda ids: causal_mask(ids > 0), heads=8, key_heads=2, size=64
    )
    assert kernels(program) == 3
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert f" {name}(" not in program.as_text()
        assert f" {name}-start(" not in program.as_text()
