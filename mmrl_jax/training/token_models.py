"""The models of token policies: what 'model' means in their configs, and their variables."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mmrl_jax.learners import token_learner
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.models import lora
from mmrl_jax.models.encoders import VisionEncoder, VisionProjection
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel, check_counts
from mmrl_jax.pretrained import chat, hub, vision_chat, weights
from mmrl_jax.pretrained.vision_chat import VLMSpec
from mmrl_jax.tasks.question import Texts, Tokenizer, WordTokenizer
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import fingerprints
from mmrl_jax.training.config import anything, non_negative, one_of, positive
from mmrl_jax.training.control_models import DTYPES, LORA, check_margin, with_adapters
from mmrl_jax.training.settings import check_settings
from mmrl_jax.types import Params

MODEL: config_lib.Schema = {
    "pretrained": anything(
        (str, type(None)),
        "'smollm2', or a directory of a decoder or a whole vision-language model that was trained "
        "to chat, whose tokens and chat template the texts have; None for one from scratch. A "
        "decoder sees by a vision encoder of the keys below; to a whole model, 'image_splitting', "
        "'lora', 'dtype' and 'remat' alone apply",
    ),
    "image_splitting": anything(
        bool, "a whole model's processor may cut a picture into tiles; else it sees one tile"
    ),
    "width": positive(int, "of the tokens; beside a pretrained decoder, of the patches'"),
    "layers": positive(int, "blocks of the language model"),
    "heads": positive(int, "attention heads; must divide the width"),
    "mlp_ratio": positive(int, "hidden width of a block's MLP over the width"),
    "patch": positive(int, "edge of an image patch, pixels; must divide height and width"),
    "patch_margin": non_negative(int, "pixels around a patch that its token sees too"),
    "patch_hidden": positive(int, "hidden units of the per-patch perceptron"),
    "vision_layers": non_negative(int, "blocks among the patches"),
    "lora": LORA,
    "dtype": one_of(tuple(DTYPES), "of the computation; parameters are float32"),
    "remat": anything(bool, "recompute activations in the backward pass"),
}


def check_model(config: ml_collections.ConfigDict, height: int, width: int, where: str) -> None:
    """Checks the model against pictures of `where`.height and .width, and the devices.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    check_settings()
    m = config.model
    devices = config.devices or jax.device_count()
    if devices > jax.device_count():
        raise ValueError(f"devices={devices}, but there are {jax.device_count()}; give 0 for all.")
    if is_whole(m):
        return
    if height % m.patch or width % m.patch:
        raise ValueError(
            f"{where}.height={height} and {where}.width={width} are not both divisible by "
            f"model.patch={m.patch}."
        )
    check_margin(m)
    if m.width % (2 * m.heads) or m.width % 4:
        raise ValueError(
            f"model.width={m.width} is not divisible by 4 and by twice model.heads={m.heads}."
        )


def check_sizes(config: ml_collections.ConfigDict, sizes: dict[str, int]) -> None:
    """Raises ValueError if the devices do not divide one of the sizes, given by their names."""
    devices = config.devices or jax.device_count()
    for name, size in sizes.items():
        if size % devices:
            raise ValueError(f"devices={devices} do not divide {name} = {size}; change one.")


class DecoderSpec(NamedTuple):
    """A pretrained decoder and its texts.

    Attributes:
      language: the decoder.
      chat: its tokenizer.
    """

    language: LanguageModel
    chat: chat.ChatTokenizer


def is_whole(m: ml_collections.ConfigDict) -> bool:
    """Whether model.pretrained is a whole vision-language model.

    Raises:
      ValueError: see `hub.read_config` and `chat.directory_of`.
    """
    if m.pretrained is None:
        return False
    try:
        kind = hub.read_config(chat.directory_of(m.pretrained))["model_type"]
    except ValueError as error:
        raise ValueError(f"model.pretrained={m.pretrained!r}: {error}") from error
    return kind in vision_chat.FAMILIES


def pretrained(m: ml_collections.ConfigDict, size: tuple[int, int]) -> DecoderSpec | VLMSpec | None:
    """The decoder, or the whole model, of model.pretrained; None for one from scratch.

    Args:
      m: the config of the model.
      size: of the pictures, (height, width).

    Raises:
      ValueError: see `hub.read_blueprint`, `chat.read_chat` and `vision_chat.read_sight`.
    """
    if m.pretrained is None:
        return None
    options: dict[str, Any] = {"dtype": DTYPES[m.dtype], "remat": m.remat}
    try:
        directory = chat.directory_of(m.pretrained)
        if is_whole(m):
            return vision_chat.read_sight(
                directory.resolve(), size, splitting=m.image_splitting, **options
            )
        language = cast(
            LanguageModel, hub.read_blueprint("language_model", directory, **options).model
        )
        # No text has the id that is the vocabulary's size.
        return DecoderSpec(language, chat.read_chat(directory.resolve(), language.vocabulary))
    except ValueError as error:
        raise ValueError(f"model.pretrained={m.pretrained!r}: {error}") from error


def dependencies(m: ml_collections.ConfigDict, tokenizer: Tokenizer) -> dict[str, str]:
    """Fingerprints of the pretrained model, see `fingerprints`.

    Args:
      m: the config of the model.
      tokenizer: its texts.
    """
    if m.pretrained is None:
        return {}
    texts = cast(chat.ChatTokenizer, tokenizer)
    return {
        "base_weights": weights.fingerprint(chat.directory_of(m.pretrained)),
        "chat_template": fingerprints.digest(texts.rendered()),
    }


class TokenModel(NamedTuple):
    """A policy, and what it needs for its variables to be drawn.

    Attributes:
      policy: the model.
      texts: what it reads and writes.
      size: of the pictures, (height, width).
    """

    policy: TokenPolicy
    texts: Texts
    size: tuple[int, int]


def make_model(
    m: ml_collections.ConfigDict,
    source: DecoderSpec | VLMSpec | None,
    texts: Texts,
    size: tuple[int, int],
) -> TokenModel:
    """The policy that answers these texts about pictures of this size.

    Args:
      m: the config of the model.
      source: see `pretrained`.
      texts: with `image_tokens` for a picture.
      size: of the pictures.

    Raises:
      ValueError: see `vlm.check_counts`.
    """
    tokenizer = texts.tokenizer
    ends = texts.length, tokenizer.stops, tokenizer.pad
    if isinstance(source, VLMSpec):
        policy = TokenPolicy(source.model, *ends, source.pictures, source.positions)
    else:
        policy = TokenPolicy(_with_eyes(m, source, tokenizer), *ends)
    present = np.ones((len(texts.prompts), image_tokens(m, source, size)), bool)
    check_counts(texts.prompt_tokens == tokenizer.image, present)
    return TokenModel(policy, texts, size)


def image_tokens(
    m: ml_collections.ConfigDict, source: DecoderSpec | VLMSpec | None, size: tuple[int, int]
) -> int:
    """Image tokens of a picture of this size; for the rest see `make_model`."""
    if isinstance(source, VLMSpec):
        return source.image_tokens
    return (size[0] // m.patch) * (size[1] // m.patch)


def _with_eyes(
    m: ml_collections.ConfigDict, speech: DecoderSpec | None, tokenizer: Tokenizer
) -> VisionLanguageModel:
    """A decoder, pretrained or small, that sees by our own encoder of patches."""
    dtype = DTYPES[m.dtype]
    if speech is None:
        language, projector = _small_decoder(m, cast(WordTokenizer, tokenizer).size), None
    else:
        language, projector = speech.language, VisionProjection(speech.language.width, dtype)
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


def draw_variables(config: ml_collections.ConfigDict, model: TokenModel, key: jax.Array) -> Params:
    """The model's variables, all of them newly drawn; float32.

    Raises:
      ValueError: model.lora.pattern matches no layer.
    """
    policy, nothing = model.policy, jnp.zeros(1, jnp.int32)
    question = model.texts.ask(jnp.zeros((1, *model.size, 3), jnp.uint8), *[nothing] * 4)
    params = policy.model.init(key, *policy.inputs(question))["params"]
    variables = with_adapters(params, config.model.lora, jax.random.fold_in(key, 1))
    if config.algorithm == "token_ppo":
        width = policy.model.language.width
        variables = token_learner.with_value_head(jax.random.fold_in(key, 2), variables, width)
    return variables


def make_variables(
    config: ml_collections.ConfigDict, model: TokenModel, *, start: Params | None = None
) -> Params:
    """The model's variables as a run begins with them: pretrained ones are read.

    Args:
      config: of the run.
      model: see there.
      start: parameters of a learner of supervised fine-tuning, its half.

    Returns:
      {'params': ...}, with adapters 'lora', with a value head 'value'; float32.
    """
    loaded, m = {}, config.model
    if m.pretrained is not None:
        directory = chat.directory_of(m.pretrained)
        if is_whole(m):
            loaded = hub.load_vision_language_model(directory).params["params"]
        else:
            loaded = {"language": hub.load_language_model(directory).params["params"]}

    @jax.jit
    def draw(key: jax.Array) -> Params:
        # What is loaded is not returned, and so not drawn either.
        drawn = draw_variables(config, model, key)
        kept = {name: x for name, x in drawn["params"].items() if name not in loaded}
        return drawn | {"params": kept}

    variables = draw(jax.random.fold_in(jax.random.PRNGKey(config.seed), 0))
    variables = variables | {"params": variables["params"] | loaded}
    if start is None:
        return variables
    _, frozen = partition_trainable(variables, config, "sft")
    return lora.join(start, frozen)


def partition_trainable(
    variables: Params, config: ml_collections.ConfigDict, stage: str
) -> tuple[Params, Any]:
    """What a stage, 'sft' or 'rl', trains of the variables and what it does not.

    A value head is trained whatever the pattern says, but for supervised fine-tuning, which has no
    use for it.

    Raises:
      ValueError: it trains nothing.
    """
    pattern = config[stage].trained
    if config.algorithm == "token_ppo":
        pattern = f"(?!value/)({pattern})" if stage == "sft" else f"({pattern})|value/.*"
    try:
        return lora.split(variables, pattern)
    except ValueError as error:
        raise ValueError(f"{stage}.trained: {error}") from error


def stage_variables(
    config: ml_collections.ConfigDict,
    model: TokenModel,
    params: Params,
    *,
    start: Params | None,
    stage: str,
) -> tuple[Params, Any]:
    """Both halves of the variables of a learner of a stage, 'sft' or 'rl'.

    Args:
      config: of the run.
      model: see there.
      params: of the learner.
      start: parameters of supervised fine-tuning's learner, before RL.
      stage: whose learner it is.
    """
    return params, partition_trainable(make_variables(config, model, start=start), config, stage)[1]


def stored_params(config: ml_collections.ConfigDict, model: TokenModel, stage: str) -> Params:
    """Shapes and dtypes of what a learner of a stage, 'sft' or 'rl', trains."""
    drawn = jax.eval_shape(lambda key: draw_variables(config, model, key), jax.random.key(0))
    return partition_trainable(drawn, config, stage)[0]


def check_trainable(config: ml_collections.ConfigDict, model: TokenModel) -> None:
    """Raises ValueError if a pattern of what is trained or has adapters matches nothing."""
    drawn = jax.eval_shape(lambda key: draw_variables(config, model, key), jax.random.key(0))
    for stage in ("sft", "rl"):
        partition_trainable(drawn, config, stage)
    try:
        lora.split(drawn, config.rl.trained)  # Of its own, without a value head.
    except ValueError as error:
        raise ValueError(f"rl.trained: {error}") from error
