r"""Exports a fine-tuned vision-language model of a run to the formats of Hugging Face.

  mmrl-export --workdir=runs/vlm --output=tuned               # for transformers
  mmrl-export --workdir=runs/vlm --output=adapter --adapter   # for PEFT
  mmrl-export --workdir=runs/vlm --output=adapter --adapter --push_to=me/counting \
      --base_model=HuggingFaceTB/SmolVLM-256M-Instruct

The first command merges adapters into the weights, and copies tokenizer and processor from the
directory of the pretrained model. The second command writes the adapters only. A value head is not
exported, because these formats have none.

README.md in the output is a model card: how the model was trained, what experiments.evaluate
measured, and how to load it. With --push_to, the output is uploaded to a repository of the hub,
which is private unless --public is given. The token is that of HF_TOKEN or of `hf auth login`.
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
from mmrl_jax.pretrained import chat, hub, hub_repository, weights
from mmrl_jax.pretrained.peft_format import save_adapter
from mmrl_jax.problems.token_problem import TokenProblem
from mmrl_jax.reporting import model_card

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
    base_model: str | None = None,
    push_to: str | None = None,
    public: bool = False,
) -> None:
    """Exports the model of a stage, with a model card.

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
      base_model: Name `owner/name` of the pretrained model on the hub; None for the one that its
        directory names, if any.
      push_to: Name `owner/name` of the repository of the hub that the output is uploaded to; None
        for no upload.
      public: Whether the repository may be public.

    Raises:
      ValueError: If the run is not of a complete pretrained model, it trained more than the
        adapters with `adapter`, it cannot be loaded or written, see `restoring.load`, `hub.export`
        and `save_adapter`, or the upload is not possible, see `hub_repository.push`.
    """
    weights.refuse_taken(output)
    _check_names(push_to, base_model)
    directory = workdir_lib.as_path(workdir)
    problem, stage = restoring.read_problem(directory, trust_modules=trust_modules)
    _check_kind(problem, directory)
    config = problem.config
    source = chat.directory_of(config.model.checkpoint)
    base = base_model or _hub_name(config.model.checkpoint, source)
    if push_to is not None and adapter and base is None:
        raise ValueError(
            f"--push_to={push_to}: adapters name the model that they belong to, but the directory "
            f"{source} does not say its name on the hub; give it with --base_model=owner/name."
        )
    loaded = restoring.load(
        directory,
        which=which,
        trust_modules=trust_modules,
        accept=accept,
        # The adapters are added to the parameters as they were read, not as they were rounded.
        changes={"model": {"frozen_dtype": "float32"}},
    )
    assert isinstance(problem, TokenProblem)
    variables = stacked.unstack(loaded.variables, problem.model.policy.model)
    plan = hub.read_blueprint("vision_language_model", source, dtype=jnp.float32, remat=False)
    if adapter:
        _check_adapters(problem, stage)
        name = base or str(source.resolve())
        save_adapter(output, variables["lora"], plan.keys, base=name, task_type="CAUSAL_LM")
    else:
        params = jax.tree.map(lambda x: x.astype(dtype), hub.merged(variables))
        hub.export(hub.Pretrained(plan.model, {"params": params}, plan.config), output, source)
    exported = model_card.ExportedModel(
        name=push_to or output.name,
        base=base,
        stage=stage,
        step=loaded.step,
        adapter=adapter,
        dtype="float32" if adapter else str(jnp.dtype(dtype)),
    )
    model_card.write(output, exported, directory)
    print(f"Wrote {output} from checkpoint {loaded.step}")
    if push_to is not None:
        print(f"Uploaded it: {hub_repository.push(output, push_to, private=not public)}")


def _check_names(push_to: str | None, base_model: str | None) -> None:
    """Raises ValueError for names that are no repositories of the hub."""
    if push_to is not None:
        hub_repository.check(push_to)
    if base_model is not None and not hub_repository.is_name(base_model):
        raise ValueError(f"--base_model={base_model!r} must be owner/name, a model of the hub.")


def _check_adapters(problem: problems.Problem, stage: str) -> None:
    """Raises ValueError for a run that trained more than adapters, and the value head."""
    trained = _trained(problem, stage) - {"value"}
    if trained != {"lora"}:
        raise ValueError(
            f"--adapter: the run trained {sorted(trained)}, not only 'lora'; omit the flag to "
            "export the whole model."
        )


def _check_kind(problem: problems.Problem, directory: workdir_lib.PathLike) -> None:
    """Raises ValueError for a run whose model Hugging Face has no format for."""
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


def _hub_name(checkpoint: str, source: pathlib.Path) -> str | None:
    """Returns the name of a pretrained model on the hub, `owner/name`; None if it is unknown.

    Args:
      checkpoint: Value of `model.checkpoint`.
      source: Its directory, whose config may have the name.
    """
    if checkpoint.startswith(hub_repository.SCHEME):
        return checkpoint.removeprefix(hub_repository.SCHEME).partition("@")[0]
    name = str(hub.read_config(source).get("_name_or_path"))
    return name if hub_repository.is_name(name) and not pathlib.Path(name).exists() else None


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
            base_model=FLAGS.base_model,
            push_to=FLAGS.push_to,
            public=FLAGS.public,
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
    flags.DEFINE_string(
        "base_model",
        None,
        "Name of the pretrained model on the hub, owner/name; by default the one that its "
        "config.json has.",
    )
    flags.DEFINE_string(
        "push_to", None, "Repository of the hub, owner/name, that the output is uploaded to."
    )
    flags.DEFINE_bool("public", False, "With --push_to: the repository is public.")
    run_command(main)


if __name__ == "__main__":
    run()
