"""Networks of control policies: the options of the group `model`, and their parameters."""

from collections.abc import Iterator
import contextlib
import dataclasses
import re
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from mmrl_jax.config.options import (
    NON_NEGATIVE,
    POSITIVE,
    Group,
    Valid,
    group,
    option,
)
from mmrl_jax.distributed.mesh import on_mesh, only_described
from mmrl_jax.envs.brax_api import Env
from mmrl_jax.learners.learner import Apply
from mmrl_jax.models import lora
from mmrl_jax.models.attention import Implementation, attention_by
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.models.mlp import MLPPolicy
from mmrl_jax.models.policy import Fusion, MultimodalPolicy
from mmrl_jax.models.vlm_policy import VLMPolicy
from mmrl_jax.pretrained import control_encoders, vision_encoders
from mmrl_jax.problems.model_options import (
    DTYPES,
    LoraOptions,
    ModelOptions,
    VisionEncoderOptions,
    check_patches,
    options_of_kind,
    remat_of,
)
from mmrl_jax.types import Observation, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPOptions:
    """A multilayer perceptron with proprioception as its only input."""

    kind: Literal["mlp"] = option("mlp", "Kind of model.")
    lora: LoraOptions = group(LoraOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageModelOptions(ModelOptions):
    auxiliary: tuple[tuple[str, int], ...] = option(
        (), "Privileged targets that the model predicts in addition, ((name, size), ...)."
    )
    pointing: str | None = option(
        None, "Privileged position in the image that the model predicts; None for no such target."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultimodalOptions(VisionEncoderOptions, _ImageModelOptions):
    """A transformer of this library over image patches, words and proprioception."""

    kind: Literal["multimodal"] = option("multimodal", "Kind of model.")
    layers: int = option(2, "Number of blocks of the fusion transformer.", POSITIVE)
    text_layers: int = option(0, "Number of blocks over the words before the fusion.", NON_NEGATIVE)
    film: bool = option(
        True, "Whether the instruction modulates the patches before the fusion (FiLM)."
    )
    fusion: Fusion = option("joint", "Method of fusing the modalities, see MultimodalPolicy.")
    text_encoder: str | None = option(
        None,
        "Frozen encoder of the instructions: 'minilm', or a directory of BERT, CLIP or SigLIP; "
        "None for an encoder that is trained from scratch.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMOptions(_ImageModelOptions):
    """A pretrained vision-language model with added heads for actions and values."""

    kind: Literal["vlm"] = option("vlm", "Kind of model.")
    checkpoint: str | None = option(
        None,
        "Directory of Idefics3, SmolVLM, PaliGemma, LLaVA or LLaVA-OneVision in the Hugging Face "
        "format.",
    )
    prompt: str = option(
        "{image}{instruction}",
        "Template of the prompt.",
        Valid(
            lambda x: x.count("{image}") == x.count("{instruction}") == 1,
            "a text with one '{image}' and one '{instruction}'",
        ),
    )


MODELS: dict[str, type] = {
    "multimodal": MultimodalOptions,
    "vlm": VLMOptions,
    "mlp": MLPOptions,
}
# A public config for each kind of model, for error messages.
CONFIGS = {"multimodal": "reach_ppo", "vlm": "reach_vlm", "mlp": "mlp_ppo"}


def options(config: Any) -> Group:
    """Returns the keys of the group `model` for the kind of model, see `options_of_kind`."""
    return options_of_kind(config, MODELS, CONFIGS)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks that the sizes of the model fit each other and the images.

    Raises:
      ValueError: If a size is invalid; the message gives the field, its value and the remedy.
    """
    env, model = config.env, config.model
    if model.kind == "mlp":
        if env.height:
            raise ValueError(
                f"env.height={env.height}, but model.kind='mlp' has no image input; set env.height "
                f"and env.width to 0, or start from the config {CONFIGS['multimodal']!r}."
            )
        return
    if not env.height or not env.width:
        raise ValueError(
            f"env.height={env.height}, env.width={env.width}: model.kind={model.kind!r} needs "
            f"images; set both above 0, or start from the config {CONFIGS['mlp']!r}."
        )
    if model.kind == "vlm":
        if model.checkpoint is None:
            raise ValueError(
                "model.checkpoint=None, but model.kind='vlm' is read from a local directory in the "
                "Hugging Face format; give the directory."
            )
        if env.history != 1:
            raise ValueError(
                f"env.history={env.history}, but model.kind='vlm' has one frame as input; set "
                f"env.history to 1, or start from the config {CONFIGS['multimodal']!r}."
            )
        return
    if model.vision_encoder is None:
        check_patches(model, env.height, env.width, "env")
    if model.width % model.heads:
        raise ValueError(
            f"model.width={model.width} is not divisible by model.heads={model.heads}."
        )
    if model.width % 4:
        raise ValueError(f"model.width={model.width} is not divisible by 4.")


def zeros(env: Env) -> Observation:
    """Returns a batch of one observation of a batched environment, in which all values are zero."""
    keys = jax.eval_shape(lambda: jax.random.PRNGKey(0)[None])
    observation = jax.eval_shape(env.reset, keys).obs
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), observation)


def make_network(config: ml_collections.ConfigDict, env: Env) -> nn.Module:
    """Returns the policy network of a config for an environment.

    Raises:
      ValueError: If a directory is missing or has no supported model, or the model has a pointing
        target but its image features are not a square grid.
    """
    m = config.model
    if m.kind == "mlp":
        return MLPPolicy(kind=env.action_kind, actions=env.action_size)
    auxiliary = tuple((name, size) for name, size in m.auxiliary)
    if m.kind == "vlm":
        return _vlm_policy(config, env, auxiliary)
    text_encoder = vision_encoder = None
    if m.text_encoder is not None:
        vocabulary = env.vocabulary
        with error_prefix("text_encoder", m):
            text_encoder = control_encoders.sentence_reader(
                m.text_encoder, vocabulary.sentences, vocabulary.words, blank=only_described()
            )
    if m.vision_encoder is not None:
        with error_prefix("vision_encoder", m):
            vision_encoder = vision_encoders.read_encoder(
                m.vision_encoder, m.vision_size, dtype=DTYPES[m.dtype], remat=remat_of(m)
            )
    return MultimodalPolicy(
        kind=env.action_kind,
        actions=env.action_size,
        vocabulary=env.vocabulary.size,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        patch=m.patch,
        patch_margin=m.patch_margin,
        patch_hidden=m.patch_hidden,
        vision_layers=m.vision_layers,
        text_layers=m.text_layers,
        film=m.film,
        fusion=m.fusion,
        auxiliary=auxiliary,
        pointing=m.pointing,
        text_encoder=text_encoder,
        vision_encoder=vision_encoder,
        dtype=DTYPES[m.dtype],
        remat=remat_of(m),
    )


@contextlib.contextmanager
def error_prefix(name: str, model: ml_collections.ConfigDict) -> Iterator[None]:
    """Adds a key of the group `model` and its value to the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model.{name}={model[name]!r}: {error}") from error


def _vlm_policy(
    config: ml_collections.ConfigDict, env: Env, auxiliary: tuple[tuple[str, int], ...]
) -> VLMPolicy:
    m, size = config.model, (config.env.height, config.env.width)
    with error_prefix("checkpoint", m):
        read = control_encoders.vision_language_model(
            m.checkpoint,
            m.prompt,
            env.vocabulary.sentences,
            env.vocabulary.words,
            size,
            DTYPES[m.dtype],
            remat_of(m),
        )
    if m.pointing is not None and not read.grid:
        raise ValueError(
            f"model.pointing={m.pointing!r}, but the features of {m.checkpoint} are not a square "
            f"grid over a frame of {size}; set it to None, or use square frames."
        )
    return VLMPolicy(
        kind=env.action_kind,
        actions=env.action_size,
        vlm=read.model,
        preprocess_images=read.preprocess_images,
        prompts=read.prompts,
        auxiliary=auxiliary,
        pointing=m.pointing,
    )


def pretrained_params(m: ml_collections.ConfigDict) -> dict[str, Any]:
    """Reads the pretrained parameters of a model, by the names of their modules."""
    if m.kind == "vlm":
        return {"vlm": control_encoders.vision_language_params(m.checkpoint)}
    if m.kind == "multimodal" and m.vision_encoder is not None:
        return {"vision_encoder": vision_encoders.read_params(m.vision_encoder)}
    return {}


def init_params(
    network: nn.Module, env: Env, m: ml_collections.ConfigDict, key: jax.Array
) -> Params:
    """Returns the initial parameters of a model, with pretrained weights if it has any.

    Frozen parameters are included, so that a checkpoint is complete and does not depend on the
    directory of the pretrained model.

    Args:
      network: Policy network, see `make_network`.
      env: Batched environment.
      m: Group `model` of the config.
      key: PRNG key of the parameters that are initialized randomly.

    Raises:
      ValueError: If model.lora.pattern matches no layer.
    """
    # Arrays are computed eagerly, also if this function is traced for its shapes.
    with jax.ensure_compile_time_eval():
        pretrained, observation = pretrained_params(m), zeros(env)

    @jax.jit
    def init(key: jax.Array) -> dict[str, Any]:
        # Pretrained parameters are not returned, so that XLA does not initialize them.
        params = network.init(key, observation)["params"]
        return {name: x for name, x in params.items() if name not in pretrained}

    return with_adapters(init(key) | pretrained, m.lora, jax.random.fold_in(key, 1))


def with_adapters(params: Any, lora_options: Any, key: jax.Array) -> Params:
    """Returns the variables of a model: its parameters, and the adapters of model.lora.

    Args:
      params: Parameters of the model.
      lora_options: Group `model.lora` of the config.
      key: PRNG key of the adapters.

    Raises:
      ValueError: If the pattern matches no layer.
    """
    if lora_options.pattern is None:
        return {"params": params}
    adapters = lora.LoraGroup(lora_options.pattern, lora_options.rank, lora_options.alpha)
    try:
        return {"params": params, "lora": lora.init(key, params, [adapters])}
    except ValueError as error:
        raise ValueError(f"model.lora.pattern: {error}") from error


def shapes(network: nn.Module, env: Env, m: ml_collections.ConfigDict) -> Params:
    """Returns shapes and dtypes of the variables of a model without reading pretrained weights.

    Raises:
      ValueError: If model.lora.pattern matches no layer.
    """
    observation = zeros(env)

    def init(key: jax.Array) -> Params:
        return with_adapters(network.init(key, observation)["params"], m.lora, key)

    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.PRNGKey(0)))


def is_trainable(path: tuple[Any, ...], trainable: str) -> bool:
    """Returns whether a pattern matches the full path of a leaf, which JAX gives as keys."""
    return matches(jax.tree_util.keystr(path, simple=True, separator="/"), trainable)


def matches(name: str, trainable: str) -> bool:
    """Returns whether a pattern matches the full path of a leaf, e.g. 'params/vlm/table'."""
    return re.fullmatch(trainable, name) is not None


def check_trainable(variables: Params, trainable: str, key: str) -> None:
    """Checks that a pattern matches at least one variable.

    Args:
      variables: Parameters and adapters, or their shapes.
      trainable: Regular expression for full paths.
      key: Config key of the pattern, for the error message.

    Raises:
      ValueError: If the pattern matches no variable.
    """
    try:
        lora.split(variables, trainable)
    except ValueError as error:
        raise ValueError(f"{key}={trainable!r}: {error}") from error


def make_apply(
    network: nn.Module,
    mesh: Mesh,
    trainable: str = ".*",
    attention: Implementation = "auto",
) -> Apply:
    """Returns a policy network as a function of parameters and observations.

    Args:
      network: Policy network, see `make_network`.
      mesh: Device mesh of the parameters.
      trainable: Regular expression that matches the full paths of the parameters to train. No
        gradient is computed for the others.
      attention: Who computes attention, see `attention_by`.
    """

    def apply(params: Params, observation: Observation) -> PolicyOutput:
        if trainable != ".*":
            params = jax.tree_util.tree_map_with_path(
                lambda path, x: x if is_trainable(path, trainable) else jax.lax.stop_gradient(x),
                params,
            )
        with on_mesh(mesh), attention_by(attention):
            return cast(PolicyOutput, network.apply(params, observation))

    return apply
