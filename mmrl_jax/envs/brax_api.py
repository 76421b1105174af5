"""The only module that imports Brax: should Brax stop being maintained, this is what to replace."""

from brax.base import System
import brax.envs
from brax.envs import get_environment, register_environment
from brax.envs.base import Env, PipelineEnv, State, Wrapper
from brax.io import mjcf

__all__ = [
    "Env",
    "PipelineEnv",
    "State",
    "System",
    "Wrapper",
    "environment_names",
    "get_environment",
    "mjcf",
    "register_environment",
]


def environment_names() -> tuple[str, ...]:
    """Names of the registered environments, sorted."""
    return tuple(sorted(brax.envs._envs))
