"""Pretrained models in the format of this library: parameters in Orbax format with the hub's files.

    directory/config.json, tokenizer.json, ...   the hub's, copied
    directory/model.json                         the kind (of `blueprints.KINDS`) and the dtype
    directory/params/                            Orbax: names and layouts of the Linen module

Loading needs no renaming or transposition, adapters are already merged, and every process reads
only its part. In contrast, a training checkpoint (`training/checkpoint.py`) has the complete carry
of a run, with optimizer and config of the run.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import orbax.checkpoint as ocp

from mmrl_jax.distributed import partition
from mmrl_jax.models.transformer import Remat
from mmrl_jax.pretrained import blueprints, hub, weights

RECORD, PARAMS = "model.json", "params"
AGAIN = "Convert the model again with experiments.convert_hf --to=checkpoint."


def save(
    pretrained: hub.Pretrained, directory: str | pathlib.Path, source: str | pathlib.Path
) -> None:
    """Writes a model with merged adapters; it must be called from a single process.

    Args:
      pretrained: Model from `hub.load_*`, possibly with changed variables.
      directory: Target directory, absent or empty; it is complete as soon as it exists.
      source: Directory in the hub's format from which the model was loaded.

    Raises:
      ValueError: `directory` is not empty, or adapters cannot be merged, see `hub.merged`.
    """
    path, params = pathlib.Path(source), hub.merged(pretrained.params)
    record = {
        "kind": blueprints.kind_of(pretrained.model),
        "dtype": str(jax.tree.leaves(params)[0].dtype),
    }
    with weights.whole_directory(pathlib.Path(directory)) as folder:
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder / PARAMS, params)
        hub.copy_data(path, folder)
        hub.write_config(path, folder, pretrained.config, None)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype | None = None,
    remat: Remat = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> hub.Pretrained:
    """Loads a model that `save` wrote.

    Args:
      directory: Local directory that `save` wrote.
      dtype: Dtype of the parameters and of the computation; None for the saved dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.
      mesh: Mesh over which the parameters are distributed, where each process reads what its
        devices hold; None for the default device.
      rules: Partition rules of the parameters, see `partition.shardings`.

    Returns:
      The model with its parameters and config.

    Raises:
      ValueError: The directory has no such model, it is damaged or has non-finite values, the
        config is not supported, see `hub.read_config`, or the rules do not fit, see
        `partition.shardings`.
    """
    path = pathlib.Path(directory).absolute()
    if not (path / RECORD).is_file():
        raise ValueError(
            f"{path} has no {RECORD}: give a directory that experiments.convert_hf wrote with "
            "--to=checkpoint."
        )
    record = _read_record(path / RECORD)
    param_dtype = jnp.dtype(record["dtype"]) if dtype is None else dtype
    config = hub.read_config(path)
    plan = blueprints.make(record["kind"], config, (), dtype=param_dtype, remat=remat)
    like = plan.shapes(param_dtype)
    if mesh is None:
        arguments = jax.tree.map(
            lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), like
        )
    else:
        arguments = jax.tree.map(
            lambda x, s: ocp.ArrayRestoreArgs(sharding=s, dtype=x.dtype),
            like,
            partition.shardings(like, mesh, rules),
        )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            params: Any = reader.restore(
                path / PARAMS, args=ocp.args.PyTreeRestore(item=like, restore_args=arguments)
            )
    # For files that are damaged or of a different model, Orbax raises errors of any type.
    except Exception as error:
        raise ValueError(
            f"{path / PARAMS} cannot be read ({type(error).__name__}: {error}). {AGAIN}"
        ) from error
    params = jax.tree.map(jnp.asarray, params)
    for key_path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(x).all():
            name = jax.tree_util.keystr(key_path, simple=True, separator="/")
            raise ValueError(
                f"{path / PARAMS}: {name} has values that are NaN or infinite. {AGAIN}"
            )
    return hub.Pretrained(plan.model, {"params": params}, plan.config)


def _read_record(path: pathlib.Path) -> dict[str, str]:
    """Reads the kind and the dtype.

    Raises:
      ValueError: The file is damaged, or has an unknown kind or dtype.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] not in blueprints.KINDS:
            raise ValueError(f"kind={record['kind']!r} must be one of {list(blueprints.KINDS)}")
        jnp.dtype(record["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {AGAIN}") from error
    return record
