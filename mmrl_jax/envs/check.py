"""Checks of the contract of an environment, which name a violation before anything compiles."""

from collections.abc import Callable
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.envs.brax_api import Env, State

LARGEST = 2**31 - 1  # Steps are counted in int32.
ACTION_KINDS = ("continuous", "discrete")


class InvalidEnvironment(ValueError):
    """An environment that violates the contract of `check_env`."""


def whole_number(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """Checks and returns an integer argument of an environment.

    Args:
      name: Name of the argument for the error message.
      value: Value of the argument.
      least: Smallest valid value.
      most: Largest valid value.

    Raises:
      ValueError: The value is not an integer in [least, most].
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be a whole number in {least}..{most}.")
    return int(value)


def check_env(env: Env, *, pixels: bool = False) -> State:
    """Checks the contract of an unbatched environment by shapes and dtypes, without running it.

    The environment has Brax's interface, `reset(key) -> State` and `step(state, action) -> State`.
    It has these attributes:

    - `action_kind`: 'continuous' for actions float32 [A] in [-1, 1], or 'discrete' for int32 [].
    - `action_size`: A, or the number of discrete actions.
    - `episode_length`: Maximum number of steps in an episode.
    - `vocabulary`: `Vocabulary` of the instructions, if there are any.
    - `scene(state)`: Scene and camera to render, for observations with pixels.

    Its states have these fields:

    - `obs`: Dict with 'proprio' float32 [P] and, if there are instructions, 'instruction'
      {'tokens': int32 [L], 'mask': bool [L]}.
    - `reward` and `done`: Numbers [], possibly int or bool.
    - `metrics`: Dict of numbers [], with 'success' if the task has a criterion of success.
    - `info`: Dict with 'truncation', which is 1 if a time limit and not the task ended the episode,
      and 'privileged', a dict of float32 vectors that a policy may learn to predict.

    Shapes and dtypes must be the same after `reset` and after `step`, except for the dtypes of
    reward, done and metrics, which `AutoReset` makes float32.

    Args:
      env: Unbatched environment without wrappers.
      pixels: Whether the environment will be rendered.

    Returns:
      Shapes and dtypes of its state after `reset`.

    Raises:
      InvalidEnvironment: The environment violates the contract; the message says where.
    """
    who = type(env).__name__
    for name in ("action_kind", "action_size", "episode_length", *(("scene",) if pixels else ())):
        if not hasattr(env, name):
            raise InvalidEnvironment(f"{who} has no {name!r}; see check_env for what it must have.")
    if env.action_kind not in ACTION_KINDS:
        raise InvalidEnvironment(
            f"{who}.action_kind is {env.action_kind!r}; make it one of {ACTION_KINDS}."
        )
    for name in ("action_size", "episode_length"):
        try:
            whole_number(f"{who}.{name}", getattr(env, name), 1)
        except ValueError as error:
            raise InvalidEnvironment(str(error)) from error
    state = _shapes(f"{who}.reset", env.reset, jax.eval_shape(lambda: jax.random.PRNGKey(0)))
    _check_state(f"{who}.reset", env, state)
    continuous, discrete = ((env.action_size,), jnp.float32), ((), jnp.int32)
    action = jax.ShapeDtypeStruct(*(continuous if env.action_kind == "continuous" else discrete))
    after = _shapes(f"{who}.step", env.step, jax.eval_shape(with_float_numbers, state), action)
    _check_state(f"{who}.step", env, after)
    before, after = (_shape_table(jax.eval_shape(with_float_numbers, x)) for x in (state, after))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise InvalidEnvironment(
                f"{who}: state.{name} is {before.get(name, 'absent')} after reset, but "
                f"{after.get(name, 'absent')} after step; make them the same."
            )
    return state


def check_started(state: State) -> None:
    """Checks the values of B environments that have just been reset.

    Args:
      state: State of the environments, with leaves [B, ...].

    Raises:
      InvalidEnvironment: An observation, privileged target, metric or reward is not finite, or an
        episode has ended before its first step.
    """
    numbers = {"obs": state.obs, "reward": state.reward, "metrics": state.metrics}
    numbers["info['privileged']"] = state.info["privileged"]
    for name, x in jax.device_get(_named(numbers)).items():
        nonfinite = sum(not np.isfinite(one).all() for one in x)
        if nonfinite:
            raise InvalidEnvironment(
                f"state.{name} is not finite after reset in {nonfinite} of {len(x)} environments; "
                "reset must return finite numbers."
            )
    ended = int(np.sum(jax.device_get(state.done) != 0))
    if ended:
        raise InvalidEnvironment(
            f"state.done is not 0 after reset in {ended} of {len(state.done)} environments; an "
            "episode must have at least one step."
        )


def with_float_numbers(state: State) -> State:
    """Casts the reward, done and metrics of a state, which may be of any dtype, to float32."""
    reward, done, metrics = jax.tree.map(
        lambda x: jnp.asarray(x).astype(jnp.float32), (state.reward, state.done, state.metrics)
    )
    return state.replace(reward=reward, done=done, metrics=metrics)


def _shapes(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:  # User code may raise any exception.
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InvalidEnvironment(
            f"{what} cannot be traced: {type(error).__name__}: {error} "
            f"({last.filename}:{last.lineno})."
        ) from error


def _check_state(what: str, env: Env, state: Any) -> None:
    """Raises InvalidEnvironment unless a state of shapes and dtypes satisfies the contract."""

    def need(valid: bool, name: str, actual: Any, expected: str) -> None:
        if not valid:
            raise InvalidEnvironment(f"{what} returns {name} {actual}; it must be {expected}.")

    need(isinstance(state, State), "a", type(state).__name__, "a State of brax.envs")
    obs, info = state.obs, state.info
    need(isinstance(obs, dict), "state.obs", _text(obs), "a dict with 'proprio'")
    need("proprio" in obs, "state.obs with", sorted(obs), "a dict with 'proprio'")
    proprio = obs["proprio"]
    need(
        _is(proprio, 1, jnp.float32), "state.obs['proprio']", _text(proprio), "a float32 vector [P]"
    )
    if "instruction" in obs:
        expected = "given with a 'vocabulary', an attribute, see instructions.Vocabulary"
        need(hasattr(env, "vocabulary"), "state.obs", "with an instruction", expected)
        words = obs["instruction"]
        valid = isinstance(words, dict) and words.keys() == {"tokens", "mask"}
        valid = valid and _is(words["tokens"], 1, jnp.int32) and _is(words["mask"], 1, jnp.bool_)
        expected = "{'tokens': int32 [L], 'mask': bool [L]}, see instructions.instruction"
        need(valid, "state.obs['instruction']", _text(words), expected)
    other = sorted(obs.keys() - {"proprio", "instruction"})
    need(not other, "state.obs with", other, "'proprio' and 'instruction' only")
    need(isinstance(state.metrics, dict), "state.metrics", _text(state.metrics), "a dict")
    numbers = {"reward": state.reward, "done": state.done}
    numbers |= {f"metrics[{name!r}]": x for name, x in state.metrics.items()}
    for name, x in numbers.items():
        need(_is_number(x), f"state.{name}", _text(x), "one number, of shape []")
    for name in ("truncation", "privileged"):
        need(name in info, "state.info with", sorted(info), f"a dict with {name!r}")
    need(
        _is_number(info["truncation"]), "info['truncation']", _text(info["truncation"]), "a number"
    )
    targets = info["privileged"]
    need(isinstance(targets, dict), "info['privileged']", _text(targets), "a dict of arrays")
    for name, x in targets.items():
        need(_is(x, 1, jnp.float32), f"info['privileged'][{name!r}]", _text(x), "a float32 vector")


def _is(x: Any, axes: int, dtype: Any) -> bool:
    return hasattr(x, "shape") and len(x.shape) == axes and x.dtype == dtype


def _is_number(x: Any) -> bool:
    return hasattr(x, "shape") and x.shape == ()


def _text(x: Any) -> str:
    """Returns the dtypes and shapes of a leaf or a tree as text."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype} {list(leaf.shape)}", x))


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a dict of trees by their paths, e.g. "obs['proprio']"."""
    return {
        f"{name}{jax.tree_util.keystr(path)}": leaf
        for name, part in tree.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(part)
    }


def _shape_table(state: State) -> dict[str, str]:
    """Returns dtypes and shapes of all leaves of a state as text, by their paths."""
    parts = ("pipeline_state", "obs", "reward", "done", "metrics", "info")
    return {name: _text(x) for name, x in _named({n: getattr(state, n) for n in parts}).items()}
