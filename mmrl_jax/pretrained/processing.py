"""Images and prompts as a family's own processor makes them; images inside `jit`.

prompt, with a mark for every image     "<image> How many red balls?"
expanded, a mark for every feature      "<image><image><image><image> How many red balls?"
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

Size = tuple[int, int]  # Height and width, pixels.


class Plan(NamedTuple):
    """What becomes of an image.

    Attributes:
      size: its own.
      resizes: sizes that it takes one after the other.
      tile: size of a tile: where there are no rows, it is the only one; else the image is cut into
        rows and columns of tiles, and comes once more as a whole, resized to a tile of its own.
      rows: of tiles.
      columns: of tiles.
    """

    size: Size
    resizes: tuple[Size, ...]
    tile: Size
    rows: int = 0
    columns: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns


def resize(images: jax.Array, size: Size, method: str) -> jax.Array:
    """Resizes float [B, H, W, C] of whole numbers in [0, 255], as PIL does.

    PIL resizes rows first and rounds what it gets before it turns to columns.
    """
    for axis, length in ((2, size[1]), (1, size[0])):
        if images.shape[axis] != length:
            shape = (*images.shape[:axis], length, *images.shape[axis + 1 :])
            images = jax.image.resize(images, shape, method, antialias=True)
            images = jnp.clip(jnp.floor(images + 0.5), 0, 255)
    return images


def crop_tiles(images: jax.Array, plan: Plan) -> jax.Array:
    """Tiles [B, rows * columns, h, w, 3], row by row, of images [B, rows * h, columns * w, 3]."""
    height, width = plan.tile
    x = images.reshape(-1, plan.rows, height, plan.columns, width, 3)
    return jnp.swapaxes(x, 2, 3).reshape(-1, plan.rows * plan.columns, height, width, 3)


def tiles(images: jax.Array, plan: Plan, config: Mapping[str, Any]) -> jax.Array:
    """Tiles [B, N, h, w, 3] of images [B, H, W, 3]: rows of tiles, then the whole; or the center.

    The whole is made of what the tiles are cut from.
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
    """Puts images [B, H, W, 3] into the middle of a canvas; where that is odd, above and left."""
    height, width = images.shape[1:3]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = jnp.broadcast_to(jnp.asarray(color, images.dtype), (len(images), *size, 3))
    return canvas.at[:, top : top + height, left : left + width].set(images)


def anyres_tiles(images: jax.Array, plan: Plan, config: Mapping[str, Any]) -> jax.Array:
    """Tiles [B, N, h, w, 3] of images [B, H, W, 3]: the whole, then rows of tiles, if any.

    Tiles are cut from a black canvas. Without them the whole keeps its proportions, on a square of
    the mean color, as LLaVA-OneVision has it.
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
    """Tiles [B, I * N, h, w, 3] of images in tiles [B, I, N, h, w, 3], present [B, I]."""
    present = jnp.repeat(present, x.shape[2], axis=1)
    return Tiles(x.reshape(len(x), -1, *x.shape[3:]), present)


class Family(NamedTuple):
    """How a family's processor works.

    Attributes:
      plan: (config of the image processor, size of an image, the most images of a sample) -> what
        becomes of it.
      expand: (config of the processor, of the image processor, a plan, the mark of an image) ->
        what the mark becomes.
      complete: (tokenizer, prompt with marks) -> the prompt with the family's own additions.
      special: the tokenizer adds what it puts around any text.
      tiles: (images, a plan, config of the image processor) -> tiles.
      pack: (tiles [B, I, N, h, w, 3], present [B, I], a plan) -> what the vision model takes.
      features: (the vision model, a plan) -> features of an image.
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
    """Makes a model's inputs.

    Attributes:
      tokenizer: transformers'; it knows the chat template.
      mark: stands for an image in a prompt, and is the image token's text.
      vision: the vision model, without its parameters; it knows the number of its features.
      family: how its family works.
      config: the processor's, see `ProcessorFiles`.
      image: the image processor's, see there.
    """

    tokenizer: Any
    mark: str
    vision: Any
    family: Family
    config: Mapping[str, Any]
    image: Mapping[str, Any]

    def whole(self) -> "Processor":
        """One that sees a lone image as a single tile.

        Those that cut images would enlarge a small picture and cut it into many tiles, which show
        nothing more of it and cost as much each.
        """
        image = dict(self.image)
        if "max_image_size" in image:
            image["size"] = image["max_image_size"]
        if "image_grid_pinpoints" in image:
            image["image_grid_pinpoints"] = []
        return dataclasses.replace(self, image=image)

    def image_tokens(self, size: Size, images: int) -> int:
        """How many each image has, where the most images of a sample are so many, of this size."""
        return self.family.features(self.vision, self.family.plan(self.image, size, images))

    def pixels(self, images: jax.Array, present: jax.Array | None = None) -> Tiles | AnyresTiles:
        """Tiles of images; a pure function.

        Args:
          images: uint8 [B, I, H, W, 3]. LLaVA-OneVision cuts them where I is 1 only.
          present: bool [B, I], False for what fills up samples with fewer images; by default all.

        Raises:
          ValueError: the images are not uint8.
        """
        if images.dtype != jnp.uint8:
            raise ValueError(f"Images are {images.dtype}; give uint8, of 0 to 255.")
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
        """Token ids int32 [B, length], and bool [B, length], which tells them from padding.

        Args:
          texts: B prompts, with a mark for every image.
          present: bool [B, I], which of I images each sample has.
          size: of the images.
          length: tokens with padding; None for as many as the longest prompt has.
          side: of the padding.

        Raises:
          ValueError: marks and images, or image tokens and features disagree, or a prompt is too
            long: it is never cut, for that may cut an image; or LLaVA-OneVision has one image in
            some prompts and several in others, which it treats in different ways.
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
                    "sees a lone image in another way than several: put prompts with one image "
                    "into batches of their own, present [B, 1]."
                )
            text = self.family.complete(self.tokenizer, text, self.mark)
            text = text.replace(self.mark, expanded)
            rows.append(self.tokenizer(text, add_special_tokens=self.family.special)["input_ids"])
            if length is not None and len(rows[i]) > length:
                raise ValueError(
                    f"Prompt {i} has {len(rows[i])} tokens, more than length={length}."
                )
        length = max(map(len, rows)) if length is None else length
        pad = self.tokenizer.pad_token_id or 0  # What stands for padding, `present` says.
        tokens = np.full((len(rows), length), pad, np.int32)
        there = np.zeros((len(rows), length), bool)
        for i, ids in enumerate(rows):
            where = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
            tokens[i, where], there[i, where] = ids, True
        features = self.image_tokens(size, present.shape[1])
        is_image = tokens == self.tokenizer.convert_tokens_to_ids(self.mark)
        check_counts(is_image, np.repeat(present, features, axis=1))
        return tokens, there


def whole(config: Mapping[str, Any], size: Size, images: int) -> Plan:
    """Of CLIP's and SigLIP's processors: resize, and take the center if the config says so.

    Raises:
      ValueError: the center would be larger than the image.
    """
    wanted = config["size"]
    if "shortest_edge" in wanted:
        edge, (height, width) = wanted["shortest_edge"], size
        long = int(edge * max(size) / min(size))
        resized = (edge, long) if height < width else (long, edge)
    else:
        resized = wanted["height"], wanted["width"]
    tile = resized
    if config.get("do_center_crop"):
        tile = config["crop_size"]["height"], config["crop_size"]["width"]
        if tile[0] > resized[0] or tile[1] > resized[1]:
            raise ValueError(f"crop_size={tile} is larger than an image resized to {resized}.")
    return Plan(size, (resized,), tile)


def split(config: Mapping[str, Any], size: Size, images: int) -> Plan:
    """Of Idefics3's and SmolVLM's: scale to a longest edge, then to whole tiles."""
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
    """The size with its longest edge at `longest`, and the other even."""
    height, width = size
    ratio = width / height
    if width >= height:
        height, width = int(longest / ratio), longest
        return max(height + height % 2, 1), width
    height, width = longest, int(longest * ratio)
    return height, max(width + width % 2, 1)


def anyres(config: Mapping[str, Any], size: Size, images: int) -> Plan:
    """Of LLaVA-OneVision's: a lone image is also fitted into a grid of tiles, several are not.

    The grid is that of the pinpoints in which the image keeps most of its pixels, and among those
    the smallest. Without pinpoints there is none.
    """
    (height, width), tile = size, (config["size"]["height"], config["size"]["width"])
    if images > 1 or not config["image_grid_pinpoints"]:
        edge = max(size)
        return Plan(size, ((height * tile[0] // edge, width * tile[1] // edge),), tile)

    def kept(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - canvas[0] * canvas[1]

    rows, columns = max(config["image_grid_pinpoints"], key=kept)
    high, wide = rows / height, columns / width
    if wide < high:
        fitted = min(math.ceil(height * wide), rows), columns
    else:
        fitted = rows, min(math.ceil(width * high), columns)
    return Plan(size, (fitted,), tile, rows // tile[0], columns // tile[1])


def rows_and_whole(plan: Plan, words: str) -> str:
    """Idefics3's text of an image: its tiles, row by row, with their places, then the whole."""
    fake, text = "<fake_token_around_image>", ""
    for row in range(plan.rows):
        for column in range(plan.columns):
            text += f"{fake}<row_{row + 1}_col_{column + 1}>{words}"
        text += "\n"
    if text:
        text += "\n"
    return f"{text}{fake}<global-img>{words}{fake}"


def _with_start(tokenizer: Any, text: str, mark: str) -> str:
    """PaliGemma's prompt: images, the start, words, a line's end."""
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
    """The processor of a vision-language model of one of `FAMILIES`.

    Args:
      directory: local, in the hub's format, with the model's config, its processor's and its
        tokenizer.

    Raises:
      ValueError: the family is not supported, the tokenizer and the model's config disagree about
        the image token, or see `processor_files.read`.
    """
    whole_config = hub.read_config(directory)
    kind = whole_config["model_type"]
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} is not supported; these are: {list(FAMILIES)}.")
    tokenizer, config, image = processor_files.read(directory, kind)
    mark = getattr(tokenizer, "image_token", config.get("image_token", "<image>"))
    model = vlm.FAMILIES[kind](whole_config, (), jnp.float32, False).model
    found = tokenizer.convert_tokens_to_ids(mark)
    if found != model.image_token:
        raise ValueError(f"{mark!r} is token {found}, but the model's is {model.image_token}.")
    return Processor(tokenizer, mark, model.vision, FAMILIES[kind], config, image)
