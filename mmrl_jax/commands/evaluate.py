"""Evaluates a trained run on its splits, also with each modality shuffled.

  mmrl-evaluate --workdir=runs/reach --split=train
  mmrl-evaluate --workdir=runs/reach --split=all --episodes=1024 --which=best
  mmrl-evaluate --workdir=runs/quickstart/bc
  mmrl-evaluate --workdir=runs/reach --video        # also episodes.mp4 and episode.png

The workdir may be that of any stage, trained on any number of devices. The command prints a table
of success rates (returns for an environment without success, accuracies for a task) with 95 %
intervals, and adds these metrics to evaluation.json in the workdir:

  <split>/[shuffled_<modality>/]success, success_lo, success_hi, return, return_lo, ..., length
  <split>/[shuffled_<modality>/]checkpoint, episodes       checkpoint and number of episodes

In the row 'shuffled_pixels', the policy receives the pixels of another episode, and in the row
'shuffled_image' the image of another prompt or record. Without --episodes,
there are as many episodes as in the run's own evaluations; for a dataset, all records of the split.
For a task with several difficulty levels, <split>/<level>/accuracy and its interval cover the
prompts of one level.

For a run on a dataset, the command imports and calls its reward functions; modules outside of this
package need --trust_modules. All inputs of the run must be those of its training;
--accept_changes=records evaluates it on other records. With --distributed, or with
--coordinator_address, --num_processes and --process_id, several hosts evaluate together.
"""

from collections.abc import Collection
import json

from absl import flags
from etils import epath
import jax

from mmrl_jax import restoring
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.distributed import multihost
from mmrl_jax.reporting import summary as summary_lib
from mmrl_jax.reporting.episodes import write_episodes
from mmrl_jax.training import fingerprints

FLAGS = flags.FLAGS
# What the problems without episodes are evaluated on.
UNITS = {"task": "prompts", "dataset": "records"}


def evaluate(
    workdir: workdir_lib.PathLike,
    *,
    which: str = "latest",
    split: str = "all",
    episodes: int | None = None,
    video: bool = False,
    trust_modules: bool = False,
    accept: Collection[str] = (),
) -> dict[str, float]:
    """Evaluates a run, prints the table, and adds the metrics to evaluation.json.

    Args:
      workdir: Working directory of the run, or of one of its stages.
      which: Checkpoint to evaluate: 'latest', 'best' or a number of updates.
      split: Name of a split of the run, or 'all' for all of them.
      episodes: Number of episodes, or prompts, in each row; None for that of the run's own
        evaluations.
      video: Whether to also write episodes.mp4 and episode.png, for a problem with an environment.
      trust_modules: Whether the modules that the config names may be imported, see
        `restoring.read_problem`.
      accept: Names of inputs that may have changed since training, see `fingerprints.check`.

    Returns:
      The new contents of evaluation.json.

    Raises:
      ValueError: If the run cannot be loaded, see `restoring.load`, the split is unknown, or a
        split of a dataset has fewer records than `episodes`.
      CheckpointDamaged: If the checkpoint cannot be read.
    """
    directory = workdir_lib.as_path(workdir)
    problem, stage = restoring.read_problem(directory, trust_modules=trust_modules)
    problem.open_data()
    fingerprints.check(directory, problem.dependencies(), accept=accept)
    loaded = restoring.restore(problem, stage, directory, which=which)
    if split not in (*problem.splits, "all"):
        raise ValueError(
            f"--split={split!r} is unknown; choose one of {tuple(problem.splits)} or 'all'."
        )
    tell = print if multihost.is_primary() else _silent
    tell(f"{directory}: checkpoint {loaded.step}; mean [95 % interval]")
    path = directory / "evaluation.json"
    table = _read_table(path)
    measure = problem.measure(episodes=episodes, ablations=True)
    for part in problem.splits if split == "all" else (split,):
        count = problem.splits[part] if episodes is None else episodes
        tell(f"{part}: {count} {UNITS.get(problem.config.problem, 'episodes')} per row")
        for name, row in rows(measure(loaded.variables, part)).items():
            tell(f"{part:24} {name or '-':20} {_format_row(row)}", flush=True)
            row |= {"checkpoint": loaded.step, "episodes": count}
            prefix = "/".join(word for word in (part, name) if word)
            table |= {f"{prefix}/{key}": value for key, value in row.items()}
        if multihost.is_primary():
            summary_lib.write_json(path, table)
    outputs = [path]
    if video:
        rng = jax.random.PRNGKey(problem.config.seed)
        outputs += write_episodes(problem, loaded.variables, rng, directory)
    tell(f"Wrote {', '.join(map(str, outputs))}")
    return table


def _silent(*unused: object, **options: object) -> None:
    """Prints nothing, as every process but the first."""


def rows(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """Groups metrics named '<row>/<metric>' by row; the row of other metrics is ''."""
    table: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        row, _, metric = name.rpartition("/")
        if row == "reward":  # 'reward/<function>' is a metric and not a row.
            row, metric = "", name
        table.setdefault(row, {})[metric] = value
    return table


def _format_row(row: dict[str, float]) -> str:
    """Returns the metrics of a row as text, with their intervals."""
    parts = [
        f"{name} {row[name]:8.3f} [{row[f'{name}_lo']:.3f}, {row[f'{name}_hi']:.3f}]"
        if f"{name}_lo" in row
        else f"{name} {row[name]:8.3f}"
        for name in ("success", "return", "accuracy")
        if name in row
    ]
    parts += [
        f"{name} {row[name]:.3f}" for name in ("invalid_fraction", "failed_fraction") if name in row
    ]
    return "   ".join(parts)


def _read_table(path: epath.Path) -> dict[str, float]:
    """Returns the metrics of earlier evaluations; an empty dict if the file does not exist.

    Raises:
      ValueError: If the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_bytes())
        if isinstance(table, dict):
            return table
        reason = "it is not a JSON object"
    except (OSError, ValueError) as error:
        reason = workdir_lib.one_line(error)
    raise ValueError(f"{path} cannot be read ({reason}): move it away.")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError, multihost.OtherProcessFailed):
        evaluate(
            FLAGS.workdir,
            which=FLAGS.which,
            split=FLAGS.split,
            episodes=FLAGS.episodes,
            video=FLAGS.video,
            trust_modules=FLAGS.trust_modules,
            accept=FLAGS.accept_changes,
        )


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_string("workdir", None, "Working directory of a stage.", required=True)
    flags.DEFINE_string("split", "all", "Split to evaluate, or 'all'.")
    flags.DEFINE_integer(
        "episodes",
        None,
        "Number of episodes in each row; for a dataset, the number of records from the front of a "
        "split. The default is that of the run's own evaluations; for a dataset, all records.",
        lower_bound=2,
    )
    flags.DEFINE_string("which", "latest", "Checkpoint to evaluate: 'latest', 'best' or a step.")
    flags.DEFINE_bool("video", False, "Also write episodes.mp4 and episode.png.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules that the run's config names.")
    flags.DEFINE_list(
        "accept_changes",
        [],
        "Inputs that may have changed since training, any of "
        f"{', '.join(fingerprints.ACCEPTABLE)}.",
    )
    run_command(main, processes=True)


if __name__ == "__main__":
    run()
