"""Environments by name; this module alone combines core environments with wrappers."""

from collections.abc import Callable
import difflib
import inspect
from typing import Any, cast

from mmrl_jax.config.loading import import_object
from mmrl_jax.envs import from_brax, language_grid, language_locomotion, language_reach
from mmrl_jax.envs.brax_api import Env, environment_names
from mmrl_jax.envs.deep_sea import DeepSea
from mmrl_jax.envs.from_brax import FromBrax
from mmrl_jax.envs.language_grid import LanguageGrid
from mmrl_jax.envs.language_locomotion import LanguageLocomotion
from mmrl_jax.envs.language_reach import LanguageReach
from mmrl_jax.envs.recall import Recall
from mmrl_jax.envs.wrappers import AutoReset, History, Pixels

_CORES: dict[str, tuple[Callable[..., Env], tuple[str, ...]]] = {
    "language_reach": (LanguageReach, language_reach.SPLITS),
    "language_locomotion": (LanguageLocomotion, language_locomotion.SPLITS),
    "language_grid": (LanguageGrid, language_grid.SPLITS),
    "recall": (Recall, ("train",)),
    "deep_sea": (DeepSea, ("train",)),
}
NAMES = tuple(_CORES)  # 'brax:<name>' and 'playground:<name>' are valid names too.
PREFIXES = ("brax", "playground")  # Any other 'module:Class' names a class of the user.
_WRAPPED = ("train",)  # External environments have no held-out splits.
REQUIRED = inspect.Parameter.empty  # In place of the default of an option that must be given.


def create(name: str, *, split: str, height: int, width: int, history: int, **options: Any) -> Env:
    """Makes a batched environment with automatic resets, whose `reset` takes keys [B, 2].

    Args:
      name: One of `NAMES`, 'brax:<name>' for a registered Brax environment, 'playground:<name>' for
        one of MuJoCo Playground, if that is installed, or 'module:Class' for a class of the user,
        see `check_env` for its contract.
      split: One of `splits(name)`; it determines what `reset` samples and does not affect `step`.
      height: Height of the images in pixels; 0, with `width` 0, for no images. A wrapped
        environment without images has no instruction either, unless `options` gives one, so that
        its observation is 'proprio' only.
      width: Width of the images in pixels.
      history: Number K of frames in an observation, at least 1; 1 adds no axis.
      **options: Further arguments of the core environment.

    Raises:
      ValueError: The name, the split or an option is unknown, or a number is out of range.
    """
    if split not in splits(name):
        raise ValueError(f"split={split!r} is unknown; {name!r} has {splits(name)}.")
    if min(height, width) < 0 or (height == 0) != (width == 0):
        raise ValueError(
            f"height={height}, width={width}; give both in pixels, or 0 and 0 for no pixels."
        )
    if history < 1:
        raise ValueError(f"history={history} must be at least 1 frame.")
    env: Env = AutoReset(_core(name, split, pixels=height > 0, options=options))
    if height:
        env = Pixels(env, height=height, width=width)
    if history > 1:
        env = History(env, frames=history)
    return env


def splits(name: str) -> tuple[str, ...]:
    """Returns the splits of environment `name`, with the training split first.

    Raises:
      ValueError: There is no such environment; the message has the nearest name.
    """
    if name in _CORES:
        return _CORES[name][1]
    kind, _, wrapped = name.partition(":")
    if kind == "playground" and wrapped:
        return _WRAPPED
    if wrapped and kind not in PREFIXES:
        return tuple(getattr(_constructor(name), "SPLITS", _WRAPPED))
    known = (*NAMES, *(f"brax:{n}" for n in environment_names()))
    if name in known:
        return _WRAPPED
    raise ValueError(f"name={name!r} is no environment.{_nearest(name, known)}")


def unwrapped(env: Env) -> Env:
    """Returns the core environment, unbatched, of an environment that `create` made."""
    while isinstance(env, (AutoReset, Pixels, History)):
        env = env.env
    return env


def default_options(name: str, *, pixels: bool = True) -> dict[str, Any]:
    """Returns the options of an environment with their default values.

    Args:
      name: Name of the environment, see `create`.
      pixels: Whether the environment has images.

    Returns:
      The default by the name of the option; `REQUIRED` for an option without a default.

    Raises:
      ValueError: There is no such environment.
    """
    splits(name)  # Raises for an unknown name.
    kind, _, wrapped = name.partition(":")
    if wrapped and kind in PREFIXES:
        instruction = from_brax.INSTRUCTIONS.get(wrapped, "do the task") if pixels else None
        # The name determines the environment, and Playground's environments their physics.
        fixed = {"env", "backend"} if kind == "playground" else {"env"}
        return _parameters(FromBrax, fixed) | {"instruction": instruction}
    return _parameters(_constructor(name), {"split"})


def _core(name: str, split: str, *, pixels: bool, options: dict[str, Any]) -> Env:
    known = default_options(name, pixels=pixels)
    for option in options:
        if option not in known:
            raise ValueError(
                f"{option!r} is no option of {name!r}.{_nearest(option, tuple(known))}"
            )
    kind, _, wrapped = name.partition(":")
    if wrapped and kind in PREFIXES:
        env = from_brax.playground(wrapped) if kind == "playground" else wrapped
        return FromBrax(env, **({"instruction": known["instruction"]} | options))
    return _constructor(name)(**options, **({"split": split} if len(splits(name)) > 1 else {}))


def _constructor(name: str) -> Callable[..., Env]:
    """Returns the class or function of an environment in `NAMES`, or with a name 'module:Class'."""
    if name in _CORES:
        return _CORES[name][0]
    return cast(Callable[..., Env], import_object(name, "env.name"))


def _parameters(make: Callable[..., Env], fixed: set[str]) -> dict[str, Any]:
    """Returns the parameters of a function with their defaults, without those in `fixed`."""
    parameters = inspect.signature(make).parameters.values()
    return {x.name: x.default for x in parameters if x.name not in fixed}


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Valid ones are {known}."
