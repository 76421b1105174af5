"""The update as the TPU's own compiler sees it: no TPU is needed, only `pip install libtpu`."""

import re

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import factory

pytestmark = pytest.mark.slow
CHIP_BYTES = 16e9  # Of a TPU v5e.


def test_the_update_compiles_for_eight_chips():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install libtpu")
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    here = mesh_lib.make_mesh(1)
    chips = Mesh(
        np.array(topology.devices).reshape(-1),
        here.axis_names,
        axis_types=(AxisType.Auto,) * len(here.axis_names),
    )
    config = config_lib.load_config("configs/reach_ppo.py")
    # Shapes from a mesh of this machine: nothing can be put on devices that are not there.
    shapes = jax.eval_shape(factory.ppo_stage(config, here).init)

    def compiled(mesh):
        stage = factory.ppo_stage(config, mesh)
        shardings = stage.shardings(shapes)
        carry = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        update = jax.jit(stage.update, donate_argnums=0, out_shardings=(shardings, None))
        return update.lower(carry, None).compile()

    eight = compiled(chips)
    memory = eight.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert 0 < needed < CHIP_BYTES
    assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes  # The carry is donated.
    collectives = re.findall(
        r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\(", eight.as_text()
    )
    counts = {name: collectives.count(name) for name in sorted(set(collectives))}
    print(f"{needed / 1e6:.0f} MB a chip; collectives: {counts}")
    assert "all-reduce" in counts  # The gradient's.
