"""Models of token policies: the group `model` of a config, and their variables."""

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mmrl_jax.config.options import POSITIVE, Group, option
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
    ModelOptions,
    PatchOptions,
    check_patches,
    options_of_kind,
    with_adapters,
)
from mmrl_jax.tasks.question import Texts, Tokenizer, WordTokenizer
from mmrl_jax.training import fingerprints
from mmrl_jax.training.settings import check_settings
from mmrl_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TokenPatchOptions(PatchOptions):
    heads: int = option(4, "Attention heads; twice their number divides the width.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchOptions(_TokenPatchOptions):
    """A small vision-language model that is trained from scratch, on the words of one task."""

    kind: Literal["scratch"] = option("scratch", "Kind of model.")
    layers: int = option(2, "Blocks of the language model.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOptions(_TokenPatchOptions):
    """A pretrained decoder that sees by our own encoder of patches and a projector."""

    kind: Literal["decoder"] = option("decoder", "Kind of model.")
    width: int = option(64, "Width of the image patches, before the projector.", POSITIVE)
    checkpoint: str | None = option(
        "smollm2",
        "'smollm2', or a directory, in the hub's format, of a decoder that was trained to chat; "
        "the texts have its tokens and its chat template.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMOptions(ModelOptions):
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
    """Returns the keys of 'model' that the config's kind of model reads, see `options_of_kind`."""
    return options_of_kind(config, MODELS, CONFIGS)


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
    ends = texts.length, tokenizer.stops, tokenizer.pad
    if isinstance(spec, VLMSpec):
        policy = TokenPolicy(spec.model, *ends, spec.pictures, spec.positions)
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
    prompt = model.texts.ask(jnp.zeros((1, *model.size, 3), jnp.uint8), *[nothing] * 4)
    params = policy.model.init(key, *policy.inputs(prompt))["params"]
    variables = with_adapters(params, m.lora, jax.random.fold_in(key, 1))
    if value_head:
        width = policy.model.language.width
        variables = token_learner.with_value_head(jax.random.fold_in(key, 2), variables, width)
    return variables


def read_variables(
    m: ml_collections.ConfigDict, model: TokenModel, key: jax.Array, *, value_head: bool
) -> Params:
    """Returns the model's variables as a run begins with them: pretrained ones are read.

    For the arguments see `init_variables`.

    Returns:
      {'params': ...}, with adapters 'lora', with a value head 'value'; float32.
    """
    loaded: dict[str, Any] = {}
    if m.kind == "vlm":
        loaded = hub.load_vision_language_model(chat.directory_of(m.checkpoint)).params["params"]
    elif m.kind == "decoder":
        read = hub.load_language_model(chat.directory_of(m.checkpoint))
        loaded = {"language": read.params["params"]}

    @jax.jit
    def draw(key: jax.Array) -> Params:
        # What is loaded is not returned, and so not drawn either.
        drawn = init_variables(m, model, key, value_head=value_head)
        kept = {name: x for name, x in drawn["params"].items() if name not in loaded}
        return drawn | {"params": kept}

    variables = draw(key)
    return variables | {"params": variables["params"] | loaded}


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
