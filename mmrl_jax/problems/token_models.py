"""Models of token policies: the group `model` of a config, and their variables."""

from collections.abc import Callable
import dataclasses
import re
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, Group, group, option, options_of
from mmrl_jax.config.schema import is_group
from mmrl_jax.distributed import partition
from mmrl_jax.learners import token_learner
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.models import lora
from mmrl_jax.models.encoders import VisionEncoder, VisionProjection
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel, check_counts
from mmrl_jax.pretrained import chat, hub, vision_chat, weights
from mmrl_jax.pretrained.vision_chat import VLMSpec
from mmrl_jax.problems.control_models import (
    DTYPES,
    Dtype,
    LoraOptions,
    check_patches,
    with_adapters,
)
from mmrl_jax.tasks.prompts import Texts, Tokenizer, WordTokenizer
from mmrl_jax.training import fingerprints
from mmrl_jax.training.settings import check_settings
from mmrl_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TokenModelOptions:
    lora: LoraOptions = group(LoraOptions)
    dtype: Dtype = option(
        "float32", "Dtype of the computation; parameters that are trained are float32."
    )
    remat: bool = option(False, "Recompute activations in the backward pass to save memory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PatchOptions(_TokenModelOptions):
    width: int = option(
        64, "Width of the tokens; of a pretrained decoder, of the image patches alone.", POSITIVE
    )
    heads: int = option(4, "Attention heads; twice their number divides the width.", POSITIVE)
    mlp_ratio: int = option(2, "Hidden width of a block's MLP over the width.", POSITIVE)
    patch: int = option(
        8, "Edge of an image patch in pixels; it divides the images' height and width.", POSITIVE
    )
    patch_margin: int = option(0, "Pixels around a patch that its token also sees.", NON_NEGATIVE)
    patch_hidden: int = option(128, "Hidden units of the perceptron of each patch.", POSITIVE)
    vision_layers: int = option(0, "Blocks over the patches alone.", NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PretrainedOptions(_TokenModelOptions):
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = option(
        "float32",
        "Dtype that pretrained parameters are stored in which no stage trains; 'int8' is for the "
        "matrices of layers, and the other parameters are bfloat16 then.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchOptions(_PatchOptions):
    """A small vision-language model that is trained from scratch, on the words of one task."""

    kind: Literal["scratch"] = option("scratch", "Kind of model.")
    layers: int = option(2, "Blocks of the language model.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOptions(_PatchOptions, _PretrainedOptions):
    """A pretrained decoder that sees by our own encoder of patches and a projector."""

    kind: Literal["decoder"] = option("decoder", "Kind of model.")
    checkpoint: str | None = option(
        "smollm2",
        "'smollm2', or a directory, in the hub's format, of a decoder that was trained to chat; "
        "the texts have its tokens and its chat template.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMOptions(_PretrainedOptions):
    """A whole pretrained vision-language model."""

    kind: Literal["vlm"] = option("vlm", "Kind of model.")
    checkpoint: str | None = option(
        None,
        "Directory, in the hub's format, of a vision-language model that was trained to chat; "
        "images, texts and prompts are those of its processor.",
    )
    image_splitting: bool = option(
        False, "Let the model's processor split an image into tiles; else it sees one tile."
    )


MODELS: dict[str, type] = {"scratch": ScratchOptions, "decoder": DecoderOptions, "vlm": VLMOptions}
# Of each kind a config to begin with.
CONFIGS = {"scratch": "count_grpo", "decoder": "smollm2_vqa_grpo", "vlm": "vlm_grpo"}


def options(config: Any) -> Group:
    """Returns the keys of 'model' that the config's kind of model reads.

    Raises:
      ValueError: The kind is unknown.
    """
    model = config.get("model", {})
    kind = model.get("kind", "scratch") if is_group(model) else "scratch"
    if kind not in MODELS:
        raise ValueError(
            f"Config key 'model.kind' is {kind!r}, but must be one of "
            f"{', '.join(map(repr, MODELS))}."
        )
    return options_of(MODELS[kind])


def check_model(config: ml_collections.ConfigDict, height: int, width: int, where: str) -> None:
    """Checks the model against images of `where`.height and .width.

    Raises:
      ValueError: Names the field, its value and the remedy.
    """
    check_settings()
    m = config.model
    if m.kind != "scratch":
        if m.checkpoint is None:
            raise ValueError(
                f"model.checkpoint=None, but model.kind={m.kind!r} is read from a directory in the "
                "hub's format; name the directory."
            )
        if is_vlm(m) != (m.kind == "vlm"):
            other = "decoder" if m.kind == "vlm" else "vlm"
            raise ValueError(
                f"model.checkpoint={m.checkpoint!r} is of model.kind={other!r}, not {m.kind!r}: "
                f"begin with the config {CONFIGS[other]!r}, or name another directory."
            )
    if m.kind == "vlm":
        return
    check_patches(m, height, width, where)
    if m.width % (2 * m.heads) or m.width % 4:
        raise ValueError(
            f"model.width={m.width} is not divisible by 4 and by twice model.heads={m.heads}."
        )


def is_vlm(m: ml_collections.ConfigDict) -> bool:
    """Returns whether the directory of model.checkpoint holds a whole vision-language model.

    Raises:
      ValueError: See `hub.read_config` and `chat.directory_of`.
    """
    try:
        kind = hub.read_config(chat.directory_of(m.checkpoint))["model_type"]
    except ValueError as error:
        raise ValueError(f"model.checkpoint={m.checkpoint!r}: {error}") from error
    return kind in vision_chat.FAMILIES


class DecoderSpec(NamedTuple):
    """A pretrained decoder and its texts.

    Attributes:
      language: The decoder.
      chat: Its tokenizer.
    """

    language: LanguageModel
    chat: chat.ChatTokenizer


def read_spec(m: ml_collections.ConfigDict, size: tuple[int, int]) -> DecoderSpec | VLMSpec | None:
    """Reads what a pretrained model is, without its weights; None for one from scratch.

    Args:
      m: The group `model` of the config.
      size: Of the images, (height, width).

    Raises:
      ValueError: See `hub.read_blueprint`, `chat.read_chat` and `vision_chat.read_spec`.
    """
    if m.kind == "scratch":
        return None
    given: dict[str, Any] = {"dtype": DTYPES[m.dtype], "remat": m.remat}
    try:
        directory = chat.directory_of(m.checkpoint)
        if m.kind == "vlm":
            return vision_chat.read_spec(
                directory.resolve(), size, splitting=m.image_splitting, **given
            )
        language = cast(
            LanguageModel, hub.read_blueprint("language_model", directory, **given).model
        )
        # No text has the id that is the vocabulary's size.
        return DecoderSpec(language, chat.read_chat(directory.resolve(), language.vocabulary))
    except ValueError as error:
        raise ValueError(f"model.checkpoint={m.checkpoint!r}: {error}") from error


def dependencies(m: ml_collections.ConfigDict, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the fingerprints of the pretrained model, see `fingerprints`.

    Args:
      m: The group `model` of the config.
      tokenizer: Of its texts.
    """
    if m.kind == "scratch":
        return {}
    texts = cast(chat.ChatTokenizer, tokenizer)
    return {
        "base_weights": weights.fingerprint(chat.directory_of(m.checkpoint)),
        "chat_template": fingerprints.digest(texts.rendered()),
    }


class TokenModel(NamedTuple):
    """A policy, and what it needs for its variables to be initialized.

    Attributes:
      policy: The model.
      texts: The prompts and completions of the task as tokens.
      size: Of the images, (height, width).
    """

    policy: TokenPolicy
    texts: Texts
    size: tuple[int, int]


def make_model(
    m: ml_collections.ConfigDict,
    spec: DecoderSpec | VLMSpec | None,
    texts: Texts,
    size: tuple[int, int],
) -> TokenModel:
    """Returns the policy that completes prompts about images of this size.

    Args:
      m: The group `model` of the config.
      spec: See `read_spec`.
      texts: Of the task, with `image_tokens` for an image.
      size: Of the images.

    Raises:
      ValueError: See `vlm.check_counts`.
    """
    tokenizer = texts.tokenizer
    ends = texts.max_answer_length, tokenizer.stops, tokenizer.pad
    if isinstance(spec, VLMSpec):
        policy = TokenPolicy(spec.model, *ends, spec.preprocess_images, spec.positions)
    else:
        policy = TokenPolicy(_with_patches(m, spec, tokenizer), *ends)
    mask = np.ones((len(texts.prompts), image_tokens(m, spec, size)), bool)
    check_counts(texts.prompt_tokens == tokenizer.image, mask)
    return TokenModel(policy, texts, size)


def image_tokens(
    m: ml_collections.ConfigDict, spec: DecoderSpec | VLMSpec | None, size: tuple[int, int]
) -> int:
    """Returns the number of image tokens of an image; for the arguments see `make_model`."""
    if isinstance(spec, VLMSpec):
        return spec.image_tokens
    return (size[0] // m.patch) * (size[1] // m.patch)


def _with_patches(
    m: ml_collections.ConfigDict, spec: DecoderSpec | None, tokenizer: Tokenizer
) -> VisionLanguageModel:
    """A decoder, pretrained or small, that sees by our own encoder of patches."""
    dtype = DTYPES[m.dtype]
    if spec is None:
        language, projector = _small_decoder(m, cast(WordTokenizer, tokenizer).size), None
    else:
        language, projector = spec.language, VisionProjection(spec.language.width, dtype)
    encoder = VisionEncoder(
        m.width,
        m.patch,
        m.patch_margin,
        m.patch_hidden,
        layers=m.vision_layers,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        dtype=dtype,
        remat=m.remat,
    )
    return VisionLanguageModel(PatchVision(encoder, projector), language, tokenizer.image)


def _small_decoder(m: ml_collections.ConfigDict, vocabulary: int) -> LanguageModel:
    """A language model to be trained from scratch."""
    block = BlockSpec(
        heads=m.heads,
        hidden=m.mlp_ratio * m.width,
        norm="rms",
        activation="silu",
        gated=True,
        biases=(),
    )
    return LanguageModel(
        vocabulary=vocabulary,
        width=m.width,
        layers=m.layers,
        block=block,
        ropes=(Rope(100.0, m.width // m.heads),),
        dtype=DTYPES[m.dtype],
        remat=m.remat,
    )


def init_variables(
    m: ml_collections.ConfigDict, model: TokenModel, key: jax.Array, *, value_head: bool
) -> Params:
    """Returns the model's variables, all of them newly initialized; float32.

    Args:
      m: The group `model` of the config.
      model: See `make_model`.
      key: Key of the parameters.
      value_head: Add a value head, as 'value'.

    Raises:
      ValueError: model.lora.pattern matches no layer.
    """
    policy, nothing = model.policy, jnp.zeros(1, jnp.int32)
    prompt = model.texts.make_prompts(jnp.zeros((1, *model.size, 3), jnp.uint8), *[nothing] * 4)
    params = policy.model.init(key, *policy.inputs(prompt))["params"]
    variables = with_adapters(params, m.lora, jax.random.fold_in(key, 1))
    if value_head:
        width = policy.model.language.width
        variables = token_learner.with_value_head(jax.random.fold_in(key, 2), variables, width)
    return variables


def store_frozen(m: ml_collections.ConfigDict, variables: Params, trained: str) -> Params:
    """Returns variables with the pretrained ones that no stage trains in model.frozen_dtype.

    Args:
      m: The group `model` of the config.
      variables: Of the whole model.
      trained: Regular expression of the whole paths of the variables that stages train.
    """
    dtype = _frozen_dtype(m, trained)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtype(_name(path))), variables["params"]
    )
    if m.get("frozen_dtype") == "int8":
        layers = [
            re.escape(path)
            for path, kernel in lora.dense_kernels(params).items()
            if kernel.dtype == jnp.bfloat16
        ]
        params = lora.quantize(params, "|".join(layers)) if layers else params
    return variables | {"params": params}


def _frozen_dtype(m: ml_collections.ConfigDict, trained: str) -> Callable[[str], jnp.dtype]:
    """Path of a parameter to the dtype that it is read in."""

    def dtype(name: str) -> jnp.dtype:
        pretrained = m.kind == "vlm" or (m.kind == "decoder" and name.startswith("language/"))
        kept = m.get("frozen_dtype", "float32") == "float32" or not pretrained
        return jnp.float32 if kept or re.fullmatch(trained, f"params/{name}") else jnp.bfloat16

    return dtype


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def read_variables(
    m: ml_collections.ConfigDict,
    model: TokenModel,
    key: jax.Array,
    mesh: Mesh,
    *,
    value_head: bool,
    trained: str,
) -> Params:
    """Returns the model's variables as a run begins with them: pretrained ones are read.

    No device ever holds more than its part of them.

    Args:
      m: The group `model` of the config.
      model: See `make_model`.
      key: Key of the parameters that are initialized.
      mesh: The devices that the variables are split over, see `partition`.
      value_head: Add a value head, as 'value'.
      trained: Regular expression of the whole paths of the variables that stages train.

    Returns:
      {'params': ...}, with adapters 'lora', with a value head 'value'; float32, or see
      `store_frozen`.
    """
    loaded: dict[str, Any] = {}
    dtype = _frozen_dtype(m, trained)
    if m.kind == "vlm":
        read = hub.load_vision_language_model(
            chat.directory_of(m.checkpoint), mesh=mesh, param_dtype=dtype
        )
        loaded = read.params["params"]
    elif m.kind == "decoder":
        read = hub.load_language_model(
            chat.directory_of(m.checkpoint),
            mesh=mesh,
            param_dtype=lambda name: dtype(f"language/{name}"),
        )
        loaded = {"language": read.params["params"]}

    def init(key: jax.Array) -> Params:
        # What is loaded is not returned, and so not initialized either.
        variables = init_variables(m, model, key, value_head=value_head)
        new = {name: x for name, x in variables["params"].items() if name not in loaded}
        return variables | {"params": new}

    shardings = partition.shardings(jax.eval_shape(init, key), mesh)
    variables = jax.jit(init, out_shardings=shardings)(key)
    return store_frozen(m, variables | {"params": variables["params"] | loaded}, trained)


def partition_trainable(
    variables: Params, trainable: str, *, trains_value_head: bool, key: str
) -> tuple[Params, Any]:
    """Returns the variables that a stage trains, and those that it does not.

    A value head is trained by the stages that use it, whatever the pattern says, and by no other.

    Args:
      variables: Of the whole model.
      trainable: Regular expression of the whole paths of what is trained.
      trains_value_head: The stage uses the value head.
      key: The key of the config that holds the pattern, for the message.

    Raises:
      ValueError: The pattern matches nothing.
    """
    pattern = trainable
    if "value" in variables:
        pattern = f"({trainable})|value/.*" if trains_value_head else f"(?!value/)({trainable})"
    try:
        return lora.split(variables, pattern)
    except ValueError as error:
        raise ValueError(f"{key}={trainable!r}: {error}") from error
