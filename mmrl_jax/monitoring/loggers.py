"""Loggers that receive metrics in addition to the files of a run: Weights & Biases and trackio.

Their packages are imported only if a config names them: `run.loggers=("tensorboard", "wandb")`.
A logger that fails does not end the run.
"""

from collections.abc import Mapping, Sequence
import importlib
import math
from typing import Any, Protocol

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config import ConfigLike
from mmrl_jax.config.schema import flatten
from mmrl_jax.distributed import multihost

LOGGERS = ("tensorboard", "wandb", "trackio")
PROJECT = "mmrl_jax"


class Logger(Protocol):
    """Receives the metrics of a stage."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics of update `step`."""

    def close(self) -> None:
        """Finishes the run in the logger's backend."""


class _Tracker:
    """A run of wandb or of trackio, which has the same interface for the functions used here."""

    def __init__(self, module: Any, workdir: workdir_lib.PathLike, label: str, config: ConfigLike):
        name = f"{workdir_lib.as_path(workdir).name}-{label}"
        arguments: dict[str, Any] = {"project": PROJECT, "name": name, "config": flatten(config)}
        if module.__name__ == "wandb":
            # A resumed run continues the wandb run with the same id.
            arguments |= {"dir": str(workdir), "id": name, "resume": "allow"}
        else:
            arguments |= {"resume": "allow"}
        self._module = module
        self._run = module.init(**arguments)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        self._module.log(finite, step=step)

    def close(self) -> None:
        self._module.finish()


def modules(names: Sequence[str]) -> list[Any]:
    """Imports the packages of loggers, except for TensorBoard.

    Args:
      names: Names of loggers, a subset of LOGGERS.

    Raises:
      ValueError: If the package of a logger is not installed.
    """
    imported = []
    for name in names:
        if name == "tensorboard":
            continue
        try:
            imported.append(importlib.import_module(name))
        except ImportError as error:
            raise ValueError(
                f"run.loggers has {name!r}, which is not installed: pip install {name}."
            ) from error
    return imported


def make(
    names: Sequence[str],
    workdir: workdir_lib.PathLike,
    *,
    label: str,
    config: ConfigLike,
) -> tuple[Logger, ...]:
    """Opens the loggers of a stage, except for TensorBoard, whose files `metric_files` writes.

    Args:
      names: Names of loggers, a subset of LOGGERS.
      workdir: Working directory of the stage.
      label: Name of the stage, which becomes part of the name of the logged run.
      config: Config of the run, which the loggers show.

    Raises:
      ValueError: If the package of a logger is not installed.
    """
    if not multihost.is_primary():
        return ()
    return tuple(_Tracker(module, workdir, label, config) for module in modules(names))
