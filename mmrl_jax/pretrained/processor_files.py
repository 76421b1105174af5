"""Reads the files of a processor in a local directory in the hub's format.

Where several files have a setting, the first of these takes precedence, as in transformers:

    image processor   'image_processor' of processor_config.json, preprocessor_config.json
    chat template     'chat_template' of processor_config.json, chat_template.json,
                      chat_template.jinja, and the tokenizer's own
    the tokenizer's   chat_template.jinja, 'chat_template' of tokenizer_config.json

Settings that no file has take the default of transformers' class. `FAMILIES` lists the settings
that are supported and those that have no effect on uint8 RGB images; all others must have their
default.
"""

from collections.abc import Collection, Mapping, Sequence
import inspect
import json
import pathlib
from typing import Any, NamedTuple

METHODS = {1: "lanczos3", 2: "linear", 3: "bicubic"}  # PIL's numbers and jax.image's names.
LONGEST = 4096  # Longest edge in pixels, above which Idefics3 would scale an image once more.
FORMER = "FeatureExtractor", "ImageProcessor"  # Former and current suffix of class names.
PARTS = ("self", "image_processor", "tokenizer", "video_processor", "chat_template", "kwargs")
PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
IDLE = (
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "device"),
    *("return_tensors", "disable_grouping", "image_seq_length"),
)


class Family(NamedTuple):
    """The settings of the processors of a family.

    Attributes:
      image_processors: Image processor classes of transformers, without 'Fast' or 'Pil'; the first
        one is the default.
      followed: Keys of the image processor that are supported.
      size: Combinations of edges that 'size' may have.
      processor: Class of transformers that makes prompts.
      idle: Keys of the image processor, in addition to `IDLE`, that have no effect here.
      prompts: Keys of the processor that are supported.
      idle_prompts: Keys of the processor that have no effect here.
    """

    image_processors: tuple[str, ...]
    followed: tuple[str, ...]
    size: tuple[tuple[str, ...], ...] = ()
    processor: str | None = None
    idle: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    idle_prompts: tuple[str, ...] = ()


_RESIZED = (*PIXELS, "size", "resample")
_SPLIT = Family(
    ("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    (*_RESIZED, "do_image_splitting", "max_image_size"),
    (("longest_edge",),),
    "Idefics3Processor",
    # These keys control the padding of samples that have fewer tiles.
    idle=("do_pad", "return_row_col_info"),
    prompts=("image_seq_len",),
)
_CROPPED = (*_RESIZED, "do_center_crop", "crop_size")
_WHOLE = (("height", "width"), ("shortest_edge",))
_QWEN_VL = Family(
    ("Qwen2VLImageProcessor",),
    # transformers converts the limits of older files to edges of the size.
    (*_RESIZED, "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"),
    (("longest_edge", "shortest_edge"),),
    "Qwen2_5_VLProcessor",
)
# A separate tower gets whole images, resized by `ResizingVisionTower` of `models.towers`.
_TOWER = Family(
    ("CLIPImageProcessor", "SiglipImageProcessor"),
    PIXELS,
    idle=("do_resize", "size", "resample", "do_center_crop", "crop_size"),
)
# The size, or that of the crop, is the size to which they are resized.
_DINO = Family(
    ("BitImageProcessor",),
    (*PIXELS, "size", "do_center_crop", "crop_size"),
    _WHOLE,
    idle=("do_resize", "resample"),
)
FAMILIES = {
    "idefics3": _SPLIT,
    "smolvlm": _SPLIT._replace(
        image_processors=_SPLIT.image_processors[::-1], processor="SmolVLMProcessor"
    ),
    "paligemma": Family(
        ("SiglipImageProcessor",),
        (*_CROPPED, "image_seq_length"),
        _WHOLE,
        "PaliGemmaProcessor",
    ),
    "llava": Family(
        ("LlavaImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"),
        _CROPPED,
        _WHOLE,
        "LlavaProcessor",
        prompts=(
            *("image_token", "patch_size", "num_additional_image_tokens"),
            "vision_feature_select_strategy",
        ),
    ),
    "llava_onevision": Family(
        ("LlavaOnevisionImageProcessor",),
        (*_RESIZED, "image_grid_pinpoints"),
        (("height", "width"),),
        "LlavaOnevisionProcessor",
        idle=("do_pad",),
        prompts=(
            *("image_token", "num_image_tokens", "vision_feature_select_strategy"),
            "vision_aspect_ratio",
        ),
        idle_prompts=("video_token",),
    ),
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL._replace(processor="Qwen3VLProcessor"),
    "clip_vision_model": _TOWER,
    "siglip_vision_model": _TOWER._replace(image_processors=_TOWER.image_processors[::-1]),
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
}


class ProcessorFiles(NamedTuple):
    """The content of the files of a processor.

    Attributes:
      tokenizer: Tokenizer of transformers, with the processor's chat template.
      config: Config of the processor, completed with defaults, with the keys that are supported.
      image: Config of the image processor, completed with defaults, with all keys of transformers'
        class; sizes are dicts of edges, and mean and std have three channels.
    """

    tokenizer: Any
    config: dict[str, Any]
    image: dict[str, Any]


def read(directory: str | pathlib.Path, kind: str) -> ProcessorFiles:
    """Reads the files of a processor.

    Args:
      directory: Local directory in the hub's format.
      kind: Model type, one of `FAMILIES`.

    Raises:
      ValueError: A file is missing, cannot be read, or has an unsupported setting; the message has
        the file, the key and the value.
    """
    path, family = pathlib.Path(directory), FAMILIES[kind]
    config = _processor_config(path)
    image = _image_processor(path, config, family)
    tokenizer = read_tokenizer(path)
    if config.get("chat_template") is not None:
        tokenizer.chat_template = config["chat_template"]
    return ProcessorFiles(tokenizer, _prompts(path, config, family), image)


def read_image_processor(directory: str | pathlib.Path, kind: str) -> dict[str, Any]:
    """Reads `ProcessorFiles.image` only; for arguments and errors see `read`."""
    path = pathlib.Path(directory)
    return _image_processor(path, _processor_config(path), FAMILIES[kind])


def read_tokenizer(directory: str | pathlib.Path) -> Any:
    """Reads transformers' tokenizer of a local directory.

    Raises:
      ValueError: There is no tokenizer that transformers can load without running code of the
        directory.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Parsers in other languages raise exceptions of any type.
        raise ValueError(
            f"{directory} has no supported tokenizer: {type(error).__name__}: {error}"
        ) from error


def mean_and_std(image: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std of an image processor for values in [0, 1].

    Those in its config apply to values that its own factor makes from levels 0 to 255.
    """
    # The scale is exactly 1 for a factor of 1 / 255.
    scale = 255 * (image["rescale_factor"] if image["do_rescale"] else 1.0)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if image["do_normalize"]:
        mean, std = image["image_mean"], image["image_std"]
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _processor_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads processor_config.json, if any, with the chat template that transformers would use."""
    from transformers.processing_utils import ProcessorMixin

    try:
        return ProcessorMixin.get_processor_dict(path, local_files_only=True)[0]
    except Exception as error:
        raise ValueError(
            f"{path}: processor_config.json, chat_template.json or chat_template.jinja cannot be "
            f"read: {type(error).__name__}: {error}"
        ) from error


def _image_processor(
    path: pathlib.Path, config: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """Returns the image processor's config, completed with defaults and checked."""
    import transformers

    file, written = path / "processor_config.json", config.get("image_processor")
    if written is None:
        file = path / "preprocessor_config.json"
        if not file.is_file():
            raise ValueError(
                f"{path} has neither preprocessor_config.json nor a processor_config.json with "
                "'image_processor': give a directory with the image processor's config."
            )
    try:
        written = json.loads(file.read_text(encoding="utf-8")) if written is None else written
        name = _class_name(written) or family.image_processors[0]
    except Exception as error:
        raise _unreadable(file, error) from error
    if name not in family.image_processors:
        raise ValueError(
            f"{file}: image_processor_type={name!r} is not supported here; "
            f"supported are {', '.join(family.image_processors)}."
        )
    image_processor = getattr(transformers, f"{name}Pil")
    try:
        values = _values(image_processor(**written))
    except Exception as error:  # A value of the wrong type may raise any exception.
        raise _unreadable(file, error) from error
    _check_defaults(
        file, values, _values(image_processor()), (*family.followed, *family.idle, *IDLE)
    )
    for key in ("image_mean", "image_std"):
        values[key] = _three(file, key, values[key])
    _check_values(file, values, family)
    return values


def _class_name(written: Mapping[str, Any]) -> str:
    """Returns the class name of an image processor without its backend, or '' if there is none."""
    former = written.get("feature_extractor_type") or ""
    name = written.get("image_processor_type") or former.replace(*FORMER)
    return name.removesuffix("Fast").removesuffix("Pil")


def _unreadable(file: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: the image processor's config cannot be read: {type(error).__name__}: {error}"
    )


def _values(processor: Any) -> dict[str, Any]:
    """Returns the settings of an image processor of transformers, with sizes as dicts of edges."""
    from transformers.image_utils import SizeDict

    values = {
        name: getattr(processor, name, None) for name in processor.valid_kwargs.__annotations__
    }
    return {
        name: dict(value) if isinstance(value, SizeDict) else value
        for name, value in values.items()
    }


def _check_defaults(
    file: pathlib.Path,
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    free: Collection[str],
) -> None:
    """Raises ValueError for a key that is not `free` and does not have its default."""
    for key, value in values.items():
        # None and False both disable a setting.
        if key not in free and value != defaults[key] and (value or defaults[key]):
            raise ValueError(
                f"{file}: {key}={value!r} is not supported, only transformers' default "
                f"{defaults[key]!r} is: give a model whose processor has it, or change the file if "
                "the model is suited to such images."
            )


def _three(file: pathlib.Path, key: str, value: Any) -> tuple[float, ...]:
    """Returns a number for each of three channels."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(numbers) != 3 or not all(isinstance(x, (int, float)) for x in numbers):
        raise ValueError(
            f"{file}: {key}={value!r} must be a number, or one for each of 3 channels."
        )
    if key == "image_std" and not all(numbers):
        raise ValueError(f"{file}: {key}={value!r} must not be 0, since images are divided by it.")
    return numbers


def _check_values(file: pathlib.Path, image: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError for unsupported values of the keys that `family` supports."""

    def refuse(key: str, remedy: str) -> ValueError:
        return ValueError(f"{file}: {key}={image[key]!r} is not supported; {remedy}.")

    if "resample" in family.followed and image["resample"] not in METHODS:
        raise refuse("resample", f"supported are {METHODS}")
    factor = image["rescale_factor"]
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise refuse("rescale_factor", "give a number above 0")
    for key in ("patch_size", "temporal_patch_size", "merge_size", "image_seq_length"):
        if key in family.followed and not _whole_number(image[key]):
            raise refuse(key, "give a whole number above 0")
    forms = {"size": family.size, "crop_size": (("height", "width"),)}
    forms["max_image_size"] = (("longest_edge",),)
    for key, edges in forms.items():
        used = key != "crop_size" or image["do_center_crop"]
        if key in family.followed and used and not _is_size(image[key], edges):
            listed = " or ".join(str(dict.fromkeys(names, "...")) for names in edges)
            raise refuse(key, f"give whole numbers above 0, {listed}")
    if "max_image_size" in family.followed and image["size"]["longest_edge"] > LONGEST:
        raise refuse("size", f"the maximum is {LONGEST} pixels")
    if "image_grid_pinpoints" in family.followed:
        edge = image["size"]["height"]
        if edge != image["size"]["width"]:
            raise refuse("size", "height and width must be equal")
        if not all(_is_grid(pair, edge) for pair in image["image_grid_pinpoints"]):
            raise refuse("image_grid_pinpoints", f"give pairs of multiples of the tile's {edge}")


def _is_size(value: Any, forms: Sequence[Sequence[str]]) -> bool:
    if not isinstance(value, Mapping) or tuple(sorted(value)) not in map(tuple, forms):
        return False
    return all(map(_whole_number, value.values()))


def _is_grid(pair: Any, edge: int) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(_whole_number(length) and length % edge == 0 for length in pair)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _prompts(path: pathlib.Path, config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the supported keys of a processor's config, completed with defaults."""
    import transformers

    file = path / "processor_config.json"
    signature = inspect.signature(getattr(transformers, str(family.processor)).__init__)
    defaults = {name: x.default for name, x in signature.parameters.items() if name not in PARTS}
    values = defaults | {name: config[name] for name in defaults if config.get(name) is not None}
    _check_defaults(file, values, defaults, (*family.prompts, *family.idle_prompts))
    for key in family.prompts:
        if values[key] is None:
            raise ValueError(
                f"{file} has no {key}, on which prompts depend and for which transformers has no "
                "default; add it with the value in config.json and on the model's page."
            )
    return {key: values[key] for key in family.prompts}
