"""The updates as the TPU's own compiler sees them, for eight chips of which none is here."""

import math
import os
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.training import loop

pytestmark = pytest.mark.slow
CHIP_BYTES = 16e9  # Of a TPU v5e.
ITEM_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<name>all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast)(-start)?\("
)
# Callbacks, arrays in the host's memory (space 5), and feeds.
HOST = re.compile(r"is_host_transfer=true|S\(5\)| (infeed|outfeed)\(")


@pytest.fixture(scope="module")
def chips():
    install = f"needs the TPU's compiler: pip install 'jax[tpu]=={jax.__version__}'"
    pytest.importorskip("libtpu", reason=install)
    # Of a chip, one process at a time may use the library; a compiler may run beside others.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    return np.array(topology.devices).reshape(-1)


def mesh_of(devices):
    return Mesh(devices, (mesh_lib.DATA,), axis_types=(AxisType.Auto,))


def compiled(config, devices):
    """A dispatch of one update over these devices, and the shapes of its carry."""
    with mesh_lib.described_devices(devices):
        problem, name = problems.make(config), config.stages[-1]
        # Nothing can be put on devices that are not there.
        stage = problem.stage(name, start=getattr(problem, "shapes", lambda: None)())
        shapes = jax.eval_shape(stage.init)
        shardings = stage.shardings(shapes)
        carry = mesh_lib.placed_shapes(shapes, shardings)
        dispatch = loop.make_dispatch(stage.update, 1, shardings)
        return dispatch.lower(carry, stage.constants).compile(), shapes


def collectives(text):
    """Name and bytes of the result of each, as it stands in the program: in a loop once."""

    def nbytes(dtype, sizes):
        return ITEM_BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)

    return [
        (match["name"], sum(nbytes(*x) for x in re.findall(r"([a-z]+\d*)\[([\d,]*)]", match[1])))
        for match in map(COLLECTIVE.search, text.splitlines())
        if match
    ]


def test_what_crosses_chips_or_reaches_the_host_is_seen(chips):
    mesh = mesh_of(chips)

    def program(function):
        x = jax.ShapeDtypeStruct((64, 100), jnp.float32, sharding=mesh_lib.batch_sharding(mesh, 0))
        return jax.jit(function, out_shardings=mesh_lib.replicated(mesh)).lower(x).compile()

    summed = program(jnp.sum).as_text()
    assert collectives(summed) == [("all-reduce", 4)] and not HOST.search(summed)
    assert collectives(program(lambda x: x).as_text()) == [("all-gather", 64 * 100 * 4)]
    told = program(lambda x: (jax.debug.callback(print, jnp.sum(x)), jnp.sum(x))[1])
    kept = program(lambda x: jax.device_put(jnp.sum(x), jax.memory.Space.Host))
    assert HOST.search(told.as_text()) and HOST.search(kept.as_text())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reach_ppo", {}),
        (
            "count_grpo",
            {"grpo": {"prompts_per_update": 512, "grad_accum_steps": 2, "kl_coef": 0.1}},
        ),
    ],
    ids=["ppo", "grpo"],
)
def test_eight_chips_share_the_work_and_exchange_gradients_alone(name, changes, chips):
    config = mmrl_jax.get_config(name, changes)
    eight, carry = compiled(config, chips)
    memory, text = eight.memory_analysis(), eight.as_text()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert 0 < needed < CHIP_BYTES
    # The carry is donated: only the metrics need new memory.
    assert 0 <= memory.output_size_in_bytes - memory.alias_size_in_bytes < 64e3
    found = collectives(text)
    params = sum(4 * x.size for x in jax.tree.leaves(carry.learner.params))
    print(f"{needed / 1e6:.1f} MB a chip; parameters {params / 1e6:.2f} MB; {found}")
    # Beside the gradient of a step only sums of numbers cross chips: no sample does.
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert params <= sum(size for _, size in found) < params + 16e3
    assert not HOST.search(text)
    one, _ = compiled(config, chips[:1])
    assert not collectives(one.as_text())
    shrinks = one.memory_analysis().temp_size_in_bytes / memory.temp_size_in_bytes
    # Of a loop it counts one step: good enough for a ratio.
    work = one.cost_analysis()["flops"] / eight.cost_analysis()["flops"]
    print(f"One chip needs {shrinks:.1f} times the temporary memory and does {work:.2f} the work.")
    # Every chip has its own gradient and padding, so that the memory shrinks by less than eight.
    assert shrinks > 2 and 7 < work < 9
