"""The only module that imports Brax, so that it alone would change if Brax were replaced."""

from collections.abc import Callable
import contextlib
import functools
import io
from typing import Any
import warnings

import jax

# MuJoCo prints on every import that Warp, which this package does not use, is not installed.
with contextlib.redirect_stdout(io.StringIO()):
    from brax.base import System
    import brax.envs
    from brax.envs import get_environment
    from brax.envs.base import Env, PipelineEnv, State, Wrapper
    from brax.io import mjcf
    from mujoco import mjx

# The README states this once, so that no environment needs to warn again.
warnings.filterwarnings("ignore", message="Brax System, piplines and environments are not")

BACKENDS = ("generalized", "mjx", "positional", "spring")  # Brax's physics pipelines.

__all__ = [
    "BACKENDS",
    "Env",
    "PipelineEnv",
    "State",
    "System",
    "Wrapper",
    "environment_names",
    "get_environment",
    "mjcf",
]


def _on_own_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function (model, device, ...) of MJX with a device of this process as its default.

    Its own default is the first device of all processes, whose arrays only process 0 can read.
    """

    @functools.wraps(function)
    def wrapped(model: Any, device: Any = None, *arguments: Any, **options: Any) -> Any:
        if device is None and jax.process_count() > 1:
            device = jax.local_devices()[0]
        return function(model, device, *arguments, **options)

    return wrapped


mjx.put_model, mjx.make_data = map(_on_own_device, (mjx.put_model, mjx.make_data))


def environment_names() -> tuple[str, ...]:
    """Returns the names of the registered environments, sorted."""
    return tuple(sorted(brax.envs._envs))
