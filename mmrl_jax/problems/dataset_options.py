"""Options of the groups `dataset` and `rewards` of a config, and import of the reward functions."""

import dataclasses
import importlib
import math
import pathlib
from typing import Literal

import ml_collections

from mmrl_jax.config.loading import import_object
from mmrl_jax.config.options import (
    BELOW_ONE,
    NON_EMPTY,
    NON_NEGATIVE,
    POSITIVE,
    TEXTS,
    Valid,
    option,
)
from mmrl_jax.config.schema import is_group
from mmrl_jax.problems import token_options
from mmrl_jax.problems.token_problem import CompletionOptions
from mmrl_jax.tasks.reward_signatures import RewardFunction, with_options
from mmrl_jax.tasks.samples import NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Options of the group `dataset`."""

    directory: str = option(
        "",
        "Directory with the images and metadata.jsonl, other .jsonl files or .parquet files, see "
        "mmrl_jax/tasks/tables.py.",
        NON_EMPTY,
    )
    files: str | None = option(
        None,
        "Pattern of the tables of records in the directory, e.g. 'data/train-*.parquet'; None for "
        "metadata.jsonl, or else all .jsonl, or else all .parquet files in it or in its data/.",
        NON_EMPTY,
    )
    columns: dict = option(
        {},
        "Names of the columns of the records by the names 'image', 'prompt' and 'answer', where "
        "they differ from the usual ones, see mmrl_jax/tasks/samples.py.",
    )
    height: int = option(64, "Height of the model's input images in pixels.", POSITIVE)
    width: int = option(64, "Width of the model's input images in pixels.", POSITIVE)
    resize: Literal["letterbox", "stretch"] = option(
        "letterbox",
        "How images are resized: 'letterbox' keeps the aspect ratio and pads with black, 'stretch' "
        "changes the aspect ratio.",
    )
    prompt_tokens: int = option(
        192,
        "Maximum number of tokens of a prompt with its image; longer records are rejected.",
        POSITIVE,
    )
    completion_tokens: int = option(
        64,
        "Maximum number of tokens of a completion, after which it is truncated; a stage that "
        "learns from the records' answers rejects records with longer answers.",
        POSITIVE,
    )
    max_rejected: float = option(
        0.01, "Maximum fraction of records, below 1, that may be rejected.", BELOW_ONE
    )
    validation_size: int = option(
        64,
        "Minimum number of records that are evaluated during training and select the best "
        "checkpoint; records with the same image are in the same split.",
        POSITIVE,
    )
    test_size: int = option(
        64,
        "Minimum number of records for the final evaluation; 0 with test_directory.",
        NON_NEGATIVE,
    )
    test_directory: str | None = option(
        None,
        "Directory of records for the final evaluation, with no image that is in `directory`.",
        NON_EMPTY,
    )
    test_files: str | None = option(
        None, "Pattern of the tables in `test_directory`, as `files`.", NON_EMPTY
    )
    weights: str | None = option(
        None,
        "File of weights of the records of `directory`, which `python -m experiments.audit` "
        "writes: training leaves out records of weight 0, and samples those of higher weights "
        "more often. None to sample all alike.",
        NON_EMPTY,
    )
    split_seed: int = option(
        0,
        "Seed of the selection of validation and test images, independent of `seed`.",
        NON_NEGATIVE,
    )


def _finite(weights: tuple) -> bool:
    return all(type(w) in (int, float) and math.isfinite(w) for w in weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Options of the group `rewards`."""

    functions: tuple[str, ...] = option(
        ("mmrl_jax.rewards:exact_match",),
        "Reward functions as 'module:function', of mmrl_jax/rewards or of your own, see "
        "mmrl_jax/tasks/rewards.py.",
        TEXTS,
    )
    options: tuple[dict, ...] = option(
        (),
        "Further arguments of each function as a dictionary, in the order of `functions`; () for "
        "none. A column of a record replaces the argument of the same name.",
        Valid(lambda options: all(map(is_group, options)), "a tuple of dictionaries"),
    )
    weights: tuple[float, ...] = option(
        (1.0,),
        "Weight of each function; the reward is the weighted sum of their results.",
        Valid(_finite, "finite numbers"),
    )
    workers: int = option(4, "Number of processes that call the functions.", POSITIVE)
    timeout_s: float = option(10.0, "Maximum duration of a call in seconds.", POSITIVE)
    memory_mb: int | None = option(
        None,
        "Limit in MiB on the address space of each process that calls the functions, and of each "
        "process that they start; None for no limit.",
        POSITIVE,
    )
    max_failed: float = option(
        0.1,
        "Maximum fraction of the completions of an evaluation whose reward may have failed; above "
        "it, the return is not reported and does not select a checkpoint.",
        BELOW_ONE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostRewardOptions(CompletionOptions):
    """Options of the completions of an update whose rewards are computed on the host."""

    one_step_off_policy: bool = option(
        False,
        "Whether the completions of the next update are sampled while reward functions score those "
        "of this one, so that each update learns from completions of the policy before the last "
        "update. The losses of GRPO and PPO correct for it with importance_weight_cap.",
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the config, as far as that is possible without reading the records.

    Raises:
      ValueError: If the config is invalid; the message gives the field, its value and the remedy.
    """
    d = config.dataset
    if config.model.kind == "scratch":
        raise ValueError(
            "model.kind='scratch', but a decoder from scratch cannot read the free text of a "
            "dataset: choose 'decoder', e.g. of 'smollm2', or 'vlm'."
        )
    for name in config.stages:
        g = config[name]
        if g.get("one_step_off_policy") and g.get("importance_weight_cap", 1.0) is None:
            raise ValueError(
                f"{name}.one_step_off_policy=True learns from completions of the policy before the "
                f"last update, but with {name}.importance_weight_cap=None no importance weights "
                "correct for it; set a cap, for example 2.0."
            )
    for name, column in d.columns.items():
        if name not in NAMES or not isinstance(column, str):
            raise ValueError(
                f"dataset.columns.{name}={column!r}: give the name of the column of "
                f"{', '.join(map(repr, NAMES))}."
            )
    if d.test_files is not None and d.test_directory is None:
        raise ValueError(
            f"dataset.test_files={d.test_files!r} without dataset.test_directory; give its "
            "directory, which may be dataset.directory."
        )
    token_options.check_model(config, d.height, d.width, "dataset")
    if (d.test_directory is None) == (d.test_size == 0):
        raise ValueError(
            f"dataset.test_size={d.test_size}, dataset.test_directory={d.test_directory!r}: the "
            "test records are either a part of dataset.directory, or all records of another "
            "directory; give a size above 0 and None, or 0 and a directory."
        )


def reward_functions(config: ml_collections.ConfigDict) -> dict[str, RewardFunction]:
    """Imports the functions of rewards.functions, and returns them by their names there.

    Functions with options are returned with these arguments bound.

    Raises:
      ValueError: If a function cannot be imported, has an invalid signature or does not take its
        options, a name occurs twice, or the number of weights or options is not the number of
        functions.
    """
    names, weights = tuple(config.rewards.functions), tuple(config.rewards.weights)
    options = tuple(config.rewards.options) or ({},) * len(names)
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"rewards.functions={names} must name at least one function, without duplicates."
        )
    if len(weights) != len(names):
        raise ValueError(
            f"rewards.weights={weights} must have one number for each of rewards.functions={names}."
        )
    if len(options) != len(names):
        raise ValueError(
            f"rewards.options={options} must have one dictionary for each of "
            f"rewards.functions={names}, or be ()."
        )
    functions = {}
    for name, arguments in zip(names, options, strict=True):
        functions[name] = with_options(name, import_object(name, "rewards.functions"), arguments)
    return functions


def source_code(name: str) -> bytes:
    """Returns the source code of the module in the name of a reward function, 'module:function'.

    Of a package, whose functions usually call its modules, it is that of all modules in it.
    The file in which the function object was defined is not used, because it may be that of a
    decorator in another module.

    Raises:
      ValueError: If the module has no file.
    """
    file = importlib.import_module(name.partition(":")[0]).__file__
    if file is None:
        raise ValueError(
            f"rewards.functions has {name!r}, whose module is a directory without __init__.py; "
            "name the module in that directory that defines the function."
        )
    path = pathlib.Path(file)
    if path.name != "__init__.py":
        return path.read_bytes()
    modules = sorted(path.parent.rglob("*.py"))
    return repr([(str(x.relative_to(path.parent)), x.read_bytes()) for x in modules]).encode()
