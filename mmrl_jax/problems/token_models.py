"""Models of token policies and their variables."""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mmrl_jax.distributed import partition
from mmrl_jax.learners import token_learner
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.models import lora, stacked
from mmrl_jax.models.encoders import VisionEncoder, VisionProjection
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.towers import ResizingVisionTower
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.models.vlm import PatchVision, VisionLanguageModel, check_counts
from mmrl_jax.pretrained import chat, hub, vision_chat, vision_encoders, weights
from mmrl_jax.pretrained.vision_chat import VLMSpec
from mmrl_jax.problems.control_models import error_prefix, with_adapters
from mmrl_jax.problems.model_options import DTYPES, remat_of
from mmrl_jax.tasks.prompts import Texts, Tokenizer, WordTokenizer
from mmrl_jax.training import fingerprints
from mmrl_jax.types import Params


class DecoderSpec(NamedTuple):
    """A pretrained decoder without its weights.

    Attributes:
      language: Decoder.
      chat: Tokenizer and chat template of the decoder.
      vision: Pretrained image encoder; None for one from scratch.
    """

    language: LanguageModel
    chat: chat.ChatTokenizer
    vision: ResizingVisionTower | None


def read_spec(m: ml_collections.ConfigDict, size: tuple[int, int]) -> DecoderSpec | VLMSpec | None:
    """Reads a pretrained model without its weights; None for a model from scratch.

    Args:
      m: Group `model` of the config.
      size: Height and width of the images in pixels.

    Raises:
      ValueError: If the model cannot be read, see `hub.read_blueprint`, `chat.read_chat` and
        `vision_chat.read_spec`.
    """
    if m.kind == "scratch":
        return None
    arguments: dict[str, Any] = {"dtype": DTYPES[m.dtype], "remat": remat_of(m)}
    try:
        directory = chat.directory_of(m.checkpoint)
        if m.kind == "vlm":
            return vision_chat.read_spec(
                directory.resolve(), size, splitting=m.image_splitting, **arguments
            )
        language = cast(
            LanguageModel, hub.read_blueprint("language_model", directory, **arguments).model
        )
        # The size of the vocabulary serves as image token, because no text has this id.
        tokenizer = chat.read_chat(directory.resolve(), language.vocabulary)
    except ValueError as error:
        raise ValueError(f"model.checkpoint={m.checkpoint!r}: {error}") from error
    if m.vision_encoder is None:
        return DecoderSpec(language, tokenizer, None)
    with error_prefix("vision_encoder", m):
        vision = vision_encoders.read_encoder(m.vision_encoder, m.vision_size, **arguments)
    return DecoderSpec(language, tokenizer, vision)


def dependencies(m: ml_collections.ConfigDict, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the fingerprints of the pretrained model, see `fingerprints`.

    Args:
      m: Group `model` of the config.
      tokenizer: Tokenizer of the model.
    """
    if m.kind == "scratch":
        return {}
    chat_tokenizer = cast(chat.ChatTokenizer, tokenizer)
    found = {
        "base_weights": weights.fingerprint(chat.directory_of(m.checkpoint)),
        "chat_template": fingerprints.digest(chat_tokenizer.rendered()),
    }
    if m.get("vision_encoder") is not None:
        directory = vision_encoders.directory_of(m.vision_encoder)
        found["vision_encoder"] = weights.fingerprint(directory)
    return found


class TokenModel(NamedTuple):
    """A token policy, and the inputs with which its variables are initialized.

    Attributes:
      policy: Policy.
      texts: Prompts and answers of the task with their tokens.
      size: Height and width of the images in pixels.
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
    """Returns the policy that completes prompts with images of a given size.

    Args:
      m: Group `model` of the config.
      spec: Pretrained model, see `read_spec`; None for a model from scratch.
      texts: Texts of the task, with `image_tokens` tokens for an image.
      size: Height and width of the images in pixels.

    Raises:
      ValueError: If a prompt has a wrong number of image tokens, see `vlm.check_counts`.
    """
    tokenizer = texts.tokenizer
    ends = texts.max_answer_length, tokenizer.stops, tokenizer.pad
    if isinstance(spec, VLMSpec):
        policy = TokenPolicy(spec.model, *ends, spec.preprocess_images, spec.positions)
    else:
        policy = TokenPolicy(_with_patches(m, spec, tokenizer), *ends)
    if spec is not None:
        policy = dataclasses.replace(
            policy,
            model=cast(VisionLanguageModel, stacked.with_scan(policy.model, m.scan_layers)),
            gather_for_sampling=m.gather_for_sampling,
        )
    mask = np.ones((len(texts.prompts), image_tokens(m, spec, size)), bool)
    check_counts(texts.prompt_tokens == tokenizer.image, mask)
    return TokenModel(dataclasses.replace(policy, attention=m.attention), texts, size)


def image_tokens(
    m: ml_collections.ConfigDict, spec: DecoderSpec | VLMSpec | None, size: tuple[int, int]
) -> int:
    """Returns the number of tokens of an image.

    Args:
      m: Group `model` of the config.
      spec: Pretrained model, see `read_spec`; None for a model from scratch.
      size: Height and width of the images in pixels.
    """
    if isinstance(spec, VLMSpec):
        return spec.image_tokens
    if spec is not None and spec.vision is not None:
        return vision_encoders.features(spec.vision)
    return (size[0] // m.patch) * (size[1] // m.patch)


def _with_patches(
    m: ml_collections.ConfigDict, spec: DecoderSpec | None, tokenizer: Tokenizer
) -> VisionLanguageModel:
    """Returns a pretrained or a small decoder with its vision encoder."""
    dtype = DTYPES[m.dtype]
    if spec is None:
        language, projector = _small_decoder(m, cast(WordTokenizer, tokenizer).size), None
    else:
        language, projector = spec.language, VisionProjection(spec.language.width, dtype)
    if spec is not None and spec.vision is not None:
        vision = PatchVision(projector=projector)
        return VisionLanguageModel(vision, language, tokenizer.image, vision_encoder=spec.vision)
    encoder = VisionEncoder(
        m.width,
        m.patch,
        m.patch_margin,
        m.patch_hidden,
        layers=m.vision_layers,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        dtype=dtype,
        remat=remat_of(m),
    )
    return VisionLanguageModel(PatchVision(encoder, projector), language, tokenizer.image)


def _small_decoder(m: ml_collections.ConfigDict, vocabulary: int) -> LanguageModel:
    """Returns a small language model for training from scratch."""
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
        remat=remat_of(m),
    )


def init_variables(
    m: ml_collections.ConfigDict, model: TokenModel, key: jax.Array, *, value_head: bool
) -> Params:
    """Returns randomly initialized variables of a model in float32, with unrolled blocks.

    Args:
      m: Group `model` of the config.
      model: Model, see `make_model`.
      key: PRNG key of the parameters.
      value_head: Whether to add a value head as 'value'.

    Raises:
      ValueError: If model.lora.pattern matches no layer.
    """
    policy, index = model.policy, jnp.zeros(1, jnp.int32)
    prompt = model.texts.make_prompts(jnp.zeros((1, *model.size, 3), jnp.uint8), *[index] * 4)
    unrolled = stacked.with_scan(policy.model, False)
    params = unrolled.init(key, *policy.inputs(prompt))["params"]
    variables = with_adapters(params, m.lora, jax.random.fold_in(key, 1))
    if value_head:
        width = policy.model.language.width
        variables = token_learner.with_value_head(jax.random.fold_in(key, 2), variables, width)
    return variables


def store_frozen(m: ml_collections.ConfigDict, variables: Params, trained: Sequence[str]) -> Params:
    """Converts pretrained parameters that no stage trains to model.frozen_dtype.

    Args:
      m: Group `model` of the config.
      variables: Variables of the whole model.
      trained: Regular expressions, any of which matches the full path of a variable that a stage
        trains.
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


def check_frozen(config: ml_collections.ConfigDict, shapes: Params) -> None:
    """Checks that model.frozen_dtype applies to any parameter.

    Args:
      config: Config of the run.
      shapes: Shapes of the variables of the whole model.

    Raises:
      ValueError: If the stages train all pretrained parameters.
    """
    dtype = config.model.get("frozen_dtype", "float32")
    if dtype != "float32" and all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes)):
        patterns = {name: config[name].trainable for name in config.stages}
        raise ValueError(
            f"model.frozen_dtype={dtype!r}, but the stages train all pretrained parameters: "
            f"trainable={patterns}. Give a pattern that matches fewer, for example 'lora/.*', or "
            "set model.frozen_dtype='float32'."
        )


def check_heads(model: VisionLanguageModel | LanguageModel, mesh: Mesh) -> None:
    """Checks that the attention heads of the language model can be split over the mesh.

    Args:
      model: Model of the policy.
      mesh: Device mesh.

    Raises:
      ValueError: If mesh.tensor does not divide the number of heads.
    """
    language = model if isinstance(model, LanguageModel) else model.language
    heads, tensor = language.block.heads, mesh.shape[partition.TENSOR]
    if heads % tensor:
        raise ValueError(
            f"mesh.tensor={tensor} does not divide the {heads} attention heads of the language "
            "model; choose a divisor, and split the parameters further with mesh.fsdp."
        )


def _frozen_dtype(
    m: ml_collections.ConfigDict, trained: Sequence[str]
) -> Callable[[str], jnp.dtype]:
    """Returns a function from the path of a parameter to the data type in which it is read."""

    def dtype(name: str) -> jnp.dtype:
        parts = ("language/", "vision_encoder/")
        pretrained = m.kind == "vlm" or (m.kind == "decoder" and name.startswith(parts))
        full = m.get("frozen_dtype", "float32") == "float32" or not pretrained
        is_trained = any(re.fullmatch(pattern, f"params/{name}") for pattern in trained)
        return jnp.float32 if full or is_trained else jnp.bfloat16

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
    trained: Sequence[str],
) -> Params:
    """Returns the initial variables of a model, with pretrained weights if it has any.

    At no time does a device hold more than its part of the variables.

    Args:
      m: Group `model` of the config.
      model: Model, see `make_model`.
      key: PRNG key of the parameters that are initialized randomly.
      mesh: Device mesh over which the variables are split, see `partition`.
      value_head: Whether to add a value head as 'value'.
      trained: Regular expressions, any of which matches the full path of a variable that a stage
        trains.

    Returns:
      Variables {'params': ...}, with 'lora' for adapters and 'value' for a value head. They are
      float32, except for those of `store_frozen`.
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
        if m.vision_encoder is not None:
            loaded["vision_encoder"] = vision_encoders.read_params(
                m.vision_encoder,
                mesh=mesh,
                param_dtype=lambda name: dtype(f"vision_encoder/{name}"),
            )

    def init(key: jax.Array) -> Params:
        # Pretrained parameters are not returned, so that XLA does not initialize them.
        variables = init_variables(m, model, key, value_head=value_head)
        new = {name: x for name, x in variables["params"].items() if name not in loaded}
        return variables | {"params": new}

    shardings = partition.shardings(jax.eval_shape(init, key), mesh)
    variables = jax.jit(init, out_shardings=shardings)(key)
    variables = variables | {"params": variables["params"] | loaded}
    return stacked.stack(store_frozen(m, variables, trained), model.policy.model)


def partition_trainable(
    variables: Params, trainable: str, *, trains_value_head: bool, key: str
) -> tuple[Params, Any]:
    """Splits variables into those that a stage trains and the frozen ones.

    A value head is trained exactly by the stages that use it, independent of the pattern.

    Args:
      variables: Variables of the whole model.
      trainable: Regular expression that matches the full paths of the variables to train.
      trains_value_head: Whether the stage uses the value head.
      key: Config key of the pattern, for the error message.

    Raises:
      ValueError: If the pattern matches no variable.
    """
    pattern = trainable
    if "value" in variables:
        pattern = f"({trainable})|value/.*" if trains_value_head else f"(?!value/)({trainable})"
    try:
        return lora.split(variables, pattern)
    except ValueError as error:
        raise ValueError(f"{key}={trainable!r}: {error}") from error
