"""Environments with Brax's interface, pixels and instructions, which `create` makes by name."""

from mmrl_jax.envs.check import InvalidEnvironment, check_env, check_started
from mmrl_jax.envs.registry import (
    NAMES,
    PREFIXES,
    REQUIRED,
    create,
    default_options,
    splits,
    unwrapped,
)

__all__ = [
    "NAMES",
    "PREFIXES",
    "REQUIRED",
    "InvalidEnvironment",
    "check_env",
    "check_started",
    "create",
    "default_options",
    "splits",
    "unwrapped",
]
