"""The working directory of a run: made, claimed for a config, and written to."""

from collections.abc import Collection, Mapping
import errno
import os
import pathlib
import shutil
import types

import jax

from mmrl_jax.training import config as config_lib


def claim_workdir(
    workdir: str | os.PathLike[str],
    config: config_lib.ConfigLike,
    *,
    may_change: Collection[str] = (),
    fixed: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Writes `workdir/config.json`, or compares with the one that is there.

    Args:
        workdir: Directory of the run; made if absent.
        config: Config of the run.
        may_change: Keys, or groups of keys, in which the two may differ; the file then gets the
            new values.
        fixed: Keys among those that may not differ all the same, and why.

    Raises:
        ValueError: The workdir cannot be written, or belongs to another config (each differing
            key is named with both values).
    """
    workdir = pathlib.Path(workdir)
    make_directory(workdir)
    path = workdir / "config.json"
    if path.exists():
        there = config_lib.from_json(path.read_text(encoding="utf-8"))
        differences = config_lib.diff_configs(there, config)
        refused = {
            key: pair
            for key, pair in differences.items()
            if key in fixed
            or not any(key == name or key.startswith(f"{name}.") for name in may_change)
        }
        if refused:
            lines = [
                f"  {key}: {old!r} there, {new!r} now" + (f"; {fixed[key]}" if key in fixed else "")
                for key, (old, new) in refused.items()
            ]
            raise ValueError(
                f"Workdir {workdir} belongs to a run of another config:\n"
                + "\n".join(lines)
                + "\nGive a fresh workdir, or the config of that run."
            )
        if not differences:
            return
    if jax.process_index() == 0:
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(config_lib.to_json(config), encoding="utf-8")
        temporary.replace(path)


def make_directory(directory: pathlib.Path) -> None:
    """Makes a directory and writes to it once, so that a run does not find out hours later."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write_test_{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Workdir {directory} cannot be written ({error.strerror or error}): "
            + (
                "make space there or give another one."
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else "give a directory that you may write to."
            )
        ) from error


def free_name(parent: pathlib.Path, name: str) -> pathlib.Path:
    """Returns a path in a directory that is not taken: `name`, or `name_2` and so on."""
    place, i = parent / name, 2
    while place.exists():
        place, i = parent / f"{name}_{i}", i + 1
    return place


def free_bytes(directory: pathlib.Path) -> int:
    """Returns the free space of a directory's disk, in bytes; 0 where it is not known."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def one_line(error: Exception) -> str:
    """Returns kind and message of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
