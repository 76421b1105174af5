r"""Writes the model of a run of a whole vision-language model in Hugging Face's formats.

  mmrl-export --workdir=runs/vlm --output=tuned               # for transformers
  mmrl-export --workdir=runs/vlm --output=adapter --adapter   # for PEFT

The first merges adapters, and copies tokenizer and processor from the directory that the run began
with. The second writes the adapters alone. A value head is of no use there, and is left out.
"""

from collections.abc import Collection
import pathlib

from absl import flags
import jax
import jax.numpy as jnp

from mmrl_jax import problems, runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.pretrained import chat, hub, weights
from mmrl_jax.pretrained.peft_format import save_adapter

FLAGS = flags.FLAGS
DTYPES = ("float32", "bfloat16", "float16")


def export(
    workdir: workdir_lib.PathLike,
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
      trust_modules: see `runs.load`.
      accept: see `runs.load`.

    Raises:
      ValueError: the run is of no whole model, or the adapters are not all that it trained, or see
        `runs.load`, `hub.export` and `save_adapter`.
    """
    weights.refuse_taken(output)
    directory = workdir_lib.as_path(workdir)
    problem, stage = runs.read_problem(directory, trust_modules=trust_modules)
    config = problem.config
    if config.problem == "control":
        raise ValueError(
            f"--workdir={directory} is of a control policy, whose heads have no format of the hub: "
            "only runs that fine-tune a whole vision-language model can be exported (see the "
            "config vlm_grpo)."
        )
    if config.model.kind != "vlm":
        raise ValueError(
            f"--workdir={directory} has model.kind={config.model.kind!r}, which is no whole "
            "vision-language model: a vision encoder of ours has no format of the hub."
        )
    loaded = runs.load(
        directory,
        which=which,
        trust_modules=trust_modules,
        accept=accept,
        # The adapters are added to the parameters as they were read, not as they were rounded.
        changes={"model": {"frozen_dtype": "float32"}},
    )
    variables, source = loaded.variables, chat.directory_of(config.model.checkpoint)
    plan = hub.read_blueprint("vision_language_model", source, dtype=jnp.float32, remat=False)
    if adapter:
        trained = _trained(problem, stage) - {"value"}
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
    print(f"Written: {output}, of checkpoint {loaded.step}")


def _trained(problem: problems.Problem, stage: str) -> set[str]:
    """The collections of variables of which a stage, or one before it, trained anything."""
    trained = [problem.checkpoint_parts(x)["params"] for x in problem.checkpoint_stages(stage)]
    return {name for params in trained for name, tree in params.items() if jax.tree.leaves(tree)}


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        export(
            FLAGS.workdir,
            pathlib.Path(FLAGS.output),
            which=FLAGS.which,
            adapter=FLAGS.adapter,
            dtype=jnp.dtype(FLAGS.dtype),
            trust_modules=FLAGS.trust_modules,
            accept=FLAGS.accept_changes,
        )


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_string("workdir", None, "Directory of a stage.", required=True)
    flags.DEFINE_string("output", None, "Directory to write, absent or empty.", required=True)
    flags.DEFINE_string("which", "latest", "Checkpoint to write: 'latest', 'best' or a step.")
    flags.DEFINE_bool("adapter", False, "Write the adapters alone, in PEFT's format.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the merged model's parameters.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules of the run's reward functions.")
    flags.DEFINE_list("accept_changes", [], "What may have changed: chat_template.")
    run_command(main)


if __name__ == "__main__":
    run()
