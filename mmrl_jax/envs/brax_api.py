"""The only module that imports Brax: should Brax stop being maintained, this is what to replace."""

import contextlib
import io
import warnings

# MuJoCo prints on every import that Warp, which nothing here uses, is not installed.
with contextlib.redirect_stdout(io.StringIO()):
    from brax.base import System
    import brax.envs
    from brax.envs import get_environment
    from brax.envs.base import Env, PipelineEnv, State, Wrapper
    from brax.io import mjcf

# Said once here and in the README, instead of whenever an environment is made.
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
    """Names of the registered environments, sorted."""
    return tuple(sorted(brax.envs._envs))
