"""The working directory of a run, which is a local directory or one in Google Cloud Storage.

It is created, claimed for a config, and written to. A path in a bucket has the form
gs://bucket/run.
"""

from collections.abc import Callable, Collection, Mapping
import errno
import json
import logging
import os
import pathlib
import shutil
import types
import uuid

from etils import epath

from mmrl_jax import config as config_lib
from mmrl_jax.distributed import multihost

CHECKPOINTS = "checkpoints"
CONFIG_NAME = "config.json"

PathLike = str | os.PathLike[str]

logger = logging.getLogger(__name__)


def as_path(path: PathLike) -> epath.Path:
    """Returns the absolute path of a directory, local or gs://bucket/run.

    Raises:
        ValueError: If the path has another scheme, which Orbax would treat as a local directory.
    """
    text = os.fspath(path)
    scheme, is_address, _ = text.partition("://")
    if not is_address:
        return epath.Path(os.path.abspath(text))
    if scheme != "gs":
        raise ValueError(
            f"Workdir {text}: there is no support for {scheme}://. Give a local directory, which "
            "may be mounted, or gs://bucket/directory."
        )
    return epath.Path(text)


def stage_directory(config: config_lib.ConfigDict, name: str, workdir: PathLike) -> epath.Path:
    """Returns the directory of a stage: `workdir` for the last stage, else <workdir>/<name>."""
    directory = as_path(workdir)
    return directory if name == config.stages[-1] else directory / name


def is_remote(path: PathLike) -> bool:
    """Returns whether a path is in a bucket, without locks, appending and atomic renaming."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically, so that a killed process leaves either the old or the new file."""
    if is_remote(path):  # Objects in a bucket are always written atomically.
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def claim_workdir(
    workdir: PathLike,
    config: config_lib.ConfigLike,
    *,
    may_change: Collection[str] = (),
    fixed: Mapping[str, str] = types.MappingProxyType({}),
    begun: bool = True,
    complete: Callable[[config_lib.ConfigDict], config_lib.ConfigLike] = lambda config: config,
) -> None:
    """Writes `workdir/config.json`, or compares the config with the stored one.

    Args:
        workdir: Directory of the run, which is created if it does not exist.
        config: Config of the run.
        may_change: Keys, or groups of keys, whose values may differ from the stored config. The new
            values are written to the file.
        fixed: Reasons by the keys that must not differ although a group in `may_change` contains
            them.
        begun: Whether the run has completed an update. If not, its config may be replaced.
        complete: Adds missing keys to a stored config of an earlier version.

    Raises:
        ValueError: If the workdir cannot be written, or belongs to another config; the message
            lists each differing key with both values.
    """
    workdir = as_path(workdir)
    make_directory(workdir)
    stored = stored_config(workdir) if begun else None
    if stored is not None:
        differences = config_lib.diff_configs(complete(stored), config)
        rejected = {
            key: pair
            for key, pair in differences.items()
            if key in fixed
            or not any(key == name or key.startswith(f"{name}.") for name in may_change)
        }
        if rejected:
            lines = [
                f"  {key}: {old!r} there, {new!r} now" + (f"; {fixed[key]}" if key in fixed else "")
                for key, (old, new) in rejected.items()
            ]
            raise ValueError(
                f"Workdir {workdir} belongs to a run of another config:\n"
                + "\n".join(lines)
                + "\nGive a fresh workdir, or the config of that run."
            )
    if multihost.is_primary():
        try:
            write_text(workdir / CONFIG_NAME, config_lib.to_json(config))
        except OSError as error:
            raise _unwritable(workdir, error) from error


def stored_config(workdir: PathLike) -> config_lib.ConfigDict | None:
    """Returns the config of the run in a workdir; None if there is no run.

    If config.json is missing or damaged, the config is read from the newest checkpoint.
    """
    workdir = as_path(workdir)
    path = workdir / CONFIG_NAME
    if path.exists():
        try:
            return config_lib.from_json(path.read_bytes().decode("utf-8"))
        except (OSError, ValueError) as error:
            logger.warning(
                "%s cannot be read (%s); the config in the newest checkpoint is used instead, if "
                "there is one.",
                path,
                one_line(error),
            )
    for step in reversed(saved_steps(workdir)):
        try:
            # This is the file that Orbax's JsonCheckpointHandler writes.
            text = (workdir / CHECKPOINTS / str(step) / "record" / "metadata").read_text()
            return config_lib.from_json(json.dumps(json.loads(text)["body"]["config"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # The record is damaged, which is reported when it is restored.
    return None


def saved_steps(workdir: PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints of a run, sorted.

    Other files and directories in the directory of the checkpoints are ignored.
    """
    directory = as_path(workdir) / CHECKPOINTS
    try:
        if not directory.is_dir():
            return []
    except ImportError as error:
        raise missing_package(as_path(workdir), error) from error
    return sorted(int(path.name) for path in directory.iterdir() if _is_checkpoint(path))


def _is_checkpoint(path: epath.Path) -> bool:
    # On a file system with renaming, incomplete checkpoints have longer names, for example
    # "5.orbax-checkpoint-tmp". In a bucket, Orbax marks complete checkpoints with a file.
    name = path.name
    if not (name.isascii() and name.isdecimal() and str(int(name)) == name):
        return False
    return (path / "commit_success.txt").exists() if is_remote(path) else path.is_dir()


def make_directory(directory: epath.Path) -> None:
    """Creates a directory and tests that it can be written, rather than failing hours later.

    Raises:
        ValueError: If the directory cannot be written.
    """
    # The name is random, because processes on several hosts may do so concurrently.
    probe = directory / f".write_test_{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except ImportError as error:
        raise missing_package(directory, error) from error
    except OSError as error:
        raise _unwritable(directory, error) from error
    except Exception as error:
        # Clients of remote storage have their own exception types, for example for credentials.
        if not is_remote(directory):
            raise
        raise _unwritable(directory, error) from error


def missing_package(directory: epath.Path, error: ImportError) -> ValueError:
    """Returns the error to raise if a package for access to a bucket is not installed."""
    return ValueError(
        f"Workdir {directory} needs packages that are not installed ({error}): "
        "pip install gcsfs google-cloud-storage."
    )


def _unwritable(directory: epath.Path, error: Exception) -> ValueError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return ValueError(
        f"Workdir {directory} cannot be written ({getattr(error, 'strerror', None) or error}): "
        + (
            "free disk space there or give another directory."
            if full
            else "give a directory for which you have write permission."
        )
    )


def free_name(parent: epath.Path, name: str) -> epath.Path:
    """Returns a path in a directory that does not exist yet: `name`, or else `name_2` and so on."""
    path, i = parent / name, 2
    while path.exists():
        path, i = parent / f"{name}_{i}", i + 1
    return path


def free_space(directory: epath.Path) -> str:
    """Returns ", 12 MiB free there" for a local directory; "" if the free space is unknown."""
    try:
        return f", {shutil.disk_usage(pathlib.Path(directory)).free / 2**20:.0f} MiB free there"
    except OSError:
        return ""


def one_line(error: Exception) -> str:
    """Returns type and message of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
