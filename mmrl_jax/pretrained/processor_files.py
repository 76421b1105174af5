"""What the files of a processor say, in a local directory in the hub's format.

Where several files say something, the first that does is right, as it is to transformers:

    image processor   'image_processor' of processor_config.json, preprocessor_config.json
    chat template     'chat_template' of processor_config.json, chat_template.json,
                      chat_template.jinja, and the tokenizer's own
    the tokenizer's   chat_template.jinja, 'chat_template' of tokenizer_config.json

What none of them says has the default of transformers' class. What they do say is followed, or has
no effect on images of uint8 RGB, or must be the default: `FAMILIES` lists which.
"""

from collections.abc import Collection, Mapping, Sequence
import inspect
import json
import pathlib
from typing import Any, NamedTuple

METHODS = {1: "lanczos3", 2: "linear", 3: "bicubic"}  # PIL's numbers, jax.image's names.
LONGEST = 4096  # Pixels; Idefics3 scales what is longer once more.
FORMER = "FeatureExtractor", "ImageProcessor"  # What classes were called, and are.
PARTS = ("self", "image_processor", "tokenizer", "video_processor", "chat_template", "kwargs")
PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
IDLE = (
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "device"),
    *("return_tensors", "disable_grouping", "image_seq_length"),
)


class Family(NamedTuple):
    """What the processors of a family are told.

    Attributes:
      image_processors: transformers' classes, without 'Fast' or 'Pil'; the first is the default.
      followed: keys of the image processor that we do as transformers does.
      idle: keys of it, beside `IDLE`, that change nothing here.
      size: edges that 'size' gives, in one of these combinations.
      processor: transformers' class that makes prompts.
      prompts: its keys that we follow.
      idle_prompts: its keys that change nothing here.
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
    # They pad samples that have fewer tiles.
    idle=("do_pad", "return_row_col_info"),
    prompts=("image_seq_len",),
)
_CROPPED = (*_RESIZED, "do_center_crop", "crop_size")
_WHOLE = (("height", "width"), ("shortest_edge",))
_QWEN_VL = Family(
    ("Qwen2VLImageProcessor",),
    # The limits of older files become the size's edges.
    (*_RESIZED, "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"),
    (("longest_edge", "shortest_edge"),),
    "Qwen2_5_VLProcessor",
)
# A tower alone sees what a control policy sees, resized as `models.towers.Pictures` does it.
_TOWER = Family(
    ("CLIPImageProcessor", "SiglipImageProcessor"),
    PIXELS,
    idle=("do_resize", "size", "resample", "do_center_crop", "crop_size"),
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
}


class ProcessorFiles(NamedTuple):
    """What the files of a processor say.

    Attributes:
      tokenizer: transformers', with the processor's chat template.
      config: of the processor, the keys that its family follows, complete.
      image: of the image processor, all that transformers' class takes, complete; sizes by their
        edges, mean and std of three channels.
    """

    tokenizer: Any
    config: dict[str, Any]
    image: dict[str, Any]


def read(directory: str | pathlib.Path, kind: str) -> ProcessorFiles:
    """Reads the files of a processor.

    Args:
      directory: local, in the hub's format.
      kind: one of `FAMILIES`.

    Raises:
      ValueError: a file is missing or cannot be read, or asks for something that is not supported;
        the message names file, key and value.
    """
    path, family = pathlib.Path(directory), FAMILIES[kind]
    config = _processor_config(path)
    image = _image_processor(path, config, family)
    tokenizer = read_tokenizer(path)
    if config.get("chat_template") is not None:
        tokenizer.chat_template = config["chat_template"]
    return ProcessorFiles(tokenizer, _prompts(path, config, family), image)


def read_image_processor(directory: str | pathlib.Path, kind: str) -> dict[str, Any]:
    """`ProcessorFiles.image` alone; for the rest see `read`."""
    path = pathlib.Path(directory)
    return _image_processor(path, _processor_config(path), FAMILIES[kind])


def read_tokenizer(directory: str | pathlib.Path) -> Any:
    """transformers' tokenizer of a local directory.

    Raises:
      ValueError: there is none that transformers can read without running code of others.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Parsers of other languages raise what is no ValueError.
        raise ValueError(
            f"{directory} has no tokenizer that we know: {type(error).__name__}: {error}"
        ) from error


def mean_and_std(image: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What an image processor subtracts, and divides by then, of values in [0, 1].

    The processor's own are of whatever its factor makes of levels from 0 to 255.
    """
    # Exactly 1 where the factor is 1 / 255.
    scale = 255 * (image["rescale_factor"] if image["do_rescale"] else 1.0)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if image["do_normalize"]:
        mean, std = image["image_mean"], image["image_std"]
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _processor_config(path: pathlib.Path) -> dict[str, Any]:
    """processor_config.json, if any, with the chat template that transformers' processor has."""
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
    """The image processor's config, complete and checked."""
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
            f"{', '.join(family.image_processors)} are."
        )
    made = getattr(transformers, f"{name}Pil")
    try:
        found = _values(made(**written))
    except Exception as error:  # Whatever a value of the wrong type leads to there.
        raise _unreadable(file, error) from error
    _check_defaults(file, found, _values(made()), (*family.followed, *family.idle, *IDLE))
    for key in ("image_mean", "image_std"):
        found[key] = _three(file, key, found[key])
    _check_values(file, found, family)
    return found


def _class_name(written: Mapping[str, Any]) -> str:
    """transformers' class of an image processor, without its backend; '' where none is named."""
    former = written.get("feature_extractor_type") or ""
    name = written.get("image_processor_type") or former.replace(*FORMER)
    return name.removesuffix("Fast").removesuffix("Pil")


def _unreadable(file: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: the image processor's config cannot be read: {type(error).__name__}: {error}"
    )


def _values(processor: Any) -> dict[str, Any]:
    """What an image processor of transformers takes, sizes by their edges."""
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
    found: Mapping[str, Any],
    defaults: Mapping[str, Any],
    free: Collection[str],
) -> None:
    """Raises ValueError for a key that is not `free` and has another value than the default."""
    for key, value in found.items():
        # None and False both say that something is not done.
        if key not in free and value != defaults[key] and (value or defaults[key]):
            raise ValueError(
                f"{file}: {key}={value!r} is not supported, only transformers' default, "
                f"{defaults[key]!r}, is: give a model whose processor has that, or change it there "
                "if the model may see images so."
            )


def _three(file: pathlib.Path, key: str, value: Any) -> tuple[float, ...]:
    """A number for each channel."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(numbers) != 3 or not all(isinstance(x, (int, float)) for x in numbers):
        raise ValueError(
            f"{file}: {key}={value!r} must be a number, or one for each of 3 channels."
        )
    if key == "image_std" and not all(numbers):
        raise ValueError(f"{file}: {key}={value!r} must not be 0, which images are divided by.")
    return numbers


def _check_values(file: pathlib.Path, image: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError for what `family` follows, but not with this value."""

    def refuse(key: str, remedy: str) -> ValueError:
        return ValueError(f"{file}: {key}={image[key]!r} is not supported; {remedy}.")

    if "resample" in family.followed and image["resample"] not in METHODS:
        raise refuse("resample", f"{METHODS} are")
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
        raise refuse("size", f"the most is {LONGEST} pixels")
    if "image_grid_pinpoints" in family.followed:
        edge = image["size"]["height"]
        if edge != image["size"]["width"]:
            raise refuse("size", "height and width, alike, are")
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
    """The keys of a processor's config that its family follows."""
    import transformers

    file = path / "processor_config.json"
    takes = inspect.signature(getattr(transformers, str(family.processor)).__init__).parameters
    defaults = {name: x.default for name, x in takes.items() if name not in PARTS}
    found = defaults | {name: config[name] for name in defaults if config.get(name) is not None}
    _check_defaults(file, found, defaults, (*family.prompts, *family.idle_prompts))
    for key in family.prompts:
        if found[key] is None:
            raise ValueError(
                f"{file} does not say {key}, which prompts depend on and transformers has no "
                "default for; write it there, as config.json and the model's page have it."
            )
    return {key: found[key] for key in family.prompts}
