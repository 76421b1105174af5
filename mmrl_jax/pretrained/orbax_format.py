"""A pretrained model in our own format: its parameters as Orbax writes them, beside its config.

    directory/config.json, tokenizer.json, ...   the hub's, copied
    directory/model.json                         its kind (of `hub.KINDS`) and dtype
    directory/params/                            Orbax: our names and layouts

Nothing has to be renamed or transposed to be read, adapters are merged once, and every process
reads its parts. The checkpoints of training (`training/checkpoint.py`) are of a run's whole carry,
with optimizer and config of the run; this is of a model alone.
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
from mmrl_jax.pretrained import hub, weights

RECORD, PARAMS = "model.json", "params"
AGAIN = "Convert the model again with experiments.convert_hf --to=checkpoint."


def save(
    pretrained: hub.Pretrained, directory: str | pathlib.Path, source: str | pathlib.Path
) -> None:
    """Writes a model, its adapters merged, from one process.

    Args:
      pretrained: from `hub.load_*`, or with other variables.
      directory: absent or empty; it has its name only when all is written.
      source: the directory in the hub's format that the model was loaded from.

    Raises:
      ValueError: `directory` is not empty, or see `hub.merged`.
    """
    path, params = pathlib.Path(source), hub.merged(pretrained.params)
    record = {
        "kind": hub.kind_of(pretrained.model),
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
    remat: bool = False,
    mesh: Mesh | None = None,
    rules: partition.Rules = partition.RULES,
) -> hub.Pretrained:
    """Loads what `save` wrote.

    Args:
      directory: local, in our format.
      dtype: of the parameters and of the computation; None: as they were saved.
      remat: recompute each block's activations in the backward pass.
      mesh: the parameters go there, and each process reads what its devices hold; None: to the
        default device.
      rules: which parts go to which devices, see `partition.shardings`.

    Raises:
      ValueError: there is no model of ours, it is damaged or has values that are not finite, or see
        `hub.read_config` and `partition.shardings`.
    """
    path = pathlib.Path(directory).absolute()
    if not (path / RECORD).is_file():
        raise ValueError(
            f"{path} has no {RECORD}: give a directory that experiments.convert_hf wrote with "
            "--to=checkpoint."
        )
    record = _read_record(path / RECORD)
    wanted = jnp.dtype(record["dtype"]) if dtype is None else dtype
    config = hub.read_config(path)
    plan = hub.blueprint(record["kind"], config, (), dtype=wanted, remat=remat)
    like = plan.shapes(wanted)
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
    # Of files that are damaged or of another model, Orbax raises errors of any type.
    except Exception as error:
        raise ValueError(
            f"{path / PARAMS} cannot be read ({type(error).__name__}: {error}). {AGAIN}"
        ) from error
    params = jax.tree.map(jnp.asarray, params)
    for place, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(x).all():
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise ValueError(
                f"{path / PARAMS}: {name} has values that are NaN or infinite. {AGAIN}"
            )
    return hub.Pretrained(plan.model, {"params": params}, plan.config)


def _read_record(path: pathlib.Path) -> dict[str, str]:
    """The kind and the dtype.

    Raises:
      ValueError: it has none that we know.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] not in hub.KINDS:
            raise ValueError(f"kind={record['kind']!r} is none of {list(hub.KINDS)}")
        jnp.dtype(record["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {AGAIN}") from error
    return record
