r"""Writes the model of a run of a whole vision-language model in Hugging Face's formats.

  python -m experiments.export --workdir=runs/vlm --output=tuned               # for transformers
  python -m experiments.export --workdir=runs/vlm --output=adapter --adapter   # for PEFT

The first merges adapters, and copies tokenizer and processor from the directory that the run began
with. The second writes the adapters alone. A value head is of no use there, and is left out.
"""

from collections.abc import Collection
import pathlib

from absl import app, flags, logging
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections

from experiments.evaluate import is_fine_tuning, read_config, restore_tokens
from experiments.train import clean_exit, factory_of
from mmrl_jax.models import lora
from mmrl_jax.pretrained import chat, hub, weights
from mmrl_jax.pretrained.peft_format import save_adapter
from mmrl_jax.training import factory, token_models
from mmrl_jax.training import workdir as workdir_lib

FLAGS = flags.FLAGS
DTYPES = ("float32", "bfloat16", "float16")


def export(
    workdir: epath.Path,
    output: pathlib.Path,
    *,
    which: str,
    adapter: bool,
    dtype: jnp.dtype,
    trust_modules: bool = False,
    accept: Collection[str] = (),
) -> None:
    """Writes the model of a stage.

    Args:
      workdir: of the stage.
      output: absent or empty.
      which: checkpoint, 'latest', 'best' or a step.
      adapter: write the adapters in PEFT's format, in float32, and not the merged model.
      dtype: of the merged model's parameters.
      trust_modules: see `restore_tokens`.
      accept: see `restore_tokens`.

    Raises:
      ValueError: the run is of no whole model, or the adapters are not all that it trained, or see
        `restore_tokens`, `hub.export` and `save_adapter`.
    """
    weights.refuse_taken(output)
    config = read_config(workdir, trust_modules=trust_modules)
    if factory_of(config) is factory:
        raise ValueError(
            f"--workdir={workdir} is of a control policy (algorithm={config.algorithm!r}), whose "
            "heads have no format of the hub: only runs that fine-tune a whole vision-language "
            "model can be exported (see configs/vlm_grpo.py)."
        )
    if not token_models.is_whole(config.model):
        raise ValueError(
            f"--workdir={workdir} has model.pretrained={config.model.pretrained!r}, which is no "
            "whole vision-language model: a vision encoder of ours has no format of the hub."
        )
    _, parts, step = restore_tokens(workdir, which, trust_modules=trust_modules, accept=accept)
    variables, source = lora.join(*parts), chat.directory_of(config.model.pretrained)
    plan = hub.read_blueprint("vision_language_model", source, dtype=jnp.float32, remat=False)
    if adapter:
        trained = _trained(config, workdir) - {"value"}
        if trained != {"lora"}:
            raise ValueError(
                f"--adapter: the run trained {sorted(trained)} of its variables, not 'lora' alone; "
                "leave the flag out to write the whole model."
            )
        base = str(source.resolve())
        save_adapter(output, variables["lora"], plan.keys, base=base, task_type="CAUSAL_LM")
    else:
        params = jax.tree.map(lambda x: x.astype(dtype), hub.merged(variables))
        hub.export(hub.Pretrained(plan.model, {"params": params}, plan.config), output, source)
    print(f"Written: {output}, of checkpoint {step}")


def _trained(config: ml_collections.ConfigDict, workdir: epath.Path) -> set[str]:
    """The collections of variables of which a stage, or the one before it, trained anything."""
    model = factory_of(config).make_parts(config).model
    alone = config.algorithm == "sft" or is_fine_tuning(workdir)
    stages = ["sft"] if alone else ["sft", "rl"] if config.sft.updates else ["rl"]
    halves = [token_models.stored_params(config, model, stage) for stage in stages]
    return {name for half in halves for name, tree in half.items() if jax.tree.leaves(tree)}


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    with clean_exit(ValueError):
        export(
            workdir_lib.as_path(FLAGS.workdir),
            pathlib.Path(FLAGS.output),
            which=FLAGS.which,
            adapter=FLAGS.adapter,
            dtype=jnp.dtype(FLAGS.dtype),
            trust_modules=FLAGS.trust_modules,
            accept=FLAGS.accept_changes,
        )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a stage.", required=True)
    flags.DEFINE_string("output", None, "Directory to write, absent or empty.", required=True)
    flags.DEFINE_string("which", "latest", "Checkpoint to write: 'latest', 'best' or a step.")
    flags.DEFINE_bool("adapter", False, "Write the adapters alone, in PEFT's format.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the merged model's parameters.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules of the run's reward functions.")
    flags.DEFINE_list("accept_changes", [], "What may have changed: chat_template.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
