"""Networks of control policies: the group `model` of a config, and their parameters."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import re
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mmrl_jax.config.options import (
    NON_NEGATIVE,
    PATTERN,
    POSITIVE,
    Group,
    Valid,
    group,
    option,
    options_of,
)
from mmrl_jax.config.schema import is_group
from mmrl_jax.envs.brax_api import Env
from mmrl_jax.learners.learner import Apply
from mmrl_jax.models import lora
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.models.mlp import MLPPolicy
from mmrl_jax.models.policy import Fusion, MultimodalPolicy
from mmrl_jax.models.vlm_policy import VLMPolicy
from mmrl_jax.pretrained import control_encoders
from mmrl_jax.types import Observation, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The group `lora` of a model."""

    pattern: str | None = option(
        None,
        "Regular expression of the whole paths of the layers that get low-rank adapters; None for "
        "no adapters.",
        PATTERN,
    )
    rank: int = option(8, "Rank of the adapters.", POSITIVE)
    alpha: float = option(16.0, "What an adapter adds is scaled by alpha / rank.", POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPOptions:
    """A perceptron that reads proprioception alone."""

    kind: Literal["mlp"] = option("mlp", "Kind of model.")
    lora: LoraOptions = group(LoraOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the group `model` has for every transformer, of control and of token policies."""

    lora: LoraOptions = group(LoraOptions)
    dtype: Dtype = option("float32", "Dtype of the computation; parameters are float32.")
    remat: bool = option(False, "Recompute activations in the backward pass to save memory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchOptions(ModelOptions):
    """What it has for every model that sees by our own encoder of patches."""

    width: int = option(64, "Width of the tokens.", POSITIVE)
    heads: int = option(1, "Attention heads; they divide the width.", POSITIVE)
    mlp_ratio: int = option(2, "Hidden width of a block's MLP over the width.", POSITIVE)
    patch: int = option(
        8, "Edge of an image patch in pixels; it divides the images' height and width.", POSITIVE
    )
    patch_margin: int = option(0, "Pixels around a patch that its token also sees.", NON_NEGATIVE)
    patch_hidden: int = option(128, "Hidden units of the perceptron of each patch.", POSITIVE)
    vision_layers: int = option(0, "Blocks over the patches alone.", NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SeeingOptions(ModelOptions):
    auxiliary: tuple[tuple[str, int], ...] = option(
        (), "Privileged targets that the model predicts beside acting: ((name, size), ...)."
    )
    pointing: str | None = option(
        None, "Privileged position in the image that the model points at; None for no such target."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultimodalOptions(PatchOptions, _SeeingOptions):
    """Our own transformer over image patches, words and proprioception."""

    kind: Literal["multimodal"] = option("multimodal", "Kind of model.")
    layers: int = option(2, "Blocks of the fusion stack.", POSITIVE)
    text_layers: int = option(0, "Blocks over the words alone, before the fusion.", NON_NEGATIVE)
    film: bool = option(True, "Modulate the patches by the instruction before the fusion (FiLM).")
    fusion: Fusion = option("joint", "How the modalities are fused, see MultimodalPolicy.")
    text_encoder: str | None = option(
        None,
        "Frozen encoder of the instructions: 'minilm', or a directory of BERT, CLIP or SigLIP; "
        "None for one that is trained from scratch.",
    )
    vision_encoder: str | None = option(
        None,
        "Pretrained encoder of the images, a directory of CLIP or SigLIP; None for patches that "
        "are trained from scratch.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMOptions(_SeeingOptions):
    """A whole pretrained vision-language model with heads for actions and values."""

    kind: Literal["vlm"] = option("vlm", "Kind of model.")
    checkpoint: str | None = option(
        None,
        "Directory, in the format of the Hugging Face hub, of Idefics3, SmolVLM, PaliGemma, LLaVA "
        "or LLaVA-OneVision.",
    )
    prompt: str = option(
        "{image}{instruction}",
        "Prompt that the model reads.",
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
# Of each kind a config to begin with.
CONFIGS = {"multimodal": "reach_ppo", "vlm": "reach_vlm", "mlp": "mlp_ppo"}


def options(config: Any) -> Group:
    """Returns the keys of 'model' that the config's kind of model reads, see `options_of_kind`."""
    return options_of_kind(config, MODELS, CONFIGS)


def options_of_kind(config: Any, models: Mapping[str, type], configs: Mapping[str, str]) -> Group:
    """Returns the keys of 'model' that the config's kind of model reads.

    Args:
      config: Of the run; may lack keys.
      models: The kinds of models, the default one first, and the dataclasses of their options.
      configs: Of each kind a config to begin with.

    Raises:
      ValueError: The kind is unknown, or the config has keys that only models of other kinds read.
    """
    model = config.get("model", {})
    default = next(iter(models))
    kind = model.get("kind", default) if is_group(model) else default
    if kind not in models:
        raise ValueError(
            f"Config key 'model.kind' is {kind!r}, but must be one of "
            f"{', '.join(map(repr, models))}."
        )
    known = options_of(models[kind])
    others = {name: options_of(other) for name, other in models.items() if name != kind}
    unread = [
        key
        for key in (model if is_group(model) else ())
        if key not in known and any(key in other for other in others.values())
    ]
    if unread:
        fitting = [name for name, other in others.items() if set(unread) <= set(other)]
        raise ValueError(
            f"model.kind={kind!r} does not read "
            + ", ".join(f"model.{key}={model[key]!r}" for key in unread)
            + ": leave these keys out of the config"
            + (
                f", or begin with the config {configs[fitting[0]]!r} of model.kind={fitting[0]!r}"
                if fitting
                else ""
            )
            + f"; the config {configs[kind]!r} has the keys of model.kind={kind!r}."
        )
    return known


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the sizes of the model against each other and against the images.

    Raises:
      ValueError: Names the field, its value and the remedy.
    """
    env, model = config.env, config.model
    if model.kind == "mlp":
        if env.height:
            raise ValueError(
                f"env.height={env.height}, but model.kind='mlp' sees no pixels; set env.height and "
                f"env.width to 0, or begin with the config {CONFIGS['multimodal']!r}."
            )
        return
    if not env.height or not env.width:
        raise ValueError(
            f"env.height={env.height}, env.width={env.width}: model.kind={model.kind!r} needs "
            f"pixels; give both a size, or begin with the config {CONFIGS['mlp']!r}."
        )
    if model.kind == "vlm":
        if model.checkpoint is None:
            raise ValueError(
                "model.checkpoint=None, but model.kind='vlm' is read from a local directory in the "
                "hub's format; name the directory."
            )
        if env.history != 1:
            raise ValueError(
                f"env.history={env.history}, but model.kind='vlm' sees one frame; set env.history "
                f"to 1, or begin with the config {CONFIGS['multimodal']!r}."
            )
        return
    check_patches(model, env.height, env.width, "env")
    if model.width % model.heads:
        raise ValueError(
            f"model.width={model.width} is not divisible by model.heads={model.heads}."
        )
    if model.width % 4:
        raise ValueError(f"model.width={model.width} is not divisible by 4.")


def check_patches(model: ml_collections.ConfigDict, height: int, width: int, where: str) -> None:
    """Checks the patches of images of `where`.height and .width.

    Raises:
      ValueError: The patches do not divide the images, or their margins make more than 9 copies of
        each pixel in memory.
    """
    if height % model.patch or width % model.patch:
        raise ValueError(
            f"{where}.height={height} and {where}.width={width} are not both divisible by "
            f"model.patch={model.patch}."
        )
    if model.patch_margin > model.patch:
        copies = (1 + 2 * model.patch_margin / model.patch) ** 2
        raise ValueError(
            f"model.patch_margin={model.patch_margin} makes {copies:.0f} copies of each pixel in "
            f"memory; it must be at most model.patch={model.patch}, which makes 9."
        )


def zeros(env: Env) -> Observation:
    """Returns a batch of one observation of a batched environment, all of it zero."""
    keys = jax.eval_shape(lambda: jax.random.PRNGKey(0)[None])
    observation = jax.eval_shape(env.reset, keys).obs
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), observation)


def make_network(config: ml_collections.ConfigDict, env: Env) -> nn.Module:
    """Returns the policy network for an environment.

    Raises:
      ValueError: A directory is missing, or holds no supported model; or pointing is asked of a
        model whose image features are no square grid.
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
        with _naming("text_encoder", m):
            text_encoder = control_encoders.sentence_reader(
                m.text_encoder, vocabulary.sentences, vocabulary.words
            )
    if m.vision_encoder is not None:
        with _naming("vision_encoder", m):
            vision_encoder = control_encoders.vision_encoder(
                m.vision_encoder, DTYPES[m.dtype], m.remat
            ).module
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
        remat=m.remat,
    )


@contextlib.contextmanager
def _naming(name: str, model: ml_collections.ConfigDict) -> Iterator[None]:
    """Puts the key of 'model' that names a directory before a ValueError about its files."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model.{name}={model[name]!r}: {error}") from error


def _vlm_policy(
    config: ml_collections.ConfigDict, env: Env, auxiliary: tuple[tuple[str, int], ...]
) -> VLMPolicy:
    m, size = config.model, (config.env.height, config.env.width)
    with _naming("checkpoint", m):
        read = control_encoders.vision_language_model(
            m.checkpoint,
            m.prompt,
            env.vocabulary.sentences,
            env.vocabulary.words,
            size,
            DTYPES[m.dtype],
            m.remat,
        )
    if m.pointing is not None and not read.grid:
        raise ValueError(
            f"model.pointing={m.pointing!r}, but the features of {m.checkpoint} are no square grid "
            f"over a whole frame of {size}; set it to None, or give square frames."
        )
    return VLMPolicy(
        kind=env.action_kind,
        actions=env.action_size,
        vlm=read.model,
        pictures=read.pictures,
        prompts=read.prompts,
        auxiliary=auxiliary,
        pointing=m.pointing,
    )


def pretrained_params(m: ml_collections.ConfigDict) -> dict[str, Any]:
    """Reads the pretrained parameters of a model, by the names of the modules that hold them."""
    if m.kind == "vlm":
        return {"vlm": control_encoders.vision_language_params(m.checkpoint)}
    if m.kind == "multimodal" and m.vision_encoder is not None:
        encoder = control_encoders.vision_encoder(m.vision_encoder, DTYPES[m.dtype], m.remat)
        return {"vision_encoder": encoder.params}
    return {}


def init_params(
    network: nn.Module, env: Env, m: ml_collections.ConfigDict, key: jax.Array
) -> Params:
    """Returns a model's parameters as a run begins with them; pretrained ones are read.

    Parameters that are never trained are among them too: a checkpoint is complete, and needs no
    directory to have stayed as it was.

    Args:
      network: See `make_network`.
      env: The batched environment.
      m: The group `model` of the config.
      key: Key of the parameters that are drawn.

    Raises:
      ValueError: model.lora.pattern matches no layer.
    """
    with jax.ensure_compile_time_eval():  # Arrays, where only shapes are asked for too.
        loaded, observation = pretrained_params(m), zeros(env)

    @jax.jit
    def draw(key: jax.Array) -> dict[str, Any]:
        # What is loaded is not returned, and so not drawn either.
        drawn = network.init(key, observation)["params"]
        return {name: x for name, x in drawn.items() if name not in loaded}

    return with_adapters(draw(key) | loaded, m.lora, jax.random.fold_in(key, 1))


def with_adapters(params: Any, lora_options: Any, key: jax.Array) -> Params:
    """Returns the variables of a model with these parameters, and the adapters of model.lora.

    Raises:
      ValueError: The pattern matches no layer.
    """
    if lora_options.pattern is None:
        return {"params": params}
    adapters = lora.LoraGroup(lora_options.pattern, lora_options.rank, lora_options.alpha)
    try:
        return {"params": params, "lora": lora.init(key, params, [adapters])}
    except ValueError as error:
        raise ValueError(f"model.lora.pattern: {error}") from error


def shapes(network: nn.Module, env: Env, m: ml_collections.ConfigDict) -> Params:
    """Returns the shapes of a model's parameters; reads and compiles no pretrained weights.

    Raises:
      ValueError: model.lora.pattern matches no layer.
    """
    observation = zeros(env)

    def init(key: jax.Array) -> Params:
        return with_adapters(network.init(key, observation)["params"], m.lora, key)

    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.PRNGKey(0)))


def is_trainable(path: tuple[Any, ...], trainable: str) -> bool:
    """Returns whether a pattern matches the whole path of a leaf, e.g. 'params/vlm/table'."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return re.fullmatch(trainable, name) is not None


def check_trainable(variables: Params, trainable: str, key: str) -> None:
    """Checks that a pattern matches a leaf of these variables.

    Args:
      variables: Parameters and adapters, or their shapes.
      trainable: The pattern.
      key: The key of the config that holds the pattern, for the message.

    Raises:
      ValueError: The pattern matches none.
    """
    try:
        lora.split(variables, trainable)
    except ValueError as error:
        raise ValueError(f"{key}={trainable!r}: {error}") from error


def make_apply(network: nn.Module, trainable: str = ".*") -> Apply:
    """Returns a policy network as a function of parameters and observations.

    Args:
      network: See `make_network`.
      trainable: Regular expression of the whole paths of the parameters that are trained; no
        gradient is computed for the others.
    """
    if trainable == ".*":
        return cast(Apply, network.apply)

    def apply(params: Params, observation: Observation) -> PolicyOutput:
        stopped = jax.tree_util.tree_map_with_path(
            lambda path, x: x if is_trainable(path, trainable) else jax.lax.stop_gradient(x), params
        )
        return cast(PolicyOutput, network.apply(stopped, observation))

    return apply
