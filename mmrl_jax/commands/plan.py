r"""Plans a run: memory, FLOPs and time of each stage on a topology, without compiling anything.

  mmrl-plan --config=reach_ppo --topology=v5e-8 [--config.ppo.num_envs=4096] [--config.mesh.fsdp=8]
  mmrl-plan --config=vlm_grpo --model_config=qwen2_5_vl_7b.json --topology=v5e-64
  mmrl-plan --config=count_grpo --topology=cpu --check

A topology is a TPU slice (v5e-8, v5p-16, v6e-256, ...), a number of GPUs (h100x8, a100x1, ...), or
cpu, this host. Where the run does not fit, the nearest change with which it does is named, in keys
of the config.

The command needs neither the devices nor the weights of a pretrained model: the program of an
update is traced from shapes. --model_config names a config.json in the format of the Hugging Face
hub, or a directory that has one; what is missing beside it is replaced, see
mmrl_jax/pretrained/stand_in.py. Without --model_config, model.checkpoint is used.

With --check, the updates are compiled, for a TPU slice by libtpu, and the memory that the compiler
reports is printed next to the plan. docs/planning.md says how exact plans are.
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import tempfile

from absl import flags
from ml_collections import ConfigDict

from mmrl_jax import problems
from mmrl_jax.commands.common import clean_exit, define_config, refuse_arguments, run_command
from mmrl_jax.planning import check, chips, remedies, report
from mmrl_jax.planning.plan import Planner
from mmrl_jax.pretrained import hub_repository, stand_in

FLAGS = flags.FLAGS


@contextlib.contextmanager
def planned_config(config: ConfigDict, model_config: str | None) -> Iterator[ConfigDict]:
    """Yields a config that can be planned without its files.

    Args:
      config: Complete config of the run.
      model_config: Config.json of the model, or a directory that has one; None for that of the
        config.

    Raises:
      ValueError: If there is no config.json.
    """
    changes: dict[str, dict[str, str]] = {}
    if "dataset" in config and not config.dataset.directory:
        changes["dataset"] = {"directory": "no records are read"}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = model_config or config.model.get("checkpoint")
        if checkpoint and checkpoint.startswith(hub_repository.SCHEME):
            name = checkpoint.removeprefix(hub_repository.SCHEME)
            checkpoint = str(hub_repository.pull(name, weights=False))
        if checkpoint and (model_config or pathlib.Path(checkpoint).is_dir()):
            target = pathlib.Path(directory) / "model"
            changes["model"] = {"checkpoint": str(stand_in.complete(checkpoint, target))}
        yield problems.complete(config.to_dict(), changes)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError), planned_config(FLAGS.config, FLAGS.model_config) as config:
        topology = chips.topology(FLAGS.topology)
        planner = Planner()
        plan = planner.plan(config, topology)
        found = report.as_dict(plan)
        change = None
        if not plan.fits:
            change = remedies.remedy(planner, config, topology, plan)
            found["remedy"] = None if change is None else change[0]
        if not FLAGS.json:
            print(report.text(plan))
            if not plan.fits:
                print(report.remedy(change))
        if FLAGS.check:
            rows = check.rows(config, topology, plan)
            found["check"] = rows
            if not FLAGS.json:
                print(check.table(rows))
        if FLAGS.json:
            print(json.dumps(found, indent=2))


def run() -> None:
    """Parses the flags and runs the command."""
    if define_config(__doc__, required=True):
        return
    flags.DEFINE_string("topology", None, f"Devices, for example {chips.EXAMPLES}.")
    flags.DEFINE_string(
        "model_config", None, "A config.json of the hub, or a directory that has one."
    )
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_bool("check", False, "Compile the updates and compare.")
    flags.mark_flag_as_required("topology")
    run_command(main)


if __name__ == "__main__":
    run()
