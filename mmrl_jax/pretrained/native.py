"""A pretrained model in our own format: its parameters as Orbax writes them, beside its config.

    directory/config.json, tokenizer.json, ...   the hub's, copied
    directory/model.json                         its kind (of `hub.KINDS`) and dtype
    directory/params/                            Orbax: our names and layouts

Nothing has to be renamed or transposed to be read, adapters are merged once, and every process
reads its parts. The checkpoints of training (`training/checkpoint.py`) are of a run's whole carry,
with optimiser and config of the run; this is of a model alone.
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
      ValueError: there is no model of ours, or see `partition.shardings`.
    """
    path = pathlib.Path(directory).absolute()
    if not (path / RECORD).is_file():
        raise ValueError(
            f"{path} has no {RECORD}: give a directory that experiments.convert_hf wrote with "
            "--to=checkpoint."
        )
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
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
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params: Any = reader.restore(
            path / PARAMS, args=ocp.args.PyTreeRestore(item=like, restore_args=arguments)
        )
    return hub.Pretrained(plan.model, {"params": jax.tree.map(jnp.asarray, params)}, plan.config)
