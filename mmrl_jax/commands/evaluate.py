"""Evaluates a trained run on its splits, and with each modality shuffled in turn.

  mmrl-evaluate --workdir=runs/reach --split=train
  mmrl-evaluate --workdir=runs/reach --split=all --episodes=1024 --which=best
  mmrl-evaluate --workdir=runs/quickstart/bc
  mmrl-evaluate --workdir=runs/reach --video        # also episodes.mp4 and episode.png

The workdir may be that of any stage, trained on any number of devices. Prints a table of success
(return, where an environment has no success; accuracy on verifiable questions) with 95 % bootstrap
intervals, and adds its numbers to the workdir's evaluation.json, beside those of earlier calls:

  <split>/[shuffled_<modality>/]success, success_lo, success_hi, return, return_lo, ..., length
  <split>/[shuffled_<modality>/]checkpoint, episodes       what the numbers are of

A row 'shuffled_pixels' is of the policy that is given the pixels of another episode. Without
--episodes there are as many as in the run's own evaluations; of a dataset, all records of the
split. For questions of several levels of difficulty there is also <split>/<level>/accuracy and so
on, of those of the episodes that are of the level.

A run on a dataset has reward functions, which are imported and run: those of a module that is not
of this package with --trust_modules alone. What the run depends on must be what it was trained
with; --accept_changes=records evaluates it on other records.
"""

from collections.abc import Collection
import json

from absl import flags
from etils import epath
import jax

from mmrl_jax import runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.reporting.episodes import write_episodes
from mmrl_jax.training import fingerprints

FLAGS = flags.FLAGS


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
    """Prints the table of one split, or of 'all', and returns what evaluation.json then holds.

    Args:
      workdir: Directory of the run, or of one of its stages.
      which: Checkpoint: 'latest', 'best' or an update.
      split: One of the run's splits, or 'all'.
      episodes: Episodes, or prompts, of a row; by default as many as in the run's own evaluations.
      video: Also write episodes.mp4 and episode.png, of a problem with an environment.
      trust_modules: See `runs.read_problem`.
      accept: See `fingerprints.check`.

    Raises:
      ValueError: See `runs.load`; the split is unknown; or a split of a dataset has fewer records
        than `episodes`.
      CheckpointDamaged: The checkpoint cannot be read.
    """
    directory = workdir_lib.as_path(workdir)
    problem, stage = runs.read_problem(directory, trust_modules=trust_modules)
    fingerprints.check(directory, problem.dependencies(), accept=accept)
    loaded = runs.restore(problem, stage, directory, which=which)
    if split not in (*problem.splits, "all"):
        raise ValueError(
            f"--split={split!r} is unknown; choose one of {tuple(problem.splits)} or 'all'."
        )
    print(f"{directory}: checkpoint {loaded.step}; mean [95 % interval]")
    path = directory / "evaluation.json"
    table = _read_table(path)
    measure = problem.measure(episodes=episodes, ablations=True)
    for part in problem.splits if split == "all" else (split,):
        count = episodes or problem.splits[part]
        print(f"{part}: {count} episodes a row")
        for name, row in rows(measure(loaded.variables, part)).items():
            print(f"{part:24} {name or '-':20} {_shown(row)}", flush=True)
            row |= {"checkpoint": loaded.step, "episodes": count}
            prefix = "/".join(word for word in (part, name) if word)
            table |= {f"{prefix}/{key}": value for key, value in row.items()}
        runs.write_json(path, table)
    written = [path]
    if video:
        rng = jax.random.PRNGKey(problem.config.seed)
        written += write_episodes(problem, loaded.variables, rng, directory)
    print(f"Written: {', '.join(map(str, written))}")
    return table


def rows(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns metrics row by row; those that are named '<row>/<metric>' have a row of their own."""
    table: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        row, _, metric = name.rpartition("/")
        if row == "reward":  # Of a reward function, whose name may be anything.
            row, metric = "", name
        table.setdefault(row, {})[metric] = value
    return table


def _shown(row: dict[str, float]) -> str:
    shown = [
        f"{name} {row[name]:8.3f} [{row[f'{name}_lo']:.3f}, {row[f'{name}_hi']:.3f}]"
        for name in ("success", "return", "accuracy")
        if f"{name}_lo" in row
    ]
    shown += [
        f"{name} {row[name]:.3f}" for name in ("invalid_fraction", "failed_fraction") if name in row
    ]
    return "   ".join(shown)


def _read_table(path: epath.Path) -> dict[str, float]:
    """The numbers of earlier calls; none where there are none.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_bytes())
        if isinstance(table, dict):
            return table
        reason = "it holds no JSON object"
    except (OSError, ValueError) as error:
        reason = workdir_lib.one_line(error)
    raise ValueError(f"{path} cannot be read ({reason}): move it away.")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
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
    flags.DEFINE_string("workdir", None, "Directory of a stage.", required=True)
    flags.DEFINE_string("split", "all", "Split to evaluate, or 'all'.")
    flags.DEFINE_integer(
        "episodes",
        None,
        "Episodes of a row; of a dataset, the first so many records of a split. By default as many "
        "as in the run's own evaluations; of a dataset, all records of a split.",
        lower_bound=2,
    )
    flags.DEFINE_string("which", "latest", "Checkpoint to evaluate: 'latest', 'best' or an update.")
    flags.DEFINE_bool("video", False, "Also write episodes.mp4 and episode.png.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules that the run's config names.")
    flags.DEFINE_list(
        "accept_changes", [], f"What may have changed: {', '.join(fingerprints.ACCEPTABLE)}."
    )
    run_command(main)


if __name__ == "__main__":
    run()
