"""A renderer in pure JAX: scenes of geometric primitives to pixels, independent of environments."""

from mmrl_jax.rendering.camera import Camera, look_at, project
from mmrl_jax.rendering.raycast import depth_and_index, render
from mmrl_jax.rendering.scene import KINDS, Scene

__all__ = ["KINDS", "Camera", "Scene", "depth_and_index", "look_at", "project", "render"]
