"""Tests of mmrl_jax.planning.chips."""

import pytest

from mmrl_jax.planning import chips


@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [
        ("v5e-8", 8, 16),
        ("v5e-256", 256, 16),
        ("v5litepod-8", 8, 16),
        ("v5p-8", 4, 95),  # Google Cloud counts cores, two a chip.
        ("tpu7x-8", 16, 96),  # A chip is two devices, each with half of its 192 GiB.
        ("h100x8", 8, 80),
        ("a100-40gbx2", 2, 40),
    ],
)
def test_a_name_gives_devices_and_their_memory(name, devices, gib):
    topology = chips.topology(name)
    assert topology.devices == devices
    assert topology.chip.memory == gib * 2**30


def test_cpu_is_this_host():
    topology = chips.topology("cpu")
    assert topology.devices == 1 and topology.chip.memory > 2**30


@pytest.mark.parametrize("name", ["v5e", "v5ex8", "h100-8", "v5p-1", "h100x0", "tpu", ""])
def test_an_unknown_topology_is_an_error_with_the_list(name):
    with pytest.raises(ValueError, match=f"--topology='{name}'.*v5e-N.*h100xN.*cpu"):
        chips.topology(name)
