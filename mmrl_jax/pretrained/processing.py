"""Images and prompts as the processors of model families prepare them; images inside `jit`.

prompt, with a mark for each image      "<image> How many red balls?"
expanded, with a mark for each feature  "<image><image><image><image> How many red balls?"
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.tiles import AnyresTiles, Tiles, anyres_features
from mmrl_jax.models.vlm import check_counts
from mmrl_jax.pretrained import hub, processor_files
from mmrl_jax.pretrained.families import vlm

Size = tuple[int, int]  # Height and width in pixels.


class Plan(NamedTuple):
    """How an image is resized and split.

    Attributes:
      size: Original size of the image.
      resizes: Sizes to which the image is resized, one after another.
      tile: Size of a tile. Without rows there is a single tile; otherwise the image is split into
        rows and columns of tiles, and the whole image is one more tile.
      rows: Number of rows of tiles; 0 for a single tile.
      columns: Number of columns of tiles; 0 for a single tile.
    """

    size: Size
    resizes: tuple[Size, ...]
    tile: Size
    rows: int = 0
    columns: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of tiles."""
        return self.rows, self.columns


def resize(images: jax.Array, size: Size, method: str) -> jax.Array:
    """Resizes images as PIL does, which resizes rows first and rounds before it resizes columns.

    Args:
      images: Images with integer values in [0, 255], float [B, H, W, C].
      size: New height and width in pixels.
      method: Interpolation, see `jax.image.resize`.

    Returns:
      Resized images with integer values in [0, 255], float [B, *size, C].
    """
    for axis, length in ((2, size[1]), (1, size[0])):
        if images.shape[axis] != length:
            shape = (*images.shape[:axis], length, *images.shape[axis + 1 :])
            images = jax.image.resize(images, shape, method, antialias=True)
            images = jnp.clip(jnp.floor(images + 0.5), 0, 255)
    return images


def crop_tiles(images: jax.Array, plan: Plan) -> jax.Array:
    """Splits images [B, rows * h, columns * w, 3] into tiles [B, rows * columns, h, w, 3]."""
    height, width = plan.tile
    x = images.reshape(-1, plan.rows, height, plan.columns, width, 3)
    return jnp.swapaxes(x, 2, 3).reshape(-1, plan.rows * plan.columns, height, width, 3)


def tiles(images: jax.Array, plan: Plan, config: Mapping[str, Any]) -> jax.Array:
    """Splits images [B, H, W, 3] into tiles [B, N, h, w, 3].

    With rows, these are the tiles of the grid and then the whole image, which is resized from the
    same image as the grid. Otherwise it is one tile, the center of the resized image.
    """
    method = processor_files.METHODS[config["resample"]]
    for size in plan.resizes:
        images = resize(images, size, method)
    height, width = plan.tile
    if not plan.rows:
        top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
        return images[:, None, top : top + height, left : left + width]
    return jnp.concatenate(
        [crop_tiles(images, plan), resize(images, plan.tile, method)[:, None]], axis=1
    )


def pad(images: jax.Array, size: Size, color: Sequence[float]) -> jax.Array:
    """Centers images [B, H, W, 3] on a canvas; an odd margin is smaller above and to the left."""
    height, width = images.shape[1:3]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = jnp.broadcast_to(jnp.asarray(color, images.dtype), (len(images), *size, 3))
    return canvas.at[:, top : top + height, left : left + width].set(images)


def anyres_tiles(images: jax.Array, plan: Plan, config: Mapping[str, Any]) -> jax.Array:
    """Splits images [B, H, W, 3] into tiles [B, N, h, w, 3]: the whole image, then a grid, if any.

    The grid is cut from a black canvas. Without a grid, the whole image keeps its aspect ratio on a
    square of the mean color, as in LLaVA-OneVision.
    """
    method = processor_files.METHODS[config["resample"]]
    if not plan.rows:
        edge = max(plan.size)
        images = pad(images, (edge, edge), [int(mean * 255) for mean in config["image_mean"]])
        return resize(images, plan.tile, method)[:, None]
    (size,), (height, width) = plan.resizes, plan.tile
    grid = pad(resize(images, size, method), (plan.rows * height, plan.columns * width), (0, 0, 0))
    whole = resize(images, plan.tile, method)
    return jnp.concatenate([whole[:, None], crop_tiles(grid, plan)], axis=1)


def pack(x: jax.Array, present: jax.Array, plan: Plan) -> Tiles:
    """Concatenates the tiles of the images of a sample.

    Args:
      x: Tiles, float [B, I, N, h, w, 3].
      present: Which images are not padding, bool [B, I].
      plan: How the images were split.

    Returns:
      Tiles [B, I * N, h, w, 3] with their mask [B, I * N].
    """
    present = jnp.repeat(present, x.shape[2], axis=1)
    return Tiles(x.reshape(len(x), -1, *x.shape[3:]), present)


class Family(NamedTuple):
    """The behavior of a family's processor.

    Attributes:
      plan: Function of (image processor's config, size of an image, maximum number of images in a
        sample) that returns how an image is resized and split.
      expand: Function of (processor's config, image processor's config, plan, mark of an image)
        that returns the text that replaces the mark.
      complete: Function of (tokenizer, prompt with marks, mark) that returns the prompt with the
        family's additions.
      special: Whether the tokenizer adds its special tokens around the text.
      tiles: Function of (images, plan, image processor's config) that returns tiles.
      pack: Function of (tiles [B, I, N, h, w, 3], mask bool [B, I], plan) that returns the inputs
        of the vision model.
      features: Function of (vision model, plan) that returns the number of features of an image.
    """

    plan: Callable[[Mapping[str, Any], Size, int], Plan]
    expand: Callable[[Mapping[str, Any], Mapping[str, Any], Plan, str], str]
    complete: Callable[[Any, str, str], str] = lambda tokenizer, text, mark: text
    special: bool = True
    tiles: Callable[[jax.Array, Plan, Mapping[str, Any]], jax.Array] = tiles
    pack: Callable[[jax.Array, jax.Array, Plan], Tiles | AnyresTiles] = pack
    features: Callable[[Any, Plan], int] = lambda vision, plan: (
        (plan.rows * plan.columns + 1) * vision.features_per_tile()
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Prepares the inputs of a model.

    Attributes:
      tokenizer: Tokenizer of transformers, with the chat template.
      mark: Text of the image token, which represents an image in a prompt.
      vision: Vision model without parameters, which computes its number of features.
      family: Behavior of the family's processor.
      config: Config of the processor, see `ProcessorFiles`.
      image: Config of the image processor, see `ProcessorFiles`.
    """

    tokenizer: Any
    mark: str
    vision: Any
    family: Family
    config: Mapping[str, Any]
    image: Mapping[str, Any]

    def whole(self) -> "Processor":
        """Returns a processor that uses a single tile for a sample with one image.

        Processors that split images would enlarge a small image and split it into many tiles, which
        have no further detail and cost as much each.
        """
        image = dict(self.image)
        if "max_image_size" in image:
            image["size"] = image["max_image_size"]
        if "image_grid_pinpoints" in image:
            image["image_grid_pinpoints"] = []
        return dataclasses.replace(self, image=image)

    def image_tokens(self, size: Size, images: int) -> int:
        """Returns the number of image tokens of each image.

        Args:
          size: Height and width of the images in pixels.
          images: Maximum number of images in a sample.
        """
        return self.family.features(self.vision, self.family.plan(self.image, size, images))

    def pixels(self, images: jax.Array, present: jax.Array | None = None) -> Tiles | AnyresTiles:
        """Prepares images for the vision model; a pure function.

        Args:
          images: Images, uint8 [B, I, H, W, 3]. LLaVA-OneVision splits them only if I is 1.
          present: Which images are not padding, bool [B, I]; None for no padding.

        Raises:
          ValueError: The images are not uint8.
        """
        if images.dtype != jnp.uint8:
            raise ValueError(f"Images are {images.dtype}, but must be uint8 in 0..255.")
        batch, count, height, width, _ = images.shape
        x = images.reshape(-1, height, width, 3).astype(jnp.float32)
        plan = self.family.plan(self.image, (height, width), count)
        x = self.family.tiles(x, plan, self.image)
        mean, std = (np.asarray(x, np.float32) for x in processor_files.mean_and_std(self.image))
        x = (x / 255 - mean) / std
        if present is None:
            present = jnp.ones((batch, count), bool)
        return self.family.pack(x.reshape(batch, count, *x.shape[1:]), present, plan)

    def prompts(
        self,
        texts: Sequence[str],
        present: np.ndarray,
        size: Size,
        *,
        length: int | None,
        side: Literal["left", "right"],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes prompts to ids int32 [B, length] and a mask bool [B, length] without padding.

        Args:
          texts: B prompts with a mark for each image.
          present: Which of I images each sample has, bool [B, I].
          size: Height and width of the images in pixels.
          length: Number of tokens including padding; None for that of the longest prompt.
          side: Side of the padding.

        Raises:
          ValueError: Marks and images, or image tokens and features disagree. Or a prompt is too
            long, since truncation might remove image tokens. Or LLaVA-OneVision has one image in
            some prompts and several in others, which it processes differently.
        """
        plan = self.family.plan(self.image, size, present.shape[1])
        expanded = self.family.expand(self.config, self.image, plan, self.mark)
        rows = []
        for i, text in enumerate(texts):
            count = int(np.sum(present[i]))
            if text.count(self.mark) != count:
                raise ValueError(
                    f"Prompt {i} has {text.count(self.mark)} marks {self.mark!r}, but "
                    f"{count} images."
                )
            if count and self.family.plan(self.image, size, count) != plan:
                raise ValueError(
                    f"Prompt {i} has {count} of at most {present.shape[1]} images, but this model "
                    "processes a single image differently from several: put prompts with one image "
                    "into separate batches, present [B, 1]."
                )
            text = self.family.complete(self.tokenizer, text, self.mark)
            text = text.replace(self.mark, expanded)
            rows.append(self.tokenizer(text, add_special_tokens=self.family.special)["input_ids"])
            if length is not None and len(rows[i]) > length:
                raise ValueError(
                    f"Prompt {i} has {len(rows[i])} tokens, more than length={length}."
                )
        length = max(map(len, rows)) if length is None else length
        pad = self.tokenizer.pad_token_id or 0  # Any id, since the mask marks padding.
        tokens = np.full((len(rows), length), pad, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, ids in enumerate(rows):
            span = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
            tokens[i, span], mask[i, span] = ids, True
        features = self.image_tokens(size, present.shape[1])
        is_image = tokens == self.tokenizer.convert_tokens_to_ids(self.mark)
        check_counts(is_image, np.repeat(present, features, axis=1))
        return tokens, mask


def whole(config: Mapping[str, Any], size: Size, images: int) -> Plan:
    """Plan of the processors of CLIP and SigLIP: resize, and crop the center if configured.

    Raises:
      ValueError: The crop is larger than the resized image.
    """
    target = config["size"]
    if "shortest_edge" in target:
        edge, (height, width) = target["shortest_edge"], size
        long = int(edge * max(size) / min(size))
        resized = (edge, long) if height < width else (long, edge)
    else:
        resized = target["height"], target["width"]
    tile = resized
    if config.get("do_center_crop"):
        tile = config["crop_size"]["height"], config["crop_size"]["width"]
        if tile[0] > resized[0] or tile[1] > resized[1]:
            raise ValueError(f"crop_size={tile} is larger than an image resized to {resized}.")
    return Plan(size, (resized,), tile)


def split(config: Mapping[str, Any], size: Size, images: int) -> Plan:
    """Plan of Idefics3 and SmolVLM: scale to a longest edge, then to a multiple of the tile."""
    edge = config["max_image_size"]["longest_edge"]
    height, width = scaled(size, config["size"]["longest_edge"])
    if not config["do_image_splitting"]:
        return Plan(size, ((height, width), (edge, edge)), (edge, edge))
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / edge)
        rows = math.ceil(int(columns * edge / ratio) / edge)
    else:
        rows = math.ceil(height / edge)
        columns = math.ceil(int(rows * edge * ratio) / edge)
    resizes = ((height, width), (rows * edge, columns * edge))
    if rows == columns == 1:
        return Plan(size, resizes, (edge, edge))
    return Plan(size, resizes, (edge, edge), rows, columns)


def scaled(size: Size, longest: int) -> Size:
    """Returns the size scaled to a longest edge of `longest`, with an even other edge."""
    height, width = size
    ratio = width / height
    if width >= height:
        height, width = int(longest / ratio), longest
        return max(height + height % 2, 1), width
    height, width = longest, int(longest * ratio)
    return height, max(width + width % 2, 1)


def anyres(config: Mapping[str, Any], size: Size, images: int) -> Plan:
    """Plan of LLaVA-OneVision, which splits a single image into a grid of tiles, but not several.

    The grid is the pinpoint that preserves most pixels of the image, and the smallest among those.
    Without pinpoints there is no grid.
    """
    (height, width), tile = size, (config["size"]["height"], config["size"]["width"])
    if images > 1 or not config["image_grid_pinpoints"]:
        edge = max(size)
        return Plan(size, ((height * tile[0] // edge, width * tile[1] // edge),), tile)

    def score(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - canvas[0] * canvas[1]

    rows, columns = max(config["image_grid_pinpoints"], key=score)
    scale_y, scale_x = rows / height, columns / width
    if scale_x < scale_y:
        fitted = min(math.ceil(height * scale_x), rows), columns
    else:
        fitted = rows, min(math.ceil(width * scale_y), columns)
    return Plan(size, (fitted,), tile, rows // tile[0], columns // tile[1])


def rows_and_whole(plan: Plan, words: str) -> str:
    """Returns Idefics3's text of an image: the tiles in row-major order, then the whole image."""
    fake, text = "<fake_token_around_image>", ""
    for row in range(plan.rows):
        for column in range(plan.columns):
            text += f"{fake}<row_{row + 1}_col_{column + 1}>{words}"
        text += "\n"
    if text:
        text += "\n"
    return f"{text}{fake}<global-img>{words}{fake}"


def _with_start(tokenizer: Any, text: str, mark: str) -> str:
    """Returns PaliGemma's prompt: image tokens, the start token, the words and a line break."""
    end = text.rfind(mark) + len(mark) if mark in text else 0
    return f"{text[:end]}{tokenizer.bos_token}{text[end:]}\n"


def _llava_tokens(config: Mapping[str, Any], tile: Size) -> int:
    patch = config["patch_size"]
    count = (tile[0] // patch) * (tile[1] // patch) + config["num_additional_image_tokens"]
    return count - int(config["vision_feature_select_strategy"] == "default")


def _anyres_tokens(config: Mapping[str, Any], plan: Plan) -> int:
    whole = config["num_image_tokens"] - int(config["vision_feature_select_strategy"] == "default")
    most = vlm.most_tiles(config["vision_aspect_ratio"])
    return anyres_features(plan.size, plan.grid, whole, most)


IDEFICS3 = Family(
    plan=split,
    expand=lambda config, image, plan, mark: rows_and_whole(plan, mark * config["image_seq_len"]),
)
FAMILIES = {
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "paligemma": Family(
        plan=whole,
        expand=lambda config, image, plan, mark: mark * image["image_seq_length"],
        complete=_with_start,
        special=False,
    ),
    "llava": Family(
        plan=whole,
        expand=lambda config, image, plan, mark: mark * _llava_tokens(config, plan.tile),
    ),
    "llava_onevision": Family(
        plan=anyres,
        expand=lambda config, image, plan, mark: mark * _anyres_tokens(config, plan),
        tiles=anyres_tiles,
        pack=lambda x, present, plan: AnyresTiles(x, present, plan.size, plan.grid),
        features=lambda vision, plan: vision.features_per_image(plan.size, plan.grid),
    ),
}


def load_processor(directory: str | pathlib.Path) -> Processor:
    """Loads the processor of a vision-language model of one of `FAMILIES`.

    Args:
      directory: Local directory in the hub's format, with the configs of model and processor and
        the tokenizer.

    Raises:
      ValueError: The family is not supported, tokenizer and config disagree about the image token,
        or the files are damaged or unsupported, see `processor_files.read`.
    """
    model_config = hub.read_config(directory)
    kind = model_config["model_type"]
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} is not supported; supported are {list(FAMILIES)}.")
    tokenizer, config, image = processor_files.read(directory, kind)
    mark = getattr(tokenizer, "image_token", config.get("image_token", "<image>"))
    model = vlm.FAMILIES[kind](model_config, (), jnp.float32, False).model
    token = tokenizer.convert_tokens_to_ids(mark)
    if token != model.image_token:
        raise ValueError(f"{mark!r} is token {token}, but the model's is {model.image_token}.")
    return Processor(tokenizer, mark, model.vision, FAMILIES[kind], config, image)
