"""Study of the quickstart over ten seeds, each as `make quickstart` runs it.

Command:   python -m experiments.study --study=experiments/studies/quickstart.py
Hardware:  two CPU cores.
Time:      8 to 12 minutes per seed (AMD EPYC, on a shared machine)
Result:    success 0.91 [0.89, 0.91] after PPO, 0.44 [0.40, 0.46] after more cloning for the same
           time (IQM of 10 seeds)
"""

import pathlib
from typing import Any

import ml_collections

from experiments import quickstart
from mmrl_jax import runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.configs import reach_ppo
from mmrl_jax.training.provenance import commit, hardware

SEEDS = 10
MAIN = "final/train/success"
VARIANTS: dict[str, dict] = {"reach_ppo": {}}


def run(
    config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """Runs a quickstart for the study.

    Args:
      config: Not used, because the quickstart has its own config.
      seed: Seed of the run.
      workdir: Working directory of the run.

    Returns:
      The summary without intervals, and the provenance; None if a signal interrupted the run.
    """
    del config
    problem, directory = quickstart.make_problem(seed), workdir_lib.as_path(workdir)
    with runs.claim(problem, directory):
        summary = quickstart.quickstart(problem, directory)
    if summary is None:
        return None
    # Intervals over the episodes of one run are left out: a study has intervals over seeds.
    means = {name: x for name, x in summary.items() if not name.endswith(("_lo", "_hi"))}
    return means | {"commit": commit(), "hardware": hardware()}


RUNNERS = {"reach_ppo": run}


def get_config(_: str = "reach_ppo") -> ml_collections.ConfigDict:
    """Returns the config of `reach_ppo`."""
    return reach_ppo.get_config()
