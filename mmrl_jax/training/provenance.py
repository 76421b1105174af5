"""What a run or a result was made with: commit, versions, hardware and command."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys
from typing import Any

import jax


def commit() -> str:
    """The short hash of the checkout's commit, with '+' after it where files differ from it."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        name, changed = (
            subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
            for more in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changed.strip() else "")


def provenance() -> dict[str, Any]:
    """Returns what a run is made with, to be kept with it."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "brax", "transformers")
    versions = {name: _version(name) for name in ("mmrl_jax", *packages)}
    return {
        "commit": commit(),
        "command": " ".join(sys.argv),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hardware() -> str:
    """The devices and, of a CPU, its model and the cores this process may use."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    model, cpuinfo = platform.processor() or platform.machine(), pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8"))
        model = named.group(1) if named else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model}"
