"""Trains a policy as a config says; the same command again goes on from the last checkpoint.

  python -m experiments.train --config=configs/reach_ppo.py --workdir=runs/reach \
      [--config.ppo.clip=0.1] [--config.seed=1]

Writes checkpoints, metrics.jsonl, TensorBoard events, learning_curves.png and config.json to the
workdir; a warm start has a workdir of its own inside it, warm_start/.
"""

import dataclasses
import pathlib
import sys

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from mmrl_jax.learners.bc import Demonstrations
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import factory, loop, report
from mmrl_jax.training.loop import Result

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves in memory: the demonstrations and how each stage ended."""

    demonstrations: Demonstrations | None
    expert_success: float | None
    warm_start: Result | None
    ppo: Result | None

    @property
    def interrupted(self) -> bool:
        """A SIGTERM ended it before its time."""
        return any(r is not None and r.interrupted for r in (self.warm_start, self.ppo))


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> Trained:
    """Runs the stages of a config, each resumed from its newest checkpoint.

    Raises:
      ValueError: the config cannot run, or the workdir is another config's.
    """
    factory.check(config)
    workdir = pathlib.Path(workdir)
    mesh = factory.make_mesh(config)
    data, expert_success, warm, tuned = None, None, None, None
    if config.warm_start.updates:
        place = workdir if config.algorithm == "bc" else workdir / "warm_start"
        data, expert_success = factory.record_demonstrations(config)
        print(
            f"{config.warm_start.episodes} demonstrated episodes of an expert that succeeds in "
            f"{expert_success:.0%} of them.",
            flush=True,
        )
        warm = loop.run(factory.cloning_stage(config, mesh, data), workdir=place, config=config)
        report.learning_curves(
            place / "metrics.jsonl", place / "learning_curves.png", x="progress/updates"
        )
    if config.algorithm == "ppo" and not (warm is not None and warm.interrupted):
        start = warm.carry.learner if warm is not None else None
        tuned = loop.run(
            factory.ppo_stage(config, mesh, start=start), workdir=workdir, config=config
        )
        report.learning_curves(workdir / "metrics.jsonl", workdir / "learning_curves.png")
    return Trained(data, expert_success, warm, tuned)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    try:
        trained = train(FLAGS.config, FLAGS.workdir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    ended = "interrupted; the same command goes on" if trained.interrupted else "done"
    print(f"Training {ended}. Outputs: {FLAGS.workdir} (devices: {jax.device_count()})")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File of the config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory that gets all outputs.")
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        config_lib.validate_overrides(sys.argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
