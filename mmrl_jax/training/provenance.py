"""Provenance of a run or a result: commit, package versions, hardware and command."""

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
    """Returns the short hash of the commit, with a '+' appended if files differ from it.

    It is 'unknown' outside of a git checkout.
    """
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        name, changed = (
            subprocess.run([*command, *args], capture_output=True, text=True, check=True).stdout
            for args in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changed.strip() else "")


def provenance() -> dict[str, Any]:
    """Returns commit, command, hardware and versions of this process, to be stored with a run."""
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
    """Returns number and kind of the devices; for a CPU, its usable cores and its model."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    model, cpuinfo = platform.processor() or platform.machine(), pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8"))
        model = match.group(1) if match else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model}"
