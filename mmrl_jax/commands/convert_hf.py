r"""Converts a pretrained model from the Hugging Face format to an Orbax checkpoint, and back.

  mmrl-convert-hf --to=checkpoint --source=SmolVLM --output=ours \
      [--adapter=lora] [--dtype=bfloat16]
  mmrl-convert-hf --to=hub --checkpoint=ours --source=SmolVLM --output=tuned \
      [--adapter=lora] [--dtype=bfloat16]

The first command reads a local directory with config.json and safetensors, and writes a checkpoint
that `mmrl_jax.pretrained.orbax_format.load` loads, optionally onto a mesh. The second command
writes a directory that transformers loads. Files and tensors that are not in the checkpoint, such
as the tokenizer, are copied from --source, the directory that was converted. Both merge an adapter
in the PEFT format if --adapter is given.
"""

import pathlib

from absl import flags
import jax.numpy as jnp

from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.distributed import partition
from mmrl_jax.pretrained import blueprints, hub, orbax_format, weights
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
    """Converts a directory in the Hugging Face format to an Orbax checkpoint.

    Args:
      source: Local directory in the Hugging Face format.
      output: Directory to write, which must not exist or be empty.
      kind: Kind of model, one of `blueprints.KINDS`; None to infer it from the source.
      adapter: Directory of an adapter in the PEFT format to merge; None for no adapter.
      dtype: Data type of the parameters.

    Raises:
      ValueError: If the source, the adapter or the output cannot be used, see `kind_in`,
        `hub.load`, `load_adapter` and `orbax_format.save`.
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
    """Converts a checkpoint of `to_checkpoint` to a directory in the Hugging Face format.

    Args:
      checkpoint: Directory of the Orbax checkpoint.
      source: Directory in the Hugging Face format from which the checkpoint was made.
      output: Directory to write, which must not exist or be empty.
      adapter: Directory of an adapter in the PEFT format to merge; None for no adapter.
      dtype: Data type of the parameters; None for that of the checkpoint.

    Raises:
      ValueError: If the checkpoint, the adapter or the output cannot be used, see
        `orbax_format.load`, `load_adapter` and `hub.export`.
    """
    weights.refuse_taken(output)
    pretrained = orbax_format.load(checkpoint, dtype=dtype)
    hub.export(with_adapter(pretrained, adapter, source), output, source)


def kind_in(source: pathlib.Path) -> str:
    """Returns the kind of the model in a directory, one of `blueprints.KINDS`.

    Raises:
      ValueError: If the model is of no supported kind, or could be of several.
    """
    family = hub.read_config(source)["model_type"]
    kinds = [kind for kind, (_, families, _) in blueprints.KINDS.items() if family in families]
    if not kinds:
        known = sorted({name for _, families, _ in blueprints.KINDS.values() for name in families})
        raise ValueError(f"--source={source} is a {family!r}, which is not one of {known}.")
    if len(kinds) > 1:
        raise ValueError(f"--source={source} is a {family!r}: choose --kind, one of {kinds}.")
    return kinds[0]


def with_adapter(
    pretrained: hub.Pretrained, adapter: pathlib.Path | None, source: pathlib.Path
) -> hub.Pretrained:
    """Returns the model with the parameters of an adapter added, if there is one."""
    if adapter is None:
        return pretrained
    kind, params = blueprints.kind_of(pretrained.model), pretrained.params
    plan = hub.read_blueprint(kind, source, dtype=jnp.float32, remat=False)
    lora = load_adapter(adapter, params["params"], plan.keys, ignored=plan.ignored)
    return pretrained._replace(params={**params, "lora": lora})


def convert() -> None:
    """Runs the conversion that the flags describe.

    Raises:
      ValueError: If a flag is missing or not applicable, or the conversion fails, see
        `to_checkpoint` and `to_hub`.
    """
    source, output = pathlib.Path(FLAGS.source), pathlib.Path(FLAGS.output)
    adapter = pathlib.Path(FLAGS.adapter) if FLAGS.adapter else None
    if FLAGS.to == "checkpoint":
        if FLAGS.checkpoint:
            raise ValueError(f"--checkpoint={FLAGS.checkpoint} applies to --to=hub only.")
        dtype = jnp.dtype(FLAGS.dtype or "float32")
        to_checkpoint(source, output, kind=FLAGS.kind, adapter=adapter, dtype=dtype)
    else:
        if not FLAGS.checkpoint:
            raise ValueError("--to=hub needs --checkpoint, a directory that --to=checkpoint wrote.")
        if FLAGS.kind:
            raise ValueError(
                f"--kind={FLAGS.kind} does not apply to --to=hub: the checkpoint stores its kind."
            )
        dtype = jnp.dtype(FLAGS.dtype) if FLAGS.dtype else None
        to_hub(pathlib.Path(FLAGS.checkpoint), source, output, adapter=adapter, dtype=dtype)
    print(f"Wrote {output}")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        convert()


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_enum("to", None, ["checkpoint", "hub"], "Format to write.", required=True)
    flags.DEFINE_string("source", None, "Directory in the Hugging Face format.", required=True)
    flags.DEFINE_string(
        "output", None, "Directory to write, which must not exist or be empty.", required=True
    )
    flags.DEFINE_string("checkpoint", None, "With --to=hub: directory of the Orbax checkpoint.")
    flags.DEFINE_string("adapter", None, "Directory of a PEFT adapter to merge.")
    flags.DEFINE_enum(
        "dtype",
        None,
        DTYPES,
        "Data type of the parameters; by default float32, or with --to=hub that of the checkpoint.",
    )
    flags.DEFINE_enum(
        "kind",
        None,
        list(blueprints.KINDS),
        "With --to=checkpoint: kind of model, needed if the source has several, as CLIP does.",
    )
    run_command(main)


if __name__ == "__main__":
    run()
