"""The only module that imports Brax, so that it alone would change if Brax were replaced."""

import contextlib
import io
import warnings

# MuJoCo prints on every import that Warp, which this package does not use, is not installed.
with contextlib.redirect_stdout(io.StringIO()):
    from brax.base import System
    import brax.envs
    from brax.envs import get_environment
    from brax.envs.base import Env, PipelineEnv, State, Wrapper
    from brax.io import mjcf

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


def environment_names() -> tuple[str, ...]:
    """Returns the names of the registered environments, sorted."""
    return tuple(sorted(brax.envs._envs))
