r"""Converts a pretrained model from the hub's format to ours, and back.

  mmrl-convert-hf --to=checkpoint --source=SmolVLM --output=ours \
      [--adapter=lora] [--dtype=bfloat16]
  mmrl-convert-hf --to=hub --checkpoint=ours --source=SmolVLM --output=tuned \
      [--adapter=lora] [--dtype=bfloat16]

The first reads a local directory of config.json and safetensors, and writes a checkpoint that
`mmrl_jax.pretrained.orbax_format.load` loads, onto a mesh if one is given. The second writes a
directory that transformers loads; what the checkpoint does not hold (names, tokenizer, tensors that
our model has no use for) comes from the source, the directory that was converted. Adapters in
PEFT's format are merged on the way.
"""

import pathlib

from absl import flags
import jax.numpy as jnp

from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.distributed import partition
from mmrl_jax.pretrained import hub, orbax_format, weights
from mmrl_jax.pretrained.peft_format import load_adapter

FLAGS = flags.FLAGS
DTYPES = ("float32", "bfloat16", "float16")


def to_checkpoint(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    kind: str | None,
    adapter: pathlib.Path | None,
    dtype: jnp.dtype,
) -> None:
    """Converts a directory in the hub's format to ours.

    Args:
      source: local.
      output: absent or empty.
      kind: one of `hub.KINDS`; None: the only one that the source's model is of.
      adapter: directory in PEFT's format.
      dtype: of the parameters.

    Raises:
      ValueError: see `kind_in`, `hub.load`, `load_adapter` and `orbax_format.save`.
    """
    weights.refuse_taken(output)
    pretrained = hub.load(
        kind or kind_in(source),
        source,
        dtype=dtype,
        remat=False,
        mesh=None,
        rules=partition.RULES,
    )
    orbax_format.save(with_adapter(pretrained, adapter, source), output, source)


def to_hub(
    checkpoint: pathlib.Path,
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    adapter: pathlib.Path | None,
    dtype: jnp.dtype | None,
) -> None:
    """Converts what `to_checkpoint` wrote to a directory in the hub's format.

    Args:
      checkpoint: in our format.
      source: the directory in the hub's format that it was made from.
      output: absent or empty.
      adapter: directory in PEFT's format.
      dtype: of the parameters; None: the checkpoint's.

    Raises:
      ValueError: see `orbax_format.load`, `load_adapter` and `hub.export`.
    """
    weights.refuse_taken(output)
    pretrained = orbax_format.load(checkpoint, dtype=dtype)
    hub.export(with_adapter(pretrained, adapter, source), output, source)


def kind_in(source: pathlib.Path) -> str:
    """The kind of the model in a directory.

    Raises:
      ValueError: it is of none or of several of `hub.KINDS`.
    """
    family = hub.read_config(source)["model_type"]
    kinds = [kind for kind, (_, families, _) in hub.KINDS.items() if family in families]
    if not kinds:
        known = sorted({name for _, families, _ in hub.KINDS.values() for name in families})
        raise ValueError(f"--source={source} is a {family!r}, which is not one of {known}.")
    if len(kinds) > 1:
        raise ValueError(f"--source={source} is a {family!r}: choose --kind, one of {kinds}.")
    return kinds[0]


def with_adapter(
    pretrained: hub.Pretrained, adapter: pathlib.Path | None, source: pathlib.Path
) -> hub.Pretrained:
    """The model with an adapter beside its parameters, if there is one."""
    if adapter is None:
        return pretrained
    kind, params = hub.kind_of(pretrained.model), pretrained.params
    plan = hub.read_blueprint(kind, source, dtype=jnp.float32, remat=False)
    lora = load_adapter(adapter, params["params"], plan.keys, ignored=plan.ignored)
    return pretrained._replace(params={**params, "lora": lora})


def convert() -> None:
    """Does what the flags say.

    Raises:
      ValueError: a flag is missing or has no meaning, or see `to_checkpoint` and `to_hub`.
    """
    source, output = pathlib.Path(FLAGS.source), pathlib.Path(FLAGS.output)
    adapter = pathlib.Path(FLAGS.adapter) if FLAGS.adapter else None
    if FLAGS.to == "checkpoint":
        if FLAGS.checkpoint:
            raise ValueError(f"--checkpoint={FLAGS.checkpoint} is read with --to=hub only.")
        dtype = jnp.dtype(FLAGS.dtype or "float32")
        to_checkpoint(source, output, kind=FLAGS.kind, adapter=adapter, dtype=dtype)
    else:
        if not FLAGS.checkpoint:
            raise ValueError("--to=hub needs --checkpoint, a directory that --to=checkpoint wrote.")
        if FLAGS.kind:
            raise ValueError(f"--kind={FLAGS.kind}: with --to=hub, the checkpoint says it itself.")
        dtype = jnp.dtype(FLAGS.dtype) if FLAGS.dtype else None
        to_hub(pathlib.Path(FLAGS.checkpoint), source, output, adapter=adapter, dtype=dtype)
    print(f"Written: {output}")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        convert()


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_enum("to", None, ["checkpoint", "hub"], "Format to write.", required=True)
    flags.DEFINE_string("source", None, "Directory in the hub's format.", required=True)
    flags.DEFINE_string("output", None, "Directory to write, absent or empty.", required=True)
    flags.DEFINE_string("checkpoint", None, "With --to=hub: directory in our format.")
    flags.DEFINE_string("adapter", None, "Directory of a PEFT adapter to merge.")
    flags.DEFINE_enum(
        "dtype", None, DTYPES, "Of the parameters; default: float32, to the hub the checkpoint's."
    )
    flags.DEFINE_enum("kind", None, list(hub.KINDS), "With --to=checkpoint: which half of CLIP.")
    run_command(main)


if __name__ == "__main__":
    run()
