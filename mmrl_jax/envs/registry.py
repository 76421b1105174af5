"""Environments by name: the one place where core environments and wrappers are put together."""

from collections.abc import Callable
import difflib
import inspect
from typing import Any, cast

from mmrl_jax.config.loading import import_object
from mmrl_jax.envs import from_brax, language_grid, language_locomotion, language_reach
from mmrl_jax.envs.brax_api import Env, environment_names
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
}
NAMES = tuple(_CORES)  # And 'brax:<name>', 'playground:<name>'.
PREFIXES = ("brax", "playground")  # Any other 'module:Class' is an environment of the user's.
_WRAPPED = ("train",)  # An environment of someone else has no held-out cases.


def create(name: str, *, split: str, height: int, width: int, history: int, **options: Any) -> Env:
    """Makes a batched environment that resets itself: `reset` takes keys [B, 2].

    Args:
      name: one of `NAMES`, 'brax:<name>' for a registered Brax environment, 'playground:<name>'
        for one of MuJoCo Playground, if that is installed, or 'module:Class' for one of yours, see
        `check_env` for its contract.
      split: one of `splits(name)`; it decides what `reset` draws, and nothing about `step`.
      height: of the pixels; with `width` 0 for none. A wrapped environment without pixels has no
        instruction either, unless `options` gives one: its observation is 'proprio' alone.
      width: of the pixels.
      history: K, the frames that an observation holds; 1 adds no axis.
      **options: further arguments of the core environment.

    Raises:
      ValueError: the name, the split or an option is unknown, or a number is impossible.
    """
    if split not in splits(name):
        raise ValueError(f"split={split!r} is unknown; {name!r} has {splits(name)}.")
    if min(height, width) < 0 or (height == 0) != (width == 0):
        raise ValueError(
            f"height={height}, width={width}; give both in pixels, or 0 and 0 for no pixels."
        )
    if history < 1:
        raise ValueError(f"history={history}; give at least 1 frame.")
    env: Env = AutoReset(_core(name, split, pixels=height > 0, options=options))
    if height:
        env = Pixels(env, height=height, width=width)
    if history > 1:
        env = History(env, frames=history)
    return env


def splits(name: str) -> tuple[str, ...]:
    """The splits of environment `name`, the one to train on first.

    Raises:
      ValueError: there is no such environment; the message has the nearest name.
    """
    if name in _CORES:
        return _CORES[name][1]
    kind, _, wrapped = name.partition(":")
    if kind == "playground" and wrapped:
        return _WRAPPED
    if wrapped and kind not in PREFIXES:
        return tuple(getattr(_of_user(name), "SPLITS", _WRAPPED))
    known = (*NAMES, *(f"brax:{n}" for n in environment_names()))
    if name in known:
        return _WRAPPED
    raise ValueError(f"name={name!r} is no environment.{_nearest(name, known)}")


def unwrapped(env: Env) -> Env:
    """The core environment, of one episode, of one that `create` has made."""
    while isinstance(env, (AutoReset, Pixels, History)):
        env = env.env
    return env


def _core(name: str, split: str, *, pixels: bool, options: dict[str, Any]) -> Env:
    kind, _, wrapped = name.partition(":")
    if not wrapped:
        make, known = _CORES[name]
        _check_options(name, make, options, fixed=("split",))
        return make(**options, **({"split": split} if len(known) > 1 else {}))
    if kind not in PREFIXES:
        make, known = _of_user(name), splits(name)
        _check_options(name, make, options, fixed=("split",))
        return make(**options, **({"split": split} if len(known) > 1 else {}))
    # The name says which environment; Playground's brings its own physics.
    fixed = ("env", "backend") if kind == "playground" else ("env",)
    _check_options(name, FromBrax, options, fixed=fixed)
    instruction = from_brax.INSTRUCTIONS.get(wrapped, "do the task") if pixels else None
    env = from_brax.playground(wrapped) if kind == "playground" else wrapped
    return FromBrax(env, **({"instruction": instruction} | options))


def _of_user(name: str) -> Callable[..., Env]:
    """The class, or function, of an environment that is named 'module:Class'."""
    return cast(Callable[..., Env], import_object(name, "env.name"))


def _check_options(
    name: str, make: Callable[..., Env], options: dict[str, Any], *, fixed: tuple[str, ...]
) -> None:
    """Raises ValueError for an option that `make` does not have, or that is `fixed` by the name."""
    known = tuple(k for k in inspect.signature(make).parameters if k not in fixed)
    for option in options:
        if option not in known:
            raise ValueError(f"{option!r} is no option of {name!r}.{_nearest(option, known)}")


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" There are {known}."
