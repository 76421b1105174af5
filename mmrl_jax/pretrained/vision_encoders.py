"""Pretrained vision towers as the image encoders of policies."""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Any, cast

import jax.numpy as jnp
from jax.sharding import Mesh

from mmrl_jax.distributed import partition
from mmrl_jax.models.dinov2 import DinoTower
from mmrl_jax.models.towers import ResizingVisionTower, VisionTower
from mmrl_jax.models.transformer import Remat
from mmrl_jax.pretrained import bundled_weights, hub, processor_files

DINOV2 = "dinov2"


def directory_of(encoder: str) -> pathlib.Path:
    """Returns the directory of an encoder, given as 'dinov2' or as a directory.

    Raises:
      ValueError: The packages with DINOv2's weights are not installed.
    """
    if encoder != DINOV2:
        return pathlib.Path(encoder)
    try:
        return bundled_weights.dinov2()
    except ImportError as error:
        raise ValueError(str(error)) from error


@functools.lru_cache(maxsize=4)  # A run builds its network several times.
def read_encoder(
    encoder: str, size: int | None, *, dtype: jnp.dtype, remat: Remat
) -> ResizingVisionTower:
    """Reads a vision tower without its parameters.

    Args:
      encoder: 'dinov2', or a local directory in the hub's format, see `hub.load_vision_tower`.
      size: Edge in pixels of the square to which images are resized; None for the edge that the
        tower was trained with, or for DINOv2 that of its image processor.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.

    Returns:
      A module from images uint8 [B, H, W, 3] to features [B, patches, E].

    Raises:
      ValueError: The tower or its image processor cannot be read, or it does not take images of
        this size; see `hub.read_blueprint` and `processor_files.read_image_processor`.
    """
    directory = directory_of(encoder)
    plan = hub.read_blueprint("vision_tower", directory, dtype=dtype, remat=remat)
    image = processor_files.read_image_processor(directory, plan.config["model_type"])
    tower = cast(VisionTower, plan.model).clone(pool=None, projection=None)
    own = tower.patch * round(tower.patches**0.5)
    edge = size or (_processor_edge(image) if isinstance(tower, DinoTower) else own)
    if not isinstance(tower, DinoTower) and edge != own:
        raise ValueError(
            f"model.vision_size={size}, but this encoder takes images of {own}x{own} pixels only; "
            "set it to None."
        )
    if edge % tower.patch:
        raise ValueError(
            f"Images of {edge}x{edge} pixels are not divisible into patches of {tower.patch}; set "
            f"model.vision_size to a multiple of {tower.patch}."
        )
    return ResizingVisionTower(tower, *processor_files.mean_and_std(image), edge)


def features(encoder: ResizingVisionTower) -> int:
    """Returns the number of features of an image."""
    return (encoder.edge // encoder.tower.patch) ** 2


def read_params(
    encoder: str,
    *,
    mesh: Mesh | None = None,
    param_dtype: Callable[[str], jnp.dtype] | None = None,
) -> dict[str, Any]:
    """Reads the parameters of `read_encoder`.

    Args:
      encoder: 'dinov2', or a local directory in the hub's format.
      mesh: Mesh over which the parameters are distributed; None for the default device.
      param_dtype: Path of a parameter, e.g. 'tower/norm/scale', to the dtype that it is stored in;
        None for float32.

    Raises:
      ValueError: The tower cannot be loaded, see `hub.load_vision_tower`.
    """
    loaded = hub.load(
        "vision_tower",
        directory_of(encoder),
        dtype=jnp.float32,
        remat=False,
        mesh=mesh,
        rules=partition.RULES,
        param_dtype=param_dtype and (lambda name: param_dtype(f"tower/{name}")),
    )
    unused = ("head", "projection")
    if not cast(VisionTower, loaded.model).norm_tokens:
        unused += ("norm",)
    return {"tower": {n: x for n, x in loaded.params["params"].items() if n not in unused}}


def _processor_edge(image: Mapping[str, Any]) -> int:
    """Returns the edge in pixels of the images that an image processor makes."""
    edges = set((image["crop_size"] if image["do_center_crop"] else image["size"]).values())
    if len(edges) > 1:
        raise ValueError(
            f"preprocessor_config.json: images of {sorted(edges)} pixels are not square; set "
            "model.vision_size to the edge of a square."
        )
    return edges.pop()
