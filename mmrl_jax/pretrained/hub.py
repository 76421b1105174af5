"""Models from local directories in the hub's format, config.json and safetensors, and back."""

from collections.abc import Callable, Collection, Mapping
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmrl_jax.distributed import partition
from mmrl_jax.models import lora
from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.towers import TextTower, VisionTower
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained import safetensors_files, weights
from mmrl_jax.pretrained.families import config_keys, decoders, encoders, qwen_vl, vlm

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
VISION = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
TEXT = ("bert", "clip", "clip_text_model", "siglip", "siglip_text_model")
TOWERS = ("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision")
WORDS = (jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_))
BUFFERS = (r".*\.inv_freq", r".*\.position_ids")
# What lies beside the weights and is data: configs, vocabularies, templates. The weights' index is
# of other files, and transformers would add an adapter that it finds.
DATA = (".json", ".txt", ".model", ".jinja")
NOT_DATA = (safetensors_files.INDEX, "config.json", "adapter_config.json")
# Of a config, what says nothing about the model.
RECORDS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: the Linen module.
      params: its variables, for `model.apply`.
      config: the hub's config of the model, complete with defaults.
    """

    model: nn.Module
    params: Any
    config: Mapping[str, Any]


class Blueprint(NamedTuple):
    """A model without its parameters, and how the hub's tensors become those.

    Attributes:
      model: the Linen module.
      config: see `Pretrained`.
      keys: the hub's module names -> ours, see `weights.counterparts`.
      inputs: shapes and dtypes of what the model takes.
      ignored: patterns of the hub's tensors that the model has no use for.
      tied: patterns of those that are a parameter of ours once more.
    """

    model: nn.Module
    config: Mapping[str, Any]
    keys: Mapping[str, str]
    inputs: tuple
    ignored: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    def shapes(self, dtype: jnp.dtype) -> Any:
        """Of the parameters."""
        like = jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)["params"]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like)


def read_config(directory: str | pathlib.Path) -> dict[str, Any]:
    """The config of a local directory, with transformers' defaults for what it leaves out.

    Keys that transformers does not read are not in it.

    Raises:
      ValueError: there is none, it is damaged or of no model that transformers knows without
        running code, or it asks for what is not supported, see `config_keys.followed`.
    """
    from transformers import AutoConfig

    path = pathlib.Path(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give a local directory in the hub's format.")
    file = path / "config.json"
    try:
        if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("it is no object")
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Of values that make no sense, transformers raises errors of any type.
    except Exception as error:
        raise ValueError(
            f"{file} is damaged, or of no model that we know ({type(error).__name__}: {error}). "
            "Fetch it again, or correct it."
        ) from error
    try:
        return config_keys.followed(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_language_model(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> Pretrained:
    """Loads a decoder: Llama, Qwen2, Qwen3, Gemma 1 to 3.

    Args:
      directory: local, in the hub's format.
      dtype: of the parameters and of the computation.
      remat: recompute each block's activations in the backward pass.
      mesh: the parameters go there, and each process reads what its devices hold; None: to the
        default device.
      rules: which parts go to which devices, see `partition.shardings`.

    Raises:
      ValueError: the family is not supported, or see `weights.load` and `partition.shardings`.
    """
    return load("language_model", directory, dtype=dtype, remat=remat, mesh=mesh, rules=rules)


def load_vision_tower(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> Pretrained:
    """Loads the picture half of CLIP or SigLIP, from a directory of both halves or of that alone.

    For arguments and errors see `load_language_model`.
    """
    return load("vision_tower", directory, dtype=dtype, remat=remat, mesh=mesh, rules=rules)


def load_text_tower(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> Pretrained:
    """Loads a text encoder: BERT-type ones, or the text half of CLIP or SigLIP.

    For arguments and errors see `load_language_model`.
    """
    return load("text_tower", directory, dtype=dtype, remat=remat, mesh=mesh, rules=rules)


def load_vision_language_model(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> Pretrained:
    """Loads a vision-language model.

    Idefics3, SmolVLM, PaliGemma, LLaVA, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL.

    For arguments and errors see `load_language_model`; the family's tower and decoder may be what
    is not supported, too.
    """
    return load(
        "vision_language_model", directory, dtype=dtype, remat=remat, mesh=mesh, rules=rules
    )


def load(
    kind: str,
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype,
    remat: bool,
    mesh: Mesh | None,
    rules: partition.Rules,
) -> Pretrained:
    """Loads a model of a kind of `KINDS`; for the rest see `load_language_model`."""
    path = pathlib.Path(directory)
    plan = read_blueprint(kind, path, dtype=dtype, remat=remat)
    like = plan.shapes(dtype)
    params = weights.load(
        path,
        like,
        plan.keys,
        ignored=(*plan.ignored, *plan.tied),
        shardings=None if mesh is None else partition.shardings(like, mesh, rules),
    )
    return Pretrained(plan.model, {"params": params}, plan.config)


def export(
    pretrained: Pretrained,
    directory: str | pathlib.Path,
    source: str | pathlib.Path,
    *,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Writes a model to a directory that transformers, and `load_*`, load.

    Adapters are merged. The tensors have the dtype of the parameters, and what the model has no use
    for (the other half of CLIP, a pooler) is copied from the source as it is; an output layer that
    is tied is not written. Configs, vocabularies and templates are copied, never code or pickles.

    Args:
      pretrained: from `load_*`, with other variables.
      directory: absent or empty; it has its name only when all is written.
      source: the directory that the model was loaded from.
      shard_bytes: the most that a file holds.

    Raises:
      ValueError: `source` holds another model, or `directory` lies in it, or see `merged` and
        `weights.save`.
    """
    path = pathlib.Path(source)
    if pathlib.Path(directory).resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"directory={str(directory)!r} lies in the source {str(source)!r}, with whose files "
            "those written would be mixed; give one elsewhere."
        )
    kind = kind_of(pretrained.model)
    plan = read_blueprint(kind, path, dtype=jnp.float32, remat=False)
    check_config(pretrained.config, plan.config, path)
    params = merged(pretrained.params)
    with weights.whole_directory(pathlib.Path(directory)) as folder:
        weights.save(
            folder,
            params,
            plan.keys,
            source=path,
            ignored=plan.ignored,
            dropped=plan.tied,
            shard_bytes=shard_bytes,
        )
        copy_data(path, folder)
        write_config(path, folder, pretrained.config, str(jax.tree.leaves(params)[0].dtype))


def merged(variables: Mapping[str, Any]) -> Any:
    """The parameters, of one dtype, with the adapters among the variables merged into them.

    Raises:
      ValueError: a kernel is int8, there are several dtypes, or see `lora.merge`.
    """
    params = variables["params"]
    weights.refuse_int8(params)
    dtypes = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    if len(dtypes) > 1:
        raise ValueError(f"The parameters are {dtypes}: cast them to one dtype.")
    return lora.merge(params, variables["lora"]) if "lora" in variables else params


def kind_of(model: nn.Module) -> str:
    """The kind of a model, one of `KINDS`.

    Raises:
      ValueError: it is of none of them.
    """
    for kind, (module, _, _) in KINDS.items():
        if isinstance(model, module):
            return kind
    raise ValueError(f"{type(model).__name__} is not a model of the hub; these are: {list(KINDS)}.")


def read_blueprint(
    kind: str, directory: str | pathlib.Path, *, dtype: jnp.dtype, remat: bool
) -> Blueprint:
    """The blueprint of a local directory in the hub's format; for the rest see `blueprint`.

    Whether the output layer is tied is decided by the config and the tensors, see
    `safetensors_files`; the blueprint's config says what was decided.
    """
    path, config = pathlib.Path(directory), read_config(directory)
    _known(config, KINDS[kind][1])  # Before files are asked for, of a model that is not ours.
    files = safetensors_files.tensor_files(path)
    try:
        plan = blueprint(kind, config, files, dtype=dtype, remat=remat)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    if not plan.tied:
        return plan
    names = {ours.rpartition("/")[2]: name for name, ours in plan.keys.items()}
    head, table = names["head"], names["table"]
    if head in files and table not in files:
        ours = plan.keys[table]
        keys = {name: x for name, x in plan.keys.items() if name not in (head, table)}
        return plan._replace(keys=keys | {head: ours}, tied=())
    if head in files and not safetensors_files.tensors_equal(files, head, table):
        config["tie_word_embeddings"] = False
        return blueprint(kind, config, files, dtype=dtype, remat=remat)
    return plan


def blueprint(
    kind: str, config: Mapping[str, Any], names: Collection[str], *, dtype: jnp.dtype, remat: bool
) -> Blueprint:
    """A model of a kind, without its parameters.

    Args:
      kind: one of `KINDS`.
      config: see `read_config`.
      names: of the hub's tensors, on which the keys depend, and nothing else.
      dtype: of the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family is not supported.
    """
    _, families, build = KINDS[kind]
    _known(config, families)
    return build(config, names, dtype, remat)


def check_config(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], source: str | pathlib.Path
) -> None:
    """Makes sure that a model is that of a source.

    Raises:
      ValueError: names what is not the same in their configs.
    """
    differing = [
        f"{name}: {ours.get(name)} here, {theirs.get(name)} there"
        for name in sorted({*ours, *theirs} - {*RECORDS})
        if not _same(ours.get(name), theirs.get(name))
    ]
    if differing:
        listed = "\n  ".join(differing[: safetensors_files.LISTED])
        raise ValueError(
            f"{source} is of another model, give the directory that this one was loaded from:\n  "
            + listed
        )


def copy_data(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what of a directory in the hub's format is neither weights, code nor config.json."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        if path.suffix in DATA and path.is_file() and not hidden and str(place) not in NOT_DATA:
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / place)


def write_config(
    source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any], dtype: str | None
) -> None:
    """Copies config.json with what was decided of a model when it was loaded.

    Args:
      source: directory that the model was loaded from.
      target: directory to write to.
      config: see `Blueprint`.
      dtype: to be named where the source names one; None: as it was.
    """
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings") is False:
        # LLaVA's decoder says it for the whole model.
        for part in (written, written.get("text_config", {})):
            part["tie_word_embeddings"] = False
    if dtype is not None:
        written = _with_dtype(written, dtype)
    (target / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")


def _language_model(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: bool
) -> Blueprint:
    model = decoders.build(config, dtype=dtype, remat=remat)
    tied = (r"lm_head\.weight",) if model.tied else ()
    return Blueprint(model, config, decoders.keys(config["model_type"]), WORDS, BUFFERS, tied)


def _vision_tower(
    whole: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: bool
) -> Blueprint:
    config = whole.get("vision_config", whole)
    projection = whole["projection_dim"] if whole["model_type"] == "clip" else None
    model = encoders.build_vision(config, projection=projection, dtype=dtype, remat=remat)
    keys = encoders.vision_keys(_prefix(names, "vision_model."))
    ignored = (r"text_.*", r"logit_.*") if "vision_config" in whole else ()
    edge = model.patch * round(model.patches**0.5)
    pixels = jax.ShapeDtypeStruct((1, edge, edge, 3), jnp.float32)
    return Blueprint(model, config, keys, (pixels,), (*BUFFERS, *ignored))


def _text_tower(
    whole: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: bool
) -> Blueprint:
    kind, config = whole["model_type"], whole.get("text_config", whole)
    if kind == "bert":
        model = encoders.build_bert(config, dtype=dtype, remat=remat)
        keys = encoders.bert_keys(_prefix(names, "bert."))
        # The pooler and the heads of pre-training are not part of a sentence encoder.
        ignored: tuple[str, ...] = (r"(bert\.)?pooler\..*", r"cls\..*")
    else:
        projection = whole["projection_dim"] if kind == "clip" else None
        model = encoders.build_text(config, projection=projection, dtype=dtype, remat=remat)
        prefix = _prefix(names, "text_model.")
        head = "text_projection" if kind == "clip" else f"{prefix}head"
        keys = encoders.text_keys(prefix, head)
        ignored = (r"vision_.*", r"visual_.*", r"logit_.*") if "text_config" in whole else ()
    return Blueprint(model, config, keys, WORDS, (*BUFFERS, *ignored))


def _vision_language_model(
    config: Mapping[str, Any], names: Collection[str], dtype: jnp.dtype, remat: bool
) -> Blueprint:
    kind = config["model_type"]
    if kind in qwen_vl.DECODERS:
        model = qwen_vl.build(config, dtype=dtype, remat=remat)
        keys = qwen_vl.keys(kind, nested=bool(_prefix(names, "model.visual.")))
        tied = (r"lm_head\.weight",) if model.language.tied else ()
        inputs = (*WORDS, *qwen_vl.smallest_inputs(config))
        return Blueprint(model, config, keys, inputs, BUFFERS, tied)
    _known(config["vision_config"], TOWERS)
    _known(config["text_config"], DECODERS)
    recipe = vlm.FAMILIES[kind](config, names, dtype, remat)
    tied = (r"(language_model\.)?lm_head\.weight",) if recipe.model.language.tied else ()
    inputs, ignored = (*WORDS, recipe.images), (*BUFFERS, *recipe.ignored)
    return Blueprint(recipe.model, config, recipe.keys, inputs, ignored, tied)


# The module, the families, and what makes a blueprint of (config, tensors' names, dtype, remat).
KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...], Callable[..., Blueprint]]] = {
    "language_model": (LanguageModel, DECODERS, _language_model),
    "vision_tower": (VisionTower, VISION, _vision_tower),
    "text_tower": (TextTower, TEXT, _text_tower),
    "vision_language_model": (
        VisionLanguageModel,
        (*vlm.FAMILIES, *qwen_vl.DECODERS),
        _vision_language_model,
    ),
}


def _known(config: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    kind = config["model_type"]
    if kind not in kinds:
        raise ValueError(f"model_type={kind!r} is not supported here; these are: {list(kinds)}.")
    return kind


def _prefix(names: Collection[str], prefix: str) -> str:
    """The prefix where the tensors have it; models saved by themselves have none."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _same(ours: Any, theirs: Any) -> bool:
    """Of configs, whatever their dtypes are."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = {*ours, *theirs} - {*RECORDS}
        return all(_same(ours.get(name), theirs.get(name)) for name in names)
    return ours == theirs


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config, and those of its halves, that name this dtype where they name one."""
    renamed = {
        name: _with_dtype(x, dtype) if isinstance(x, Mapping) and name.endswith("_config") else x
        for name, x in config.items()
    }
    named = [name for name in ("dtype", "torch_dtype") if name in config]
    return renamed | dict.fromkeys(named, dtype)
