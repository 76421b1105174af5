"""Loads and exports models in the hub's format, a directory of config.json and safetensors."""

from collections.abc import Callable, Mapping
import functools
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
from mmrl_jax.models.transformer import Remat
from mmrl_jax.pretrained import blueprints, safetensors_files, weights
from mmrl_jax.pretrained.blueprints import Blueprint
from mmrl_jax.pretrained.families import config_keys

# Suffixes of data files that an export copies: configs, vocabularies, templates. It does not copy
# the index of the source's weights, nor an adapter, which transformers would add when loading.
DATA = (".json", ".txt", ".model", ".jinja")
NOT_DATA = (safetensors_files.INDEX, "config.json", "adapter_config.json")
# Config keys that do not affect the model.
RECORDS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: Linen module.
      params: Variables of the module, for `model.apply`.
      config: Config of the model in the hub's format, completed with defaults.
    """

    model: nn.Module
    params: Any
    config: Mapping[str, Any]


def read_config(directory: str | pathlib.Path) -> dict[str, Any]:
    """Reads the config of a local directory and completes it with transformers' defaults.

    Keys that transformers does not read are omitted.

    Args:
      directory: Local directory in the hub's format.

    Raises:
      ValueError: There is no config, it is damaged or of a model that transformers cannot load
        without running code of the directory, or it requires unsupported features, see
        `config_keys.followed`.
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
    # For invalid values, transformers raises errors of any type.
    except Exception as error:
        raise ValueError(
            f"{file} is damaged, or of an unknown model ({type(error).__name__}: {error}). "
            "Download it again, or correct it."
        ) from error
    try:
        return config_keys.followed(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_language_model(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
    param_dtype: Callable[[str], jnp.dtype] | None = None,
) -> Pretrained:
    """Loads a decoder: Llama, Qwen2, Qwen3, Gemma 1 to 3.

    Args:
      directory: Local directory in the hub's format.
      dtype: Dtype of the parameters and of the computation.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      mesh: Mesh over which the parameters are distributed, where each process reads what its
        devices hold; None for the default device.
      rules: Partition rules of the parameters, see `partition.shardings`.
      param_dtype: Path of a parameter to the dtype that it is stored in; None for `dtype`.

    Returns:
      The model with its parameters and config.

    Raises:
      ValueError: The family is not supported, the files are damaged or do not match the model, see
        `weights.load`, or the rules do not fit, see `partition.shardings`.
    """
    return load(
        "language_model",
        directory,
        dtype=dtype,
        remat=remat,
        mesh=mesh,
        rules=rules,
        param_dtype=param_dtype,
    )


def load_vision_tower(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> Pretrained:
    """Loads DINOv2, or the vision tower of CLIP or SigLIP with or without the text tower.

    For arguments and errors see `load_language_model`.
    """
    return load("vision_tower", directory, dtype=dtype, remat=remat, mesh=mesh, rules=rules)


def load_text_tower(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> Pretrained:
    """Loads a text encoder: a BERT-type model, or the text tower of CLIP or SigLIP.

    For arguments and errors see `load_language_model`.
    """
    return load("text_tower", directory, dtype=dtype, remat=remat, mesh=mesh, rules=rules)


def load_vision_language_model(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
    param_dtype: Callable[[str], jnp.dtype] | None = None,
) -> Pretrained:
    """Loads a vision-language model.

    The supported families are Idefics3, SmolVLM, PaliGemma, LLaVA, LLaVA-OneVision, Qwen2.5-VL and
    Qwen3-VL. For arguments and errors see `load_language_model`; the tower or the decoder of a
    supported family may be unsupported too.
    """
    return load(
        "vision_language_model",
        directory,
        dtype=dtype,
        remat=remat,
        mesh=mesh,
        rules=rules,
        param_dtype=param_dtype,
    )


def load(
    kind: str,
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype,
    remat: Remat,
    mesh: Mesh | None,
    rules: partition.Rules,
    param_dtype: Callable[[str], jnp.dtype] | None = None,
) -> Pretrained:
    """Loads a model of a kind in `blueprints.KINDS`; for the rest see `load_language_model`."""
    path = pathlib.Path(directory)
    plan = read_blueprint(kind, path, dtype=dtype, remat=remat)
    like = plan.shapes(dtype)
    if param_dtype is not None:
        stored = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        like = jax.tree_util.tree_map_with_path(
            lambda p, x: jax.ShapeDtypeStruct(x.shape, param_dtype(stored(p))), like
        )
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
    """Writes a model to a directory that transformers and `load_*` can load.

    Adapters are merged. The tensors have the dtype of the parameters. Tensors that the model does
    not use (the other tower of CLIP, a pooler) are copied from the source, and a tied output layer
    is not written. Configs, vocabularies and templates are copied, but never code or pickles.

    Args:
      pretrained: Model from `load_*`, possibly with changed variables.
      directory: Target directory, absent or empty; it is complete as soon as it exists.
      source: Directory from which the model was loaded.
      shard_bytes: Maximum size of a weight file in bytes.

    Raises:
      ValueError: `source` has a different model, or `directory` is inside it; or the parameters
        cannot be merged or written, see `merged` and `weights.save`.
    """
    path = pathlib.Path(source)
    if pathlib.Path(directory).resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"directory={str(directory)!r} is inside the source {str(source)!r}, whose files would "
            "be mixed with those written; give a different one."
        )
    kind = blueprints.kind_of(pretrained.model)
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
    """Merges adapters into the parameters and returns these, which must have a single dtype.

    Args:
      variables: Variables of a model, with 'params' and optionally 'lora'.

    Raises:
      ValueError: A kernel is int8, there are several dtypes, or an adapter fits no layer, see
        `lora.merge`.
    """
    params = variables["params"]
    weights.refuse_int8(params)
    dtypes = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    if len(dtypes) > 1:
        raise ValueError(f"The parameters are {dtypes}: cast them to one dtype.")
    return lora.merge(params, variables["lora"]) if "lora" in variables else params


def read_blueprint(
    kind: str, directory: str | pathlib.Path, *, dtype: jnp.dtype, remat: Remat
) -> Blueprint:
    """Reads the blueprint of a local directory in the hub's format; see `blueprints.make`.

    Config and tensors together determine whether the output layer is tied, see `safetensors_files`;
    the blueprint's config has the result.
    """
    path, config = pathlib.Path(directory), read_config(directory)
    # An unsupported family is reported before missing files are.
    blueprints.check_family(config, blueprints.KINDS[kind][1])
    files = safetensors_files.tensor_files(path)
    try:
        plan = blueprints.make(kind, config, files, dtype=dtype, remat=remat)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    if not plan.tied:
        return plan
    names = {path.rpartition("/")[2]: name for name, path in plan.keys.items()}
    head, table = names["head"], names["table"]
    if head in files and table not in files:
        path_of_table = plan.keys[table]
        keys = {name: x for name, x in plan.keys.items() if name not in (head, table)}
        return plan._replace(keys=keys | {head: path_of_table}, tied=())
    if head in files and not safetensors_files.tensors_equal(files, head, table):
        config["tie_word_embeddings"] = False
        return blueprints.make(kind, config, files, dtype=dtype, remat=remat)
    return plan


def check_config(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], source: str | pathlib.Path
) -> None:
    """Checks that a model is the one in a source directory.

    Args:
      ours: Config of the model.
      theirs: Config of the source.
      source: Source directory, for the error message.

    Raises:
      ValueError: The configs differ; the message lists the differences.
    """
    differing = [
        f"{name}: {ours.get(name)} in the model, {theirs.get(name)} in the source"
        for name in sorted({*ours, *theirs} - {*RECORDS})
        if not _same(ours.get(name), theirs.get(name))
    ]
    if differing:
        listed = "\n  ".join(differing[: safetensors_files.LISTED])
        raise ValueError(
            f"{source} has a different model; give the directory that this one was loaded from:\n  "
            + listed
        )


def copy_data(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the data files of a directory: no weights, no code, and not config.json."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix in DATA and path.is_file() and not hidden and str(relative) not in NOT_DATA:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def write_config(
    source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any], dtype: str | None
) -> None:
    """Copies config.json and updates what loading determined.

    Args:
      source: Directory from which the model was loaded.
      target: Directory to write to.
      config: Config of the model, see `Blueprint`, whose `tie_word_embeddings` is written.
      dtype: Dtype that replaces those in the source; None to keep them.
    """
    output = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings") is False:
        # For LLaVA, transformers reads this key of the whole model from the decoder's config.
        for part in (output, output.get("text_config", {})):
            part["tie_word_embeddings"] = False
    if dtype is not None:
        output = _with_dtype(output, dtype)
    (target / "config.json").write_text(json.dumps(output, indent=2), encoding="utf-8")


def _same(a: Any, b: Any) -> bool:
    """Returns whether two configs or values are equal, except for dtypes and other records."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = {*a, *b} - {*RECORDS}
        return all(_same(a.get(name), b.get(name)) for name in names)
    return a == b


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Replaces the dtype of a config, and of the configs in it, wherever they have one."""
    renamed = {
        name: _with_dtype(x, dtype) if isinstance(x, Mapping) and name.endswith("_config") else x
        for name, x in config.items()
    }
    dtype_keys = [name for name in ("dtype", "torch_dtype") if name in config]
    return renamed | dict.fromkeys(dtype_keys, dtype)
