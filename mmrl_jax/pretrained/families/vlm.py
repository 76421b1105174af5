"""Vision-language models: Idefics3, SmolVLM, PaliGemma, LLaVA and LLaVA-OneVision."""

from collections.abc import Callable, Collection, Mapping
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.tiles import AnyresTiles, AnyresVision, TiledVision, Tiles
from mmrl_jax.models.towers import VisionTower
from mmrl_jax.models.transformer import Remat
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained.families import decoders, encoders
from mmrl_jax.pretrained.families.config_keys import ACTIVATIONS


class Recipe(NamedTuple):
    """A model without its parameters, and how to load them.

    Attributes:
      model: Linen module.
      keys: Key map from the hub's module names to module paths, see `weights.counterparts`.
      images: Shapes and dtypes of the images of one sample.
      ignored: Patterns of the hub's tensors that the model does not use.
    """

    model: VisionLanguageModel
    keys: dict[str, str]
    images: Any
    ignored: tuple[str, ...] = ()


def idefics3(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Recipe:
    """SigLIP, one dense layer on squares of its tokens, and Llama (Laurencon et al., 2024)."""
    tower = _tower(config, dtype, remat)
    vision = TiledVision(
        tower, config["text_config"]["hidden_size"], shuffle=config["scale_factor"], bias=False
    )
    model = VisionLanguageModel(vision, _language(config, dtype, remat), config["image_token_id"])
    keys = (
        _under("vision/tower", encoders.vision_keys("model.vision_model."))
        | {"model.connector.modality_projection.proj": "vision/projector"}
        | _language_keys(config, "model.text_model.", "lm_head.weight")
    )
    return Recipe(model, keys, _images(tower))


def paligemma(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Recipe:
    """SigLIP, one dense layer, and Gemma 1 or 2 with bidirectional prompts (Beyer et al., 2024).

    The embeddings of tokens are scaled, but the image features are not.
    """
    tower = _tower(config, dtype, remat)
    vision = TiledVision(tower, config["text_config"]["hidden_size"])
    language, token = _language(config, dtype, remat), config["image_token_index"]
    model = VisionLanguageModel(vision, language, token, prefix_lm=True)
    prefix = _tower_prefix(names)
    keys = (
        _under("vision/tower", encoders.vision_keys(prefix))
        | {"multi_modal_projector.linear": "vision/projector"}
        | _language_keys(config, "language_model.model.", "language_model.lm_head.weight")
    )
    return Recipe(model, keys, _images(tower), (re.escape(prefix) + r"head\..*",))


def llava(
    config: Mapping[str, Any],
    names: Collection[str],
    dtype: jnp.dtype,
    remat: Remat,
    path: str = "vision",
) -> Recipe:
    """CLIP or SigLIP up to one of its blocks, two dense layers, and a decoder (Liu et al., 2024).

    Args:
      config: Config of the model in the hub's format.
      names: Names of the hub's tensors.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      path: Module path of the tower and its projector.

    Raises:
      ValueError: The features are those of several layers or of a layer that does not exist, or the
        selection strategy is unknown.
    """
    layer, layers = config["vision_feature_layer"], config["vision_config"]["num_hidden_layers"]
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer} is not supported; it must be an integer.")
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"vision_feature_layer={layer} is beyond the tower's {layers} layers.")
    strategy = config["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} is neither 'default' nor 'full'."
        )
    # Layer 0 is the input of the first block, and -1 the output of the last.
    used = layer if layer >= 0 else layers + 1 + layer
    tower = _tower(config, dtype, remat).clone(layers=used, norm_tokens=False)
    vision = TiledVision(
        tower,
        config["text_config"]["hidden_size"],
        skip=int(strategy == "default"),
        activation=ACTIVATIONS[config["projector_hidden_act"]],
        bias=config["multimodal_projector_bias"],
    )
    language, token = _language(config, dtype, remat), config["image_token_index"]
    prefix = _tower_prefix(names)
    keys = (
        _under(f"{path}/tower", encoders.vision_keys(prefix))
        | {
            "multi_modal_projector.linear_1": f"{path}/projector",
            "multi_modal_projector.linear_2": f"{path}/projector_out",
        }
        | _language_keys(config, "language_model.model.", "language_model.lm_head.weight")
    )
    unused = [f"encoder.layers.{i}." for i in range(used, layers)]
    ignored = tuple(
        re.escape(prefix + name) + ".*" for name in ("head.", "post_layernorm.", *unused)
    )
    return Recipe(VisionLanguageModel(vision, language, token), keys, _images(tower), ignored)


def llava_onevision(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: Remat
) -> Recipe:
    """LLaVA with features of the whole image and of its tiles (Li et al., 2024, LLaVA-OneVision).

    Raises:
      ValueError: The config is not supported, see `llava` and `most_tiles`.
    """
    most = most_tiles(config["vision_aspect_ratio"])
    tiled = llava(config, names, dtype, remat, "vision/tiles")
    tiles: Any = tiled.model.vision
    vision = AnyresVision(tiles, most)

    def image(tile: Tiles) -> AnyresTiles:
        edge = tile.pixels.shape[2]
        return AnyresTiles(tile.pixels[:, None], tile.present, (edge, edge), (0, 0))

    return tiled._replace(
        model=tiled.model.clone(vision=vision),
        keys=tiled.keys | {"image_newline": "vision/newline"},
        images=jax.eval_shape(image, tiled.images),
    )


def most_tiles(ratio: str) -> int:
    """Returns N of LLaVA-OneVision's `vision_aspect_ratio`, 'anyres_max_N'.

    Raises:
      ValueError: Tiles are combined in an unsupported way.
    """
    match = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if match is None:
        raise ValueError(f"vision_aspect_ratio={ratio!r} is not supported; use 'anyres_max_N'.")
    return int(match[1])


FAMILIES: dict[str, Callable[[Mapping[str, Any], Collection[str], jnp.dtype, Remat], Recipe]] = {
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "paligemma": paligemma,
    "llava": llava,
    "llava_onevision": llava_onevision,
}


def _tower(config: Mapping[str, Any], dtype: jnp.dtype, remat: Remat) -> VisionTower:
    vision = config["vision_config"]
    tower = encoders.build_vision(vision, projection=None, dtype=dtype, remat=remat)
    return tower.clone(pool=None)


def _language(config: Mapping[str, Any], dtype: jnp.dtype, remat: Remat) -> LanguageModel:
    # The config of the whole model determines whether the output layer is tied.
    text = config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}
    return decoders.build(text, dtype=dtype, remat=remat)


def _language_keys(config: Mapping[str, Any], prefix: str, head: str) -> dict[str, str]:
    kind = config["text_config"]["model_type"]
    return _under("language", decoders.keys(kind, prefix, head))


def _under(module: str, keys: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{module}/{path}" for name, path in keys.items()}


def _tower_prefix(names: Collection[str]) -> str:
    """Returns the prefix of a tower's tensors, which transformers 5 shortened."""
    old = "vision_tower.vision_model."
    return old if any(name.startswith(old) for name in names) else "vision_tower."


def _images(tower: VisionTower) -> Any:
    edge = tower.patch * round(tower.patches**0.5)
    return jax.eval_shape(
        lambda: Tiles(jnp.zeros((1, 1, edge, edge, 3)), jnp.ones((1, 1), jnp.bool_))
    )
