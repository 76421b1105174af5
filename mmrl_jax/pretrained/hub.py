"""Models from local directories in the hub's format: config.json and safetensors."""

import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.pretrained import weights
from mmrl_jax.pretrained.families import decoders

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: the Linen module.
      params: its parameters.
      config: the hub's config, complete with defaults.
    """

    model: nn.Module
    params: Any
    config: dict[str, Any]


def read_config(directory: str | pathlib.Path) -> dict[str, Any]:
    """The config of a local directory, with transformers' defaults for what it leaves out.

    Raises:
      ValueError: there is none, or it wants code of its own to be run.
    """
    from transformers import AutoConfig

    path = pathlib.Path(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give a local directory in the hub's format.")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{path}/config.json is of no model that we know: {error}") from error
    return config.to_dict()


def load(
    directory: str | pathlib.Path, *, dtype: jnp.dtype = jnp.float32, remat: bool = False
) -> Pretrained:
    """Loads a model.

    Args:
      directory: local, in the hub's format.
      dtype: of the parameters and the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family is not supported, or see `weights.load`.
    """
    config = read_config(directory)
    kind = config["model_type"]
    if kind not in DECODERS:
        raise ValueError(f"model_type={kind!r} is not supported; these are: {list(DECODERS)}.")
    model = decoders.build(config, dtype=dtype, remat=remat)
    zeros = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), zeros, jax.ShapeDtypeStruct((1, 2), bool))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like["params"])
    ignored = (r".*\.inv_freq", *(("lm_head.weight",) if model.tied else ()))
    params = weights.load(pathlib.Path(directory), like, decoders.keys(kind), ignored=ignored)
    return Pretrained(model, {"params": params}, config)
