"""Configs: their keys, checks, files and JSON, independent of the meaning of the keys."""

from mmrl_jax.config.loading import (
    describe_failure,
    load_config,
    load_module,
    validate_overrides,
)
from mmrl_jax.config.schema import ConfigDict, ConfigLike, flatten, nearest
from mmrl_jax.config.storage import diff_configs, from_json, to_json

__all__ = [
    "ConfigDict",
    "ConfigLike",
    "describe_failure",
    "diff_configs",
    "flatten",
    "from_json",
    "load_config",
    "load_module",
    "nearest",
    "to_json",
    "validate_overrides",
]
