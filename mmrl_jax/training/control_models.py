"""Networks of control policies: what a config's 'model' means, and their parameters."""

from collections.abc import Iterator
import contextlib
import re
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mmrl_jax.envs.brax_api import Env
from mmrl_jax.learners import learner as learner_lib
from mmrl_jax.learners.learner import Apply, LearnerState
from mmrl_jax.models import lora
from mmrl_jax.models.heads import PolicyOutput
from mmrl_jax.models.mlp import MLPPolicy
from mmrl_jax.models.policy import FUSIONS, MultimodalPolicy
from mmrl_jax.models.vlm_policy import VLMPolicy
from mmrl_jax.pretrained import control_encoders
from mmrl_jax.training import config as config_lib
from mmrl_jax.training.config import Field, anything, non_negative, one_of, pattern, positive
from mmrl_jax.types import Observation, Params

MODELS = ("multimodal", "vlm", "mlp")
# Of each kind a config that has its keys.
CONFIGS = {
    "multimodal": "configs/reach_ppo.py",
    "vlm": "configs/reach_vlm.py",
    "mlp": "configs/mlp_ppo.py",
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

LORA: config_lib.Schema = {
    "pattern": pattern(
        (str, type(None)), "of the paths of layers that get adapters; None for no adapters"
    ),
    "rank": positive(int, "of the adapters"),
    "alpha": positive(float, "what adapters add is scaled by alpha / rank"),
}

MODEL: config_lib.Schema = {
    "kind": one_of(
        MODELS,
        "'vlm' is a whole vision-language model, 'mlp' sees proprioception only; a config has the "
        "keys that its kind reads and no others",
    ),
    "width": positive(int, "of the tokens"),
    "layers": positive(int, "blocks of the fusion stack"),
    "heads": positive(int, "attention heads; must divide the width"),
    "mlp_ratio": positive(int, "hidden width of a block's MLP over the width"),
    "patch": positive(int, "edge of an image patch, pixels; must divide height and width"),
    "patch_margin": non_negative(int, "pixels around a patch that its token sees too"),
    "patch_hidden": positive(int, "hidden units of the per-patch perceptron"),
    "vision_layers": non_negative(int, "blocks among the patches before fusion"),
    "text_layers": non_negative(int, "blocks among the words before fusion"),
    "film": anything(bool, "modulate patches by the instruction before fusion"),
    "fusion": one_of(FUSIONS, "of the modalities, see MultimodalPolicy"),
    "auxiliary": anything(tuple, "((name, size), ...) of privileged targets to predict"),
    "pointing": anything((str, type(None)), "privileged place in the picture to point at"),
    "text_encoder": anything(
        (str, type(None)),
        "'minilm' or a directory of BERT, CLIP or SigLIP, frozen, that reads the instructions",
    ),
    "vision_encoder": anything(
        (str, type(None)), "directory of CLIP or SigLIP, that sees the pictures"
    ),
    "directory": anything(
        (str, type(None)),
        "of Idefics3, SmolVLM, PaliGemma, LLaVA or LLaVA-OneVision, for kind 'vlm'",
    ),
    "prompt": Field(
        str,
        lambda x: x.count("{image}") == x.count("{instruction}") == 1,
        "a text with one '{image}' and one '{instruction}'",
        "that kind 'vlm' reads",
    ),
    "frozen": pattern(
        (str, type(None)),
        "pattern of the paths of parameters that are not trained; adapters always are",
    ),
    "lora": LORA,
    "dtype": one_of(tuple(DTYPES), "of the computation; parameters are float32"),
    "remat": anything(bool, "recompute activations in the backward pass"),
}


_ALL = ("kind", "frozen", "lora")
_SEEING = (*_ALL, "auxiliary", "pointing", "dtype", "remat")
# The keys that each kind of model reads.
READ = {
    "multimodal": tuple(name for name in MODEL if name not in ("directory", "prompt")),
    "vlm": (*_SEEING, "directory", "prompt"),
    "mlp": _ALL,
}


# The configs that have a key which others have not.
ELSEWHERE = {
    f"model.{name}": "model.kind=" + " or ".join(repr(k) for k in MODELS if name in READ[k])
    for name in MODEL
    if name not in _ALL
}


def schema(config: ml_collections.ConfigDict) -> config_lib.Schema:
    """The keys of 'model' that the config's kind of model reads.

    Raises:
      ValueError: the config has keys that only models of another kind read.
    """
    model = config.get("model")
    kind = model.get("kind") if isinstance(model, ml_collections.ConfigDict) else None
    if kind not in MODELS:
        return MODEL  # Whose check says so.
    unread = [name for name in model if name in MODEL and name not in READ[kind]]
    if unread:
        others = [other for other in MODELS if set(unread) <= set(READ[other])]
        raise ValueError(
            f"model.kind={kind!r} does not read "
            + ", ".join(f"model.{name}={model[name]!r}" for name in unread)
            + ": leave these keys out of the config"
            + (
                f", or begin with {CONFIGS[others[0]]}, of model.kind={others[0]!r}"
                if others
                else ""
            )
            + f"; {CONFIGS[kind]} has the keys of model.kind={kind!r}."
        )
    return {name: MODEL[name] for name in READ[kind]}


def check_vlm(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for what a whole vision-language model needs, or cannot do."""
    if config.model.directory is None:
        raise ValueError(
            "model.directory=None, but model.kind='vlm' is read from a local directory in the "
            "hub's format; name it."
        )
    if config.env.history != 1:
        raise ValueError(
            f"env.history={config.env.history}, but model.kind='vlm' sees one frame; set "
            f"env.history to 1, or begin with {CONFIGS['multimodal']}."
        )


def check_multimodal(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for sizes of our own transformer that do not fit each other."""
    env, model = config.env, config.model
    if env.height % model.patch or env.width % model.patch:
        raise ValueError(
            f"env.height={env.height} and env.width={env.width} are not both divisible by "
            f"model.patch={model.patch}."
        )
    check_margin(model)
    if model.width % model.heads:
        raise ValueError(
            f"model.width={model.width} is not divisible by model.heads={model.heads}."
        )
    if model.width % 4:
        raise ValueError(f"model.width={model.width} is not divisible by 4.")


def check_margin(model: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a margin that makes more than 9 copies of each pixel in memory."""
    if model.patch_margin > model.patch:
        copies = (1 + 2 * model.patch_margin / model.patch) ** 2
        raise ValueError(
            f"model.patch_margin={model.patch_margin} makes {copies:.0f} copies of each pixel in "
            f"memory; it must be at most model.patch={model.patch}, which makes 9."
        )


def check_network(config: ml_collections.ConfigDict, env: Env) -> None:
    """Builds the network and its parameters' shapes; reads and compiles no pretrained weights.

    Raises:
      ValueError: a directory is not there or not of a supported model, a pattern matches nothing,
        or see `make_network`.
    """
    m = config.model

    def shapes(key: jax.Array) -> Params:
        return with_adapters(network.init(key, zeros)["params"], m.lora, key)

    network, zeros = make_network(config, env), _zeros(env)
    check_frozen(jax.eval_shape(shapes, jax.eval_shape(lambda: jax.random.PRNGKey(0))), m.frozen)


def check_frozen(variables: Params, frozen: str | None) -> None:
    """Raises ValueError if a pattern of frozen parameters matches none of these variables'."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    if frozen is not None and not any(is_fitting(path, frozen) for path in paths):
        raise ValueError(
            f"model.frozen={frozen!r} is the whole path of no parameter; these are: "
            + ", ".join(_name(path)[1] for path in paths)
        )


def _zeros(env: Env) -> Observation:
    """A batch of one observation of a batched environment, all of it zero."""
    keys = jax.eval_shape(lambda: jax.random.PRNGKey(0)[None])
    observation = jax.eval_shape(env.reset, keys).obs
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), observation)


def make_network(config: ml_collections.ConfigDict, env: Env) -> nn.Module:
    """The policy network for an environment."""
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
    with _naming("directory", m):
        read = control_encoders.vision_language_model(
            m.directory,
            m.prompt,
            env.vocabulary.sentences,
            env.vocabulary.words,
            size,
            DTYPES[m.dtype],
            m.remat,
        )
    if m.pointing is not None and not read.grid:
        raise ValueError(
            f"model.pointing={m.pointing!r}, but the features of {m.directory} are no square grid "
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


def make_apply(config: ml_collections.ConfigDict, env: Env) -> Apply:
    """The policy network as a function of parameters and observations."""
    network, frozen = make_network(config, env), config.model.frozen
    if frozen is None:
        return cast(Apply, network.apply)

    def apply(params: Params, observation: Observation) -> PolicyOutput:
        # No gradient is computed where none is used.
        stopped = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.stop_gradient(x) if is_fitting(path, frozen) else x, params
        )
        return cast(PolicyOutput, network.apply(stopped, observation))

    return apply


def _name(path: tuple[Any, ...]) -> tuple[str, str]:
    """A leaf's collection and its path within, 'params' and 'vision_encoder/tower/norm/scale'."""
    collection, _, name = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
    return collection, name


def is_fitting(path: tuple[Any, ...], pattern: str) -> bool:
    """Whether a leaf is a parameter, and no adapter, whose whole path the pattern fits."""
    collection, name = _name(path)
    return collection == "params" and re.fullmatch(pattern, name) is not None


def fresh_learner(
    config: ml_collections.ConfigDict, env: Env, optimizer: optax.GradientTransformation
) -> LearnerState:
    """A learner whose parameters are newly initialized, pretrained ones read from their directory.

    Frozen ones are among the parameters too, without a state of the optimizer: a checkpoint is
    complete, and needs no directory to have stayed as it was.
    """
    m = config.model
    key = jax.random.fold_in(jax.random.PRNGKey(config.seed), 0)
    zeros, loaded = _zeros(env), {}
    with jax.ensure_compile_time_eval():  # Numbers, where only shapes are asked for too.
        if m.kind == "vlm":
            loaded["vlm"] = control_encoders.vision_language_params(m.directory)
        elif m.kind == "multimodal" and m.vision_encoder is not None:
            loaded["vision_encoder"] = control_encoders.vision_encoder(
                m.vision_encoder, DTYPES[m.dtype], m.remat
            ).params
        network = make_network(config, env)

    @jax.jit
    def draw(key: jax.Array) -> dict[str, Any]:
        # What is loaded is not returned, and so not drawn either.
        drawn = network.init(key, zeros)["params"]
        return {name: x for name, x in drawn.items() if name not in loaded}

    params = with_adapters(draw(key) | loaded, m.lora, jax.random.fold_in(key, 1))
    check_frozen(params, m.frozen)
    return learner_lib.init(params, optimizer=optimizer, proprio_size=zeros["proprio"].shape[-1])


def with_adapters(params: Any, options: ml_collections.ConfigDict, key: jax.Array) -> Params:
    """The variables of a model with these parameters, and the adapters that model.lora asks for.

    Raises:
      ValueError: the pattern matches no layer.
    """
    if options.pattern is None:
        return {"params": params}
    group = lora.LoraGroup(options.pattern, options.rank, options.alpha)
    try:
        return {"params": params, "lora": lora.init(key, params, [group])}
    except ValueError as error:
        raise ValueError(f"model.lora.pattern: {error}") from error


def with_std(params: Any, std: float) -> Any:
    """Parameters with the policy head's log std set; those without one as they are."""

    def visit(path: tuple, x: jax.Array) -> jax.Array:
        return jnp.full_like(x, np.log(std)) if _name(path)[1].endswith("/log_std") else x

    return jax.tree_util.tree_map_with_path(visit, params)
