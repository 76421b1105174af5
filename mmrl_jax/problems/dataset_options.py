"""The groups `dataset` and `rewards` of a config: their keys, and the functions that they name."""

import dataclasses
import importlib
import math
import pathlib
from typing import Literal

import jax
import ml_collections

from mmrl_jax.config.loading import import_object
from mmrl_jax.config.options import (
    NON_EMPTY,
    NON_NEGATIVE,
    POSITIVE,
    TEXTS,
    Valid,
    between,
    option,
)
from mmrl_jax.problems import token_models
from mmrl_jax.tasks.rewards import RewardFunction


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """The group `dataset`."""

    directory: str = option(
        "", "Directory of the images and metadata.jsonl, see mmrl_jax/tasks/folder.py.", NON_EMPTY
    )
    height: int = option(64, "Height of the images that the model is given, in pixels.", POSITIVE)
    width: int = option(64, "Width of the images that the model is given, in pixels.", POSITIVE)
    resize: Literal["letterbox", "stretch"] = option(
        "letterbox",
        "How images are brought to that size: 'letterbox' keeps the aspect ratio and pads with "
        "black, 'stretch' does not keep it.",
    )
    prompt_tokens: int = option(
        192,
        "Most tokens of a prompt with its image; records with longer ones are rejected.",
        POSITIVE,
    )
    completion_tokens: int = option(
        64,
        "Most tokens of a completion, where it is truncated; a stage that learns from the records' "
        "answers rejects records with longer ones.",
        POSITIVE,
    )
    max_rejected: float = option(
        0.01, "Fraction of the records, below 1, that may be unusable.", between(0, 1)
    )
    validation_size: int = option(
        64,
        "Least number of records that are evaluated during training and choose the best "
        "checkpoint; records of one image stay together.",
        POSITIVE,
    )
    test_size: int = option(
        64, "Least number of records that are reported; 0 with test_directory.", NON_NEGATIVE
    )
    test_directory: str | None = option(
        None,
        "A directory whose records are reported; none of its images may be in `directory`.",
        NON_EMPTY,
    )
    split_seed: int = option(
        0,
        "Seed of the choice of validation and test images, independent of the run's.",
        NON_NEGATIVE,
    )


def _finite(weights: tuple) -> bool:
    return all(type(w) in (int, float) and math.isfinite(w) for w in weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The group `rewards`."""

    functions: tuple[str, ...] = option(
        ("mmrl_jax.tasks.rewards:exact_match",),
        "Reward functions, 'module:function' each, see mmrl_jax/tasks/rewards.py.",
        TEXTS,
    )
    weights: tuple[float, ...] = option(
        (1.0,),
        "Weights of the functions' results, whose sum is the reward.",
        Valid(_finite, "finite numbers alone"),
    )
    workers: int = option(4, "Processes that call the functions.", POSITIVE)
    timeout_s: float = option(10.0, "Seconds that one call may take.", POSITIVE)
    memory_mb: int | None = option(
        None,
        "Limit in MiB on the address space of each process that calls the functions or is started "
        "by them; None for no limit.",
        POSITIVE,
    )
    max_failed: float = option(
        0.1,
        "Fraction of the completions of an evaluation that may be without a reward; above it the "
        "return is not reported and chooses no checkpoint.",
        Valid(lambda x: 0 <= x < 1, "at least 0 and below 1"),
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Checks what is known without reading the records.

    Raises:
      ValueError: Names the field, its value and the remedy.
    """
    d = config.dataset
    # Each process would score all completions, and one whose rewards fail keep the others waiting.
    if jax.process_count() > 1:
        raise ValueError(
            f"dataset.directory={d.directory!r} on {jax.process_count()} processes: runs with "
            "reward functions are for one process, which may have several devices."
        )
    if config.model.kind == "scratch":
        raise ValueError(
            "model.kind='scratch', but a dataset's texts are free, and no decoder from scratch can "
            "read them: choose 'decoder', e.g. of 'smollm2', or 'vlm'."
        )
    token_models.check_model(config, d.height, d.width, "dataset")
    if (d.test_directory is None) == (d.test_size == 0):
        raise ValueError(
            f"dataset.test_size={d.test_size}, dataset.test_directory={d.test_directory!r}: what "
            "is reported is either so many records of dataset.directory, or all of another "
            "directory; give a size above 0 and None, or 0 and a directory."
        )


def reward_functions(config: ml_collections.ConfigDict) -> dict[str, RewardFunction]:
    """Imports the functions of rewards.functions, by their names there.

    Raises:
      ValueError: One cannot be imported, one is named twice, or there are not as many weights.
    """
    names, weights = tuple(config.rewards.functions), tuple(config.rewards.weights)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards.functions={names} must name one function or more, each once.")
    if len(weights) != len(names):
        raise ValueError(
            f"rewards.weights={weights} must be as many numbers as rewards.functions={names}."
        )
    functions = {}
    for name in names:
        functions[name] = import_object(name, "rewards.functions")
    return functions


def source_code(name: str) -> bytes:
    """Reads the file of the module that a reward function is named by, 'module:function'.

    Not that of the function itself, which may be of a decorator in another module, or an object.

    Raises:
      ValueError: The module has no file.
    """
    file = importlib.import_module(name.partition(":")[0]).__file__
    if file is None:
        raise ValueError(
            f"rewards.functions has {name!r}, whose module is a directory without __init__.py; "
            "name the module in it that defines the function."
        )
    return pathlib.Path(file).read_bytes()
