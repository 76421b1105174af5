"""The working directory of a run: made, claimed for a config, and written to.

It is a local directory or one of Google Cloud Storage, gs://bucket/run.
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
import jax

from mmrl_jax import config as config_lib

CHECKPOINTS = "checkpoints"
CONFIG_NAME = "config.json"

PathLike = str | os.PathLike[str]

logger = logging.getLogger(__name__)


def as_path(path: PathLike) -> epath.Path:
    """Returns the absolute path of a directory, local or gs://bucket/run.

    Raises:
        ValueError: Another kind of storage, which Orbax would take for a local directory.
    """
    text = os.fspath(path)
    scheme, is_address, _ = text.partition("://")
    if not is_address:
        return epath.Path(os.path.abspath(text))
    if scheme != "gs":
        raise ValueError(
            f"Workdir {text}: there is no support for {scheme}://. Give a local directory, "
            "perhaps a mounted one, or gs://bucket/directory."
        )
    return epath.Path(text)


def is_remote(path: PathLike) -> bool:
    """Says whether a path is no local one: it has no locks, no appending and no atomic renaming."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file in one replacement, so that a killed process leaves the old one or the new."""
    if is_remote(path):  # Objects in a bucket appear whole.
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
    """Writes `workdir/config.json`, or compares with the one that is there.

    Args:
        workdir: Directory of the run; made if absent.
        config: Config of the run.
        may_change: Keys, or groups of keys, in which the two may differ; the file then gets the
            new values.
        fixed: Keys among those that may not differ all the same, and why.
        complete: Gives a stored config of an earlier version the keys that it lacks.
        begun: Whether the run has learned anything; one that has not may get another config.

    Raises:
        ValueError: The workdir cannot be written, or belongs to another config (each differing
            key is named with both values).
    """
    workdir = as_path(workdir)
    make_directory(workdir)
    stored = stored_config(workdir) if begun else None
    if stored is not None:
        differences = config_lib.diff_configs(complete(stored), config)
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
    if jax.process_index() == 0:
        try:
            write_text(workdir / CONFIG_NAME, config_lib.to_json(config))
        except OSError as error:
            raise _unwritable(workdir, error) from error


def stored_config(workdir: PathLike) -> config_lib.ConfigDict | None:
    """Returns the config of the run in a workdir; None if there is no run.

    A missing or damaged config.json is replaced by what the newest checkpoint says.
    """
    workdir = as_path(workdir)
    path = workdir / CONFIG_NAME
    if path.exists():
        try:
            return config_lib.from_json(path.read_bytes().decode("utf-8"))
        except (OSError, ValueError) as error:
            logger.warning(
                "%s cannot be read (%s); the config in the newest checkpoint is taken instead, if "
                "there is one.",
                path,
                one_line(error),
            )
    for step in reversed(saved_steps(workdir)):
        try:
            # The file of Orbax's JsonCheckpointHandler.
            text = (workdir / CHECKPOINTS / str(step) / "record" / "metadata").read_text()
            return config_lib.from_json(json.dumps(json.loads(text)["body"]["config"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # A damaged record; restoring says so.
    return None


def saved_steps(workdir: PathLike) -> list[int]:
    """Returns the steps of the finished checkpoints of a run, in order.

    Other files and directories among the checkpoints are no checkpoints.
    """
    directory = as_path(workdir) / CHECKPOINTS
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_checkpoint(path))


def _is_checkpoint(path: epath.Path) -> bool:
    # Orbax's temporary directories have longer names ("5.orbax-checkpoint-tmp"), where it can
    # rename; elsewhere it writes a file into a directory that is complete.
    name = path.name
    if not (name.isascii() and name.isdecimal() and str(int(name)) == name):
        return False
    return (path / "commit_success.txt").exists() if is_remote(path) else path.is_dir()


def make_directory(directory: epath.Path) -> None:
    """Makes a directory and writes to it once, so that a run does not find out hours later.

    Raises:
        ValueError: It cannot be written.
    """
    # Several hosts may do so at once, and their processes may have the same number.
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
        # Clients of remote storage raise errors of their own, of credentials for example.
        if not is_remote(directory):
            raise
        raise _unwritable(directory, error) from error


def missing_package(directory: epath.Path, error: ImportError) -> ValueError:
    """Returns the error of a bucket for which epath or Orbax lacks a package."""
    return ValueError(
        f"Workdir {directory} needs packages that are not installed ({error}): "
        "pip install gcsfs google-cloud-storage."
    )


def _unwritable(directory: epath.Path, error: Exception) -> ValueError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return ValueError(
        f"Workdir {directory} cannot be written ({getattr(error, 'strerror', None) or error}): "
        + (
            "make space there or give another one."
            if full
            else "give a directory that you may write to."
        )
    )


def free_name(parent: epath.Path, name: str) -> epath.Path:
    """Returns a path in a directory that is not taken: `name`, or `name_2` and so on."""
    place, i = parent / name, 2
    while place.exists():
        place, i = parent / f"{name}_{i}", i + 1
    return place


def free_space(directory: epath.Path) -> str:
    """Returns ", 12 MiB free there" of a local directory; nothing where that is not known."""
    try:
        return f", {shutil.disk_usage(pathlib.Path(directory)).free / 2**20:.0f} MiB free there"
    except OSError:
        return ""


def one_line(error: Exception) -> str:
    """Returns kind and message of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
