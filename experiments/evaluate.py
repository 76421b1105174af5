"""Evaluates a trained run, per split and with each modality hidden in turn.

  python -m experiments.evaluate --workdir=runs/reach --split=train
  python -m experiments.evaluate --workdir=runs/reach --split=all --episodes=1024 --which=best

Prints a table of success with bootstrap confidence intervals and writes evaluation.json.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
import ml_collections
import numpy as np

from mmrl_jax import envs
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import factory
from mmrl_jax.training.assessment import assess, interval
from mmrl_jax.training.checkpoint import restore_params

FLAGS = flags.FLAGS
MODALITIES = ("pixels", "instruction", "proprio")


def restore(workdir: pathlib.Path, which: str) -> tuple[ml_collections.ConfigDict, LearnerState]:
    """The config and the learner of a run."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} holds no run (no config.json there).")
    config = config_lib.from_json(path.read_text(encoding="utf-8"))
    learner, step = restore_params(
        workdir, factory.stored_learner(config), prefix="learner", which=which
    )
    print(f"{workdir}: checkpoint {step}, {which}")
    return config, learner


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    workdir = pathlib.Path(FLAGS.workdir)
    try:
        config, learner = restore(workdir, FLAGS.which)
        known = envs.splits(config.env.name)
        if FLAGS.split not in (*known, "all"):
            raise ValueError(f"--split={FLAGS.split!r} is unknown; choose one of {known} or 'all'.")
    except ValueError as error:
        sys.exit(f"error: {error}")
    observed = factory.make_env(config).observation_size
    modalities = tuple(m for m in MODALITIES if m in observed)
    table = {}
    print(f"{'split':24} {'hidden':12} {'success':>8}  95 % interval     return")
    for split in known if FLAGS.split == "all" else (FLAGS.split,):
        evaluated = assess(config, learner, split, episodes=FLAGS.episodes, hidden=modalities)
        for name, episodes in evaluated.items():
            mean, low, high = interval(episodes.success)
            mean_return = float(np.mean(episodes.episode_return))
            print(
                f"{split:24} {name or '-':12} {mean:8.3f}  [{low:.3f}, {high:.3f}]"
                f"  {mean_return:8.3f}",
                flush=True,
            )
            prefix = "/".join(part for part in (split, name) if part)
            table |= {
                f"{prefix}/success": mean,
                f"{prefix}/success_lo": low,
                f"{prefix}/success_hi": high,
                f"{prefix}/return": mean_return,
            }
    (workdir / "evaluation.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {workdir / 'evaluation.json'}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run.", required=True)
    flags.DEFINE_string("split", "all", "Split to evaluate, or 'all'.")
    flags.DEFINE_integer("episodes", 512, "Episodes a row.", lower_bound=1)
    flags.DEFINE_enum("which", "latest", ["latest", "best"], "Checkpoint to evaluate.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
