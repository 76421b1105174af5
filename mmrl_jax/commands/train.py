r"""Trains a policy as a config says; the same command again resumes from the last checkpoint.

  mmrl-train --config=reach_ppo --workdir=runs/reach [--config.ppo.clip=0.1] [--config.seed=1]
  mmrl-train --config=reach_ppo --help      # the keys of this config, with their values

A config is named by its name in the package (mmrl_jax/configs) or by the path of a file of yours.
Writes to the workdir:
  summary.json          final success (return, where an environment has no success) on the training
                        split with its 95 % interval, from the last evaluation; for a dataset the
                        return on its test split, which chooses no checkpoint; times; steps
  metrics.jsonl         what was logged; learning_curves.png shows it, tensorboard/ has it too
  checkpoints/          the newest ones and the best
  config.json           the config; a workdir of another config is refused
  run.json              fingerprints of what the run depends on beside it, see --accept_changes
  lock.json             while a process runs there: which one
  samples.html          of policies that complete prompts: images, prompts, completions, rewards
  <stage>/              the same of the stages before the last

Ctrl-C or SIGTERM saves and stops. Training that diverged, or whose rewards or records fail each
time they are tried, ends with an error and exit code 1. An evaluation or report that fails is a
message.
"""

import functools
import sys

from absl import flags
import jax
from ml_collections import config_flags

from mmrl_jax import problems, runs
from mmrl_jax.commands.common import (
    FAILURES,
    clean_exit,
    refuse_arguments,
    run_command,
)
from mmrl_jax.config import loading, schema
from mmrl_jax.problems import renamed
from mmrl_jax.training import fingerprints

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    # A ValueError from training itself would be a fault of the code, and keeps its stack.
    with clean_exit(ValueError):
        problem = problems.make(FLAGS.config)
        lock = runs.claim(problem, FLAGS.workdir, accept=FLAGS.accept_changes)
    used = list(problem.mesh.devices.flat)
    kinds = sorted({device.device_kind for device in used})
    print(f"Devices: {len(used)} of {jax.device_count()} ({', '.join(kinds)}).", flush=True)
    with lock, clean_exit(*FAILURES):
        trained = runs.train_stages(problem, FLAGS.workdir)
    ended = "interrupted; the same command resumes it" if trained.interrupted else "done"
    print(f"Training {ended}. Outputs: {FLAGS.workdir}")


def run() -> None:
    """Parses the flags and runs the command."""
    with clean_exit(ValueError):
        sys.argv = loading.resolve_flag(sys.argv)
        config = loading.flag_config(sys.argv)
        if config is not None:
            config = problems.complete(config)
            if loading.wants_help(sys.argv):
                print(__doc__)
                print("The keys of this config, each set by --config.<key>=<value>:\n")
                print(schema.describe(problems.options(config), config))
                return
            loading.validate_overrides(
                sys.argv,
                config,
                renamed=renamed.KEYS,
                elsewhere=functools.partial(problems.elsewhere, config),
            )
    config_flags.DEFINE_config_file("config", None, "Name or file of the config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory that gets all outputs.")
    flags.DEFINE_list(
        "accept_changes",
        [],
        f"What may have changed since a resumed run began: {', '.join(fingerprints.ACCEPTABLE)}.",
    )
    flags.mark_flags_as_required(["config", "workdir"])
    run_command(main)


if __name__ == "__main__":
    run()
