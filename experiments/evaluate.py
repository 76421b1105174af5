"""Evaluates a trained run, per split and with each modality hidden in turn.

  python -m experiments.evaluate --workdir=runs/reach --split=train
  python -m experiments.evaluate --workdir=runs/reach --split=all --episodes=1024 --which=best
  python -m experiments.evaluate --workdir=runs/quickstart/warm_start

The workdir may be that of any stage, trained on any number of devices. Prints a table of success
(return, where an environment has no success; accuracy of answers to questions, and that with
another question's picture) with 95 % bootstrap intervals, and adds its numbers to the workdir's
evaluation.json, beside those of earlier calls:

  <split>/[no_<modality>/]success, success_lo, success_hi, return, return_lo, return_hi, length
  <split>/[no_<modality>/]checkpoint, episodes       what the numbers are of

Without --episodes there are as many as in the run's own evaluations; of a folder, all records of
the split. For questions of several levels of difficulty there is also <split>/<level>/accuracy and
so on, of those of the episodes that are of the level.

A run on a folder has reward functions, which are imported and run: those of a module that is not of
this package with --trust_modules alone. What the run depends on must be what it was trained with;
--accept_changes=records evaluates it on other records.
"""

from collections.abc import Callable, Collection, Iterator
import json
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax.numpy as jnp
import ml_collections

from experiments.train import clean_exit, factory_of, write_json
from mmrl_jax.evaluation.evaluate import MODALITIES, describe
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.training import checkpoint, factory, fingerprints, folder_factory, token_models
from mmrl_jax.training import workdir as workdir_lib
from mmrl_jax.types import Params

FLAGS = flags.FLAGS


def restore(
    workdir: epath.Path, which: str, *, accept: Collection[str] = ()
) -> tuple[ml_collections.ConfigDict, LearnerState, int]:
    """The config, the learner (without optimizer) and the checkpoint's step of a control stage.

    Args:
      workdir: of the stage.
      which: 'latest', 'best' or a step.
      accept: changes of what the run depends on that are meant, see `fingerprints.check`.

    Raises:
      ValueError: no run, or no such checkpoint there, or its config is not one of this version, or
        what its model depends on has changed.
      CheckpointDamaged: it cannot be read.
    """
    config = read_config(workdir)
    _check_model(workdir, config, accept)
    like = factory.stored_learner(config)
    names = ("params", "normalizer")
    restored, step = _restore_parts(workdir, {name: getattr(like, name) for name in names}, which)
    return config, like.replace(opt_state=(), steps=jnp.zeros((), jnp.int32), **restored), step


def restore_tokens(
    workdir: epath.Path,
    which: str,
    *,
    trust_modules: bool = False,
    accept: Collection[str] = (),
) -> tuple[ml_collections.ConfigDict, tuple[Params, Any], int]:
    """The config, both halves of the variables and the step of a stage of a token policy.

    A checkpoint of RL holds what RL trains; the rest is read from that of fine-tuning, in the
    folder 'sft'. For arguments and errors see `restore` and `read_config`.
    """
    config = read_config(workdir, trust_modules=trust_modules)
    _check_model(workdir, config, accept)
    model = factory_of(config).make_parts(config).model
    stage = "sft" if config.algorithm == "sft" or is_fine_tuning(workdir) else "rl"

    def params(stage: str, place: epath.Path, which: str) -> tuple[Params, int]:
        like = token_models.stored_params(config, model, stage)
        restored, step = _restore_parts(place, {"params": like}, which)
        return restored["params"], step

    start = None
    if stage == "rl" and config.sft.updates:
        # RL began where fine-tuning ended, and nowhere before.
        start, _ = params("sft", workdir / "sft", str(config.sft.updates))
    trained, step = params(stage, workdir, which)
    variables = token_models.stage_variables(config, model, trained, start=start, stage=stage)
    return config, variables, step


def is_fine_tuning(workdir: epath.Path) -> bool:
    """Whether a workdir is that of the fine-tuning before RL."""
    run = fingerprints.read(workdir)
    if run is not None:
        return run.stage == "sft"
    # A run of an earlier version, which kept no stage: RL's workdir is the one above.
    return workdir.name == "sft" and workdir_lib.stored_config(workdir.parent) is not None


def _check_model(
    workdir: epath.Path, config: ml_collections.ConfigDict, accept: Collection[str]
) -> None:
    """Compares what the model of a run depends on; records and rewards may have changed."""
    now = factory_of(config).dependencies(config)
    of_model = {name: x for name, x in now.items() if name in fingerprints.OF_MODEL}
    fingerprints.check(workdir, of_model, accept=accept)


def read_config(workdir: epath.Path, *, trust_modules: bool = False) -> ml_collections.ConfigDict:
    """The config of a stage, for one device, wherever the run was trained.

    Args:
      workdir: of the stage.
      trust_modules: import the modules that the config names, whoever wrote it.

    Raises:
      ValueError: no run, or its config is not one of this version, or it names modules of others
        and these are not trusted.
    """
    config = workdir_lib.stored_config(workdir)
    if config is None:
        raise ValueError(f"--workdir={workdir} holds no run (no config.json that can be read).")
    modules = _modules(config)
    if modules and not trust_modules:
        raise ValueError(
            f"--workdir={workdir} has reward functions of {', '.join(modules)}, which would be "
            "imported and run here. If you trust the module that this name finds on this machine, "
            "add --trust_modules."
        )
    if "devices" in config:
        config.devices = 1
    factory_of(config).check(config)
    return config


def _modules(config: ml_collections.ConfigDict) -> list[str]:
    """The modules that a config names and that are none of ours."""
    rewards = config.get("rewards")
    names = rewards.get("functions", ()) if isinstance(rewards, ml_collections.ConfigDict) else ()
    found = {str(name).partition(":")[0] for name in names if isinstance(names, tuple)}
    return sorted(name for name in found if name.partition(".")[0] != "mmrl_jax")


def _restore_parts(
    workdir: epath.Path, like: dict[str, Any], which: str
) -> tuple[dict[str, Any], int]:
    parts, step = checkpoint.restore_parts(
        workdir,
        {f"learner/{name}": x for name, x in like.items()},
        which=int(which) if which.isdecimal() else which,
    )
    return {name: parts[f"learner/{name}"] for name in like}, step


def measures(
    workdir: epath.Path,
    which: str,
    episodes: int | None,
    *,
    trust_modules: bool = False,
    accept: Collection[str] = (),
) -> tuple[dict[str, int], Callable[[str], Iterator[tuple[str, dict[str, float]]]], int]:
    """The splits, what measures one of them, row by row, and the step of a stage.

    A row is of what is hidden, or of one level, '' for nothing and all; for errors see `restore`.

    Args:
      workdir: of the stage.
      which: see `restore`.
      episodes: of a row; None for as many as the run's own evaluations have.
      trust_modules: see `read_config`.
      accept: see `restore`.

    Returns:
      The splits with the episodes of a row, the function, and the step.
    """
    config = read_config(workdir, trust_modules=trust_modules)
    build = factory_of(config)
    fingerprints.check(workdir, build.dependencies(config), accept=accept)
    if build is folder_factory:
        sizes = folder_factory.split_sizes(config)
    else:
        sizes = dict.fromkeys(build.splits(config), config.run.eval_episodes)
    if episodes is not None:
        sizes = dict.fromkeys(sizes, episodes)
    if build is not factory:
        config, variables, step = restore_tokens(
            workdir, which, trust_modules=trust_modules, accept=accept
        )
        count = episodes if build is folder_factory else next(iter(sizes.values()))
        measure = build.make_measure(config, episodes=count)
        return sizes, lambda split: _rows(measure(variables, split)), step
    config, learner, step = restore(workdir, which, accept=accept)
    observed = factory.make_env(config).observation_size
    evaluator = factory.make_evaluator(
        config, factory.evaluation_key(config), episodes=next(iter(sizes.values()))
    )

    def rows(split: str) -> Iterator[tuple[str, dict[str, float]]]:
        for hidden in (None, *(modality for modality in MODALITIES if modality in observed)):
            yield f"no_{hidden}" if hidden else "", describe(evaluator(learner, split, hidden))

    return sizes, rows, step


def _rows(found: dict[str, float]) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics row by row, those that are named '<row>/<metric>' in a row of their own."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in found.items():
        row, _, metric = name.rpartition("/")
        if row == "reward":  # Of a reward function, whose name may be anything.
            row, metric = "", name
        rows.setdefault(row, {})[metric] = value
    yield from rows.items()


def evaluate(
    workdir: epath.Path,
    *,
    which: str,
    split: str,
    episodes: int | None,
    trust_modules: bool = False,
    accept: Collection[str] = (),
) -> dict[str, float]:
    """Prints the table of one split, or of 'all', and returns what evaluation.json then holds.

    Args:
      workdir: of the stage.
      which: 'latest', 'best' or a step.
      split: one of the run's, or 'all'.
      episodes: a row.
      trust_modules: see `read_config`.
      accept: see `restore`.

    Raises:
      ValueError: see `restore`; the split is unknown; or a split of a folder has fewer records
        than `episodes`.
    """
    known, rows, step = measures(
        workdir, which, episodes, trust_modules=trust_modules, accept=accept
    )
    if split not in (*known, "all"):
        raise ValueError(f"--split={split!r} is unknown; choose one of {tuple(known)} or 'all'.")
    print(f"{workdir}: checkpoint {step}; mean [95 % interval]")
    path = workdir / "evaluation.json"
    table = _read_table(path)
    for part in known if split == "all" else (split,):
        print(f"{part}: {known[part]} episodes a row")
        for name, row in rows(part):
            shown = [
                f"{measure} {row[measure]:8.3f} [{row[f'{measure}_lo']:.3f}, "
                f"{row[f'{measure}_hi']:.3f}]"
                for measure in ("success", "return", "accuracy")
                if measure in row
            ]
            shown += [
                f"{measure} {row[measure]:.3f}"
                for measure in ("blind_accuracy", "invalid_fraction", "failed_fraction")
                if measure in row
            ]
            print(f"{part:24} {name or '-':15} {'   '.join(shown)}", flush=True)
            row |= {"checkpoint": step, "episodes": known[part]}
            prefix = "/".join(word for word in (part, name) if word)
            table |= {f"{prefix}/{key}": value for key, value in row.items()}
        write_json(path, table)
    print(f"Written: {path}")
    return table


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
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    with clean_exit(ValueError):
        evaluate(
            workdir_lib.as_path(FLAGS.workdir),
            which=FLAGS.which,
            split=FLAGS.split,
            episodes=FLAGS.episodes,
            trust_modules=FLAGS.trust_modules,
            accept=FLAGS.accept_changes,
        )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a stage.", required=True)
    flags.DEFINE_string("split", "all", "Split to evaluate, or 'all'.")
    flags.DEFINE_integer(
        "episodes",
        None,
        "Episodes a row; of a folder, the first so many records of a split. By default as many as "
        "in the run's own evaluations; of a folder, all records of a split.",
        lower_bound=2,
    )
    flags.DEFINE_string("which", "latest", "Checkpoint to evaluate: 'latest', 'best' or a step.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules of the run's reward functions.")
    flags.DEFINE_list(
        "accept_changes", [], f"What may have changed: {', '.join(fingerprints.ACCEPTABLE)}."
    )
    logging.set_verbosity(logging.WARNING)
    app.run(main)
