"""Accelerators and topologies: what a device can hold, compute and exchange.

All numbers are those that the vendors publish for dense products, read on 2026-11-29:

  TPU   https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x
  GPU   NVIDIA's data sheets of A100, L4, H100 SXM, H200 and B200

The number in the name of a TPU slice is that of Google Cloud: it counts chips for v5e, v6e and
tpu7x, and cores, of which a chip has two, for v4 and v5p. JAX sees one device a chip, except for
tpu7x, whose chips are two devices each.
"""

import dataclasses
import os
import pathlib
import re
from typing import Literal

import jax

Kind = Literal["tpu", "gpu", "cpu"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX sees it.

    Attributes:
      kind: Kind of the device.
      flops: Peak of dense bfloat16 products in FLOPs per second.
      flops32: Peak of float32 products at JAX's default precision in FLOPs per second. TPUs compute
        them from bfloat16 factors, and NVIDIA GPUs from TF32 factors.
      memory: Memory in bytes.
      usable: Fraction of the memory that a program can have. JAX takes three quarters of a GPU,
        unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
      bandwidth: Bandwidth of the memory in bytes per second.
      link: Bandwidth between devices in bytes per second, all links of a device in one direction.
      launch_s: Assumed time of a kernel in addition to its work, in seconds.
    """

    kind: Kind
    flops: float
    flops32: float
    memory: float
    usable: float
    bandwidth: float
    link: float
    launch_s: float


def _tpu(flops: float, memory: float, bandwidth: float, link: float) -> Chip:
    return Chip("tpu", flops, flops, memory, 0.97, bandwidth, link, 1e-6)


def _gpu(flops: float, flops32: float, memory: float, bandwidth: float, link: float) -> Chip:
    return Chip("gpu", flops, flops32, memory, 0.75, bandwidth, link, 3e-6)


GIB = 2.0**30
CHIPS: dict[str, Chip] = {
    "v4": _tpu(275e12, 32 * GIB, 1228e9, 300e9),
    "v5e": _tpu(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": _tpu(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": _tpu(918e12, 32 * GIB, 1638e9, 400e9),
    "tpu7x": _tpu(1153.5e12, 96 * GIB, 3690e9, 300e9),
    "a100": _gpu(312e12, 156e12, 80 * GIB, 2039e9, 300e9),
    "a100-40gb": _gpu(312e12, 156e12, 40 * GIB, 1555e9, 300e9),
    "l4": _gpu(121e12, 60e12, 24 * GIB, 300e9, 32e9),
    "h100": _gpu(989e12, 494e12, 80 * GIB, 3350e9, 450e9),
    "h200": _gpu(989e12, 494e12, 141e9, 4800e9, 450e9),
    "b200": _gpu(2250e12, 1100e12, 180e9, 8000e9, 900e9),
}
# Devices per unit of the number in the name of a slice.
_DEVICES = {"v4": 0.5, "v5p": 0.5, "tpu7x": 2.0}
# A core of a server: float32 products were measured at 95 GFLOP/s a core on an AMD EPYC, and XLA
# computes those of bfloat16 in float32. The bandwidth is that of a few threads.
_CORE_FLOPS, _CPU_BANDWIDTH, _CPU_LAUNCH_S = 95e9, 10e9, 2e-6
EXAMPLES = "v5e-8, v5e-256, v5p-8, v6e-8, tpu7x-8, a100x1, h100x8, l4x1, cpu"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      name: Name, for example 'v5e-8'.
      chip: The device.
      devices: Number of devices.
    """

    name: str
    chip: Chip
    devices: int


def cpu() -> Chip:
    """Returns this host as a device."""
    flops = (os.cpu_count() or 1) * _CORE_FLOPS
    return Chip(
        kind="cpu",
        flops=flops,
        flops32=flops,
        memory=host_memory(),
        usable=0.9,
        bandwidth=_CPU_BANDWIDTH,
        link=_CPU_BANDWIDTH,
        launch_s=_CPU_LAUNCH_S,
    )


def host_memory() -> float:
    """Returns the memory in bytes that this process may have: that of the host or of its cgroup."""
    installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return installed
    return installed if limit == "max" else min(installed, float(limit))


def topology(name: str) -> Topology:
    """Returns the topology with a name, '<tpu>-<number>', '<gpu>x<number>' or 'cpu'.

    Raises:
      ValueError: If there is no such topology; the message lists them.
    """
    if name == "cpu":
        return Topology(name, cpu(), 1)
    name = name.replace("v5litepod-", "v5e-")  # Google Cloud's own name.
    match = re.fullmatch(r"(?P<chip>.+?)(?P<separator>[-x])(?P<number>\d+)", name)
    chip = CHIPS.get(match["chip"]) if match else None
    if match is None or chip is None or (match["separator"] == "-") != (chip.kind == "tpu"):
        raise ValueError(_unknown(name))
    devices = int(match["number"]) * _DEVICES.get(match["chip"], 1.0)
    if devices < 1 or devices != int(devices):
        raise ValueError(_unknown(name))
    return Topology(name, chip, int(devices))


def _unknown(name: str) -> str:
    tpus = ", ".join(f"{chip}-N" for chip, x in CHIPS.items() if x.kind == "tpu")
    gpus = ", ".join(f"{chip}xN" for chip, x in CHIPS.items() if x.kind == "gpu")
    return (
        f"--topology={name!r} is unknown. Give a TPU slice ({tpus}), GPUs ({gpus}) or cpu, for "
        f"example {EXAMPLES}. N is the number in Google Cloud's name of a slice, or the number of "
        "GPUs."
    )


# Names of the table for the kinds of TPUs as JAX names them.
_TPU_KINDS = {
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5": "v5p",
    "tpu v5p": "v5p",
    "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
    "tpu7x": "tpu7x",
}


def found(devices: int) -> Topology:
    """Returns the devices that JAX has found as a topology.

    The memory is what a device reports, or else that of the table. Simulated devices share the
    memory of the host. A device that is not in the table has the speeds of an A100.

    Args:
      devices: Number of devices that are used.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        chip = dataclasses.replace(cpu(), memory=host_memory() / devices)
        return Topology("this host", chip, devices)
    kind = device.device_kind.lower()
    name = _TPU_KINDS.get(kind) or next((x for x in CHIPS if x in kind.split()), "a100")
    stats = device.memory_stats() or {}
    chip = CHIPS[name]
    if "bytes_limit" in stats:
        chip = dataclasses.replace(chip, memory=float(stats["bytes_limit"]), usable=1.0)
    return Topology(f"{devices} x {device.device_kind}", chip, devices)
