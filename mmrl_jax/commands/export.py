r"""Exports a fine-tuned vision-language model of a run to the formats of Hugging Face.

  mmrl-export --workdir=runs/vlm --output=tuned               # for transformers
  mmrl-export --workdir=runs/vlm --output=adapter --adapter   # for PEFT

The first command merges adapters into the weights, and copies tokenizer and processor from the
directory of the pretrained model. The second command writes the adapters only. A value head is not
exported, because these formats have none.
"""

from collections.abc import Collection
import pathlib

from absl import flags
import jax
import jax.numpy as jnp

from mmrl_jax import problems, restoring
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.models import stacked
from mmrl_jax.pretrained import chat, hub, weights
from mmrl_jax.pretrained.peft_format import save_adapter
from mmrl_jax.problems.token_problem import TokenProblem

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
    """Exports the model of a stage.

    Args:
      workdir: Working directory of the stage.
      output: Directory to write, which must not exist or be empty.
      which: Checkpoint to export: 'latest', 'best' or a step.
      adapter: Whether to write the adapters in the PEFT format, in float32, instead of the merged
        model.
      dtype: Data type of the parameters of the merged model.
      trust_modules: Whether the modules that the config names may be imported, see
        `restoring.load`.
      accept: Names of inputs that may have changed since training, see `restoring.load`.

    Raises:
      ValueError: If the run is not of a complete pretrained model, it trained more than the
        adapters with `adapter`, or it cannot be loaded or written, see `restoring.load`,
        `hub.export` and `save_adapter`.
    """
    weights.refuse_taken(output)
    directory = workdir_lib.as_path(workdir)
    problem, stage = restoring.read_problem(directory, trust_modules=trust_modules)
    config = problem.config
    if config.problem == "control":
        raise ValueError(
            f"--workdir={directory} is of a control policy, for whose heads Hugging Face has no "
            "format: only runs that fine-tune a complete vision-language model can be exported "
            "(see the config vlm_grpo)."
        )
    if config.model.kind != "vlm":
        raise ValueError(
            f"--workdir={directory} has model.kind={config.model.kind!r}, which is not a complete "
            "pretrained vision-language model: Hugging Face has no format for its vision encoder."
        )
    loaded = restoring.load(
        directory,
        which=which,
        trust_modules=trust_modules,
        accept=accept,
        # The adapters are added to the parameters as they were read, not as they were rounded.
        changes={"model": {"frozen_dtype": "float32"}},
    )
    source = chat.directory_of(config.model.checkpoint)
    assert isinstance(problem, TokenProblem)
    variables = stacked.unstack(loaded.variables, problem.model.policy.model)
    plan = hub.read_blueprint("vision_language_model", source, dtype=jnp.float32, remat=False)
    if adapter:
        trained = _trained(problem, stage) - {"value"}
        if trained != {"lora"}:
            raise ValueError(
                f"--adapter: the run trained {sorted(trained)}, not only 'lora'; omit the flag to "
                "export the whole model."
            )
        base = str(source.resolve())
        save_adapter(output, variables["lora"], plan.keys, base=base, task_type="CAUSAL_LM")
    else:
        params = jax.tree.map(lambda x: x.astype(dtype), hub.merged(variables))
        hub.export(hub.Pretrained(plan.model, {"params": params}, plan.config), output, source)
    print(f"Wrote {output} from checkpoint {loaded.step}")


def _trained(problem: problems.Problem, stage: str) -> set[str]:
    """Returns the collections in which a stage, or an earlier one, has trained variables."""
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
    flags.DEFINE_string("workdir", None, "Working directory of a stage.", required=True)
    flags.DEFINE_string(
        "output", None, "Directory to write, which must not exist or be empty.", required=True
    )
    flags.DEFINE_string("which", "latest", "Checkpoint to export: 'latest', 'best' or a step.")
    flags.DEFINE_bool("adapter", False, "Write only the adapters, in the PEFT format.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Data type of the merged parameters.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules of the run's reward functions.")
    flags.DEFINE_list(
        "accept_changes", [], "Inputs that may have changed since training: chat_template."
    )
    run_command(main)


if __name__ == "__main__":
    run()
