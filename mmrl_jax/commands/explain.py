"""Explains a trained control policy: which modality, patch and word its actions depend on.

  mmrl-explain --workdir=runs/reach
  mmrl-explain --workdir=runs/reach --split=heldout_camera --episodes=32 --which=best

The command plays episodes, prints what the policy uses and whether the explanation can be trusted,
and writes three files in the workdir:

  explanation.html   all of this and more on one page, which needs no network
  explanation.json   shares of the modalities, gains over random rankings, scores of the words
  explanation.png    frames with heat maps, and the instruction with colored words

docs/interpretability.md describes the methods. The policy must have model.kind='multimodal'.
"""

import json

from absl import flags

from mmrl_jax import restoring
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.monitoring import metrics
from mmrl_jax.reporting import explanation, explanation_page, report

FLAGS = flags.FLAGS
EPISODES = 32


def explain(
    workdir: workdir_lib.PathLike,
    *,
    which: str = "latest",
    split: str | None = None,
    episodes: int = EPISODES,
    trust_modules: bool = False,
) -> explanation.Explanation:
    """Explains the policy of a run, prints the result in words, and writes the three files.

    Args:
      workdir: Working directory of the run, or of one of its stages.
      which: Checkpoint to explain: 'latest', 'best' or a number of updates.
      split: Name of a split of the run; None for that of its training.
      episodes: Number of episodes that are played.
      trust_modules: Whether the modules that the config names may be imported, see
        `restoring.read_problem`.

    Raises:
      ValueError: If the run cannot be loaded, see `restoring.load`, the split is unknown, or the
        policy cannot be explained, see `reporting.explanation.explain`.
      CheckpointDamaged: If the checkpoint cannot be read.
    """
    directory = workdir_lib.as_path(workdir)
    loaded = restoring.load(directory, which=which, trust_modules=trust_modules)
    split = split or loaded.problem.best_metric.split("/")[1]
    if split not in loaded.problem.splits:
        raise ValueError(
            f"--split={split!r} is unknown; choose one of {tuple(loaded.problem.splits)}."
        )
    print(f"{directory}: checkpoint {loaded.step}, {episodes} episodes of {split}", flush=True)
    result = loaded.explain(split, episodes=episodes)
    print("\n".join(result.sentences))
    path = directory / "explanation.json"
    numbers = {"checkpoint": loaded.step, "sentences": result.sentences} | result.numbers
    workdir_lib.write_text(path, json.dumps(numbers, indent=2) + "\n")
    figure = explanation.draw(directory / "explanation.png", result)
    rows = metrics.read_jsonl(directory / metrics.JSONL_NAME)
    page = explanation_page.page(
        result,
        title=f"{directory.name}: explanation of {split} at update {loaded.step}",
        curves=report.metric_series(rows, "step", explanation_page.CURVES),
    )
    report.write_page(directory / "explanation.html", page)
    print(f"Wrote {directory / 'explanation.html'}, {path}, {figure}")
    return result


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        explain(
            FLAGS.workdir,
            which=FLAGS.which,
            split=FLAGS.split,
            episodes=FLAGS.episodes,
            trust_modules=FLAGS.trust_modules,
        )


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_string("workdir", None, "Working directory of a stage.", required=True)
    flags.DEFINE_string("split", None, "Split of the episodes; that of training by default.")
    flags.DEFINE_integer(
        "episodes",
        EPISODES,
        "Number of episodes that are played.",
        lower_bound=2 * (explanation.BACKGROUNDS + 1),
    )
    flags.DEFINE_string("which", "latest", "Checkpoint to explain: 'latest', 'best' or a step.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules that the run's config names.")
    run_command(main)


if __name__ == "__main__":
    run()
