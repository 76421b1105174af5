r"""Trains a policy with a config; the same command resumes from the last checkpoint.

  mmrl-train --config=reach_ppo --workdir=runs/reach [--config.ppo.clip=0.1] [--config.seed=1]
  mmrl-train --config=reach_ppo --help      # the keys of this config, with their values

A config is given by its name in the package (mmrl_jax/configs) or by the path of your own file.
The command writes to the workdir:
  summary.json          final success rate (return for an environment without success) on the
                        training split with its 95 % interval, from the last evaluation; for a
                        dataset the return on its test split; times; steps
  metrics.jsonl         logged metrics, also as learning_curves.png and in tensorboard/
  incidents.jsonl       divergences after which the run went back to a checkpoint, if
                        <stage>.rollback.max_retries allows it
  checkpoints/          the newest checkpoints and the best one
  config.json           the config; a workdir of another config is rejected
  run.json              fingerprints of the other inputs of the run, see --accept_changes
  lock.json             the process that runs in the workdir, while it runs
  samples.html          for token policies: images, prompts, completions and rewards
  profile/              with --profile, a trace of a few updates for Perfetto and TensorBoard
  <stage>/              the same files of each stage before the last

Before a stage is compiled, the memory that it needs is printed, see docs/planning.md. A run that
cannot fit its devices is refused, with the nearest change that makes it fit.

Ctrl-C or SIGTERM saves and stops, with exit code 143. If training diverges, or rewards or records
fail in every retry, the command ends with an error and exit code 1. If an evaluation or a report
fails, it prints a message and continues.

With --distributed in each process of a TPU pod or a Slurm job, or with --coordinator_address,
--num_processes and --process_id, the run uses the devices of several hosts, see docs/runs.md.
"""

import functools

from absl import flags
import jax

from mmrl_jax import problems, runs
from mmrl_jax.commands.common import (
    EXIT_INTERRUPTED,
    FAILURES,
    clean_exit,
    define_config,
    refuse_arguments,
    run_command,
)
from mmrl_jax.distributed import multihost
from mmrl_jax.planning import start
from mmrl_jax.training import fingerprints, rollback

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    """Runs the command line."""
    refuse_arguments(argv)
    # A ValueError from training itself would be a bug, so that its traceback is kept.
    with clean_exit(ValueError, multihost.OtherProcessFailed):
        problem = multihost.on_all(lambda: problems.make(FLAGS.config))
        lock = runs.claim(problem, FLAGS.workdir, accept=FLAGS.accept_changes)
    devices = list(problem.mesh.devices.flat)
    kinds = sorted({device.device_kind for device in devices})
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    _tell(f"Devices: {len(devices)} of {jax.device_count()} ({', '.join(kinds)}{processes}).")
    with lock, clean_exit(*FAILURES, start.DoesNotFit):
        start.check(problem, _tell)
        inspected = functools.partial(start.inspected, problem=problem, tell=_tell)
        trained = runs.train_stages(
            problem, FLAGS.workdir, inspected=inspected, profile=FLAGS.profile
        )
    status = "interrupted; the same command resumes it" if trained.interrupted else "done"
    if rollbacks := sum(result.rollbacks for result in trained.results.values()):
        status += f", with rollbacks after {rollbacks} divergences, see {rollback.INCIDENTS}"
    _tell(f"Training {status}. Outputs: {FLAGS.workdir}")
    return EXIT_INTERRUPTED if trained.interrupted else 0


def _tell(text: str) -> None:
    """Prints a line, in the first process alone."""
    if multihost.is_primary():
        print(text, flush=True)


def run() -> None:
    """Parses the flags and runs the command."""
    if define_config(__doc__, required=True):
        return
    flags.DEFINE_string("workdir", None, "Directory of all outputs.")
    flags.DEFINE_list(
        "accept_changes",
        [],
        "Inputs that may have changed since a resumed run began, any of "
        f"{', '.join(fingerprints.ACCEPTABLE)}.",
    )
    flags.DEFINE_bool(
        "profile", False, "Trace a few dispatches of each stage for Perfetto and TensorBoard."
    )
    flags.mark_flag_as_required("workdir")
    run_command(main, processes=True)


if __name__ == "__main__":
    run()
