"""Evaluates a trained run, per split and with each modality hidden in turn.

  python -m experiments.evaluate --workdir=runs/reach --split=train
  python -m experiments.evaluate --workdir=runs/reach --split=all --episodes=1024 --which=best
  python -m experiments.evaluate --workdir=runs/quickstart/warm_start

The workdir may be that of any stage, trained on any number of devices. Prints a table of success
(return, where an environment has no success) with 95 % bootstrap intervals, and adds its numbers
to the workdir's evaluation.json, beside those of earlier calls:

  <split>/[no_<modality>/]success, success_lo, success_hi, return, return_lo, return_hi, length
  <split>/[no_<modality>/]checkpoint, episodes       what the numbers are of
"""

import json
import pathlib

from absl import app, flags, logging
import jax.numpy as jnp
import ml_collections

from experiments.train import clean_exit, write_json
from mmrl_jax import envs
from mmrl_jax.evaluation.evaluate import MODALITIES, describe
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.training import checkpoint, factory
from mmrl_jax.training import config as config_lib

FLAGS = flags.FLAGS


def restore(
    workdir: pathlib.Path, which: str
) -> tuple[ml_collections.ConfigDict, LearnerState, int]:
    """The config, the learner (without optimiser) and the checkpoint's step of a stage.

    Args:
      workdir: of the stage.
      which: 'latest', 'best' or a step.

    Raises:
      ValueError: no run, or no such checkpoint there, or its config is not one of this version.
      CheckpointDamaged: it cannot be read.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} holds no run (no config.json there).")
    config = config_lib.from_json(path.read_text(encoding="utf-8"))
    if "devices" in config:
        config.devices = 1  # Evaluation runs on one, wherever the run was trained.
    factory.check(config)
    like = factory.stored_learner(config)
    names = ("params", "statistics")
    parts, step = checkpoint.restore_parts(
        workdir,
        {f"learner/{name}": getattr(like, name) for name in names},
        which=int(which) if which.isdecimal() else which,
    )
    restored = {name: parts[f"learner/{name}"] for name in names}
    return config, like.replace(opt_state=(), steps=jnp.zeros((), jnp.int32), **restored), step


def evaluate(workdir: pathlib.Path, *, which: str, split: str, episodes: int) -> dict[str, float]:
    """Prints the table of one split, or of 'all', and returns what evaluation.json then holds.

    Raises:
      ValueError: see `restore`; or the split is unknown.
    """
    config, learner, step = restore(workdir, which)
    known = envs.splits(config.env.name)
    if split not in (*known, "all"):
        raise ValueError(f"--split={split!r} is unknown; choose one of {known} or 'all'.")
    observed = factory.make_env(config).observation_size
    modalities = tuple(modality for modality in MODALITIES if modality in observed)
    evaluator = factory.make_evaluator(config, factory.evaluation_key(config), episodes=episodes)
    print(f"{workdir}: checkpoint {step}; mean [95 % interval] of {episodes} episodes")
    path = workdir / "evaluation.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in known if split == "all" else (split,):
        for hidden in (None, *modalities):
            row = describe(evaluator(learner, part, hidden))
            name = f"no_{hidden}" if hidden else ""
            shown = (
                f"{measure} {row[measure]:8.3f} [{row[f'{measure}_lo']:.3f}, "
                f"{row[f'{measure}_hi']:.3f}]"
                for measure in ("success", "return")
                if measure in row
            )
            print(f"{part:24} {name or '-':15} {'   '.join(shown)}", flush=True)
            row |= {"checkpoint": step, "episodes": episodes}
            prefix = "/".join(word for word in (part, name) if word)
            table |= {f"{prefix}/{key}": value for key, value in row.items()}
        write_json(path, table)
    print(f"Written: {path}")
    return table


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    with clean_exit(ValueError):
        evaluate(
            pathlib.Path(FLAGS.workdir),
            which=FLAGS.which,
            split=FLAGS.split,
            episodes=FLAGS.episodes,
        )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a stage.", required=True)
    flags.DEFINE_string("split", "all", "Split to evaluate, or 'all'.")
    flags.DEFINE_integer("episodes", 512, "Episodes a row.", lower_bound=2)
    flags.DEFINE_string("which", "latest", "Checkpoint to evaluate: 'latest', 'best' or a step.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
