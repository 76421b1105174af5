"""Environments with Brax's own interface, pixels and instructions; see `create`."""

from mmrl_jax.envs.registry import NAMES, create, splits

__all__ = ["NAMES", "create", "splits"]
