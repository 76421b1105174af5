"""The main job over five seeds, as `make quickstart` runs it.

Command:   python -m experiments.study --study=experiments/studies/quickstart.py
Hardware:  two CPU cores.
Time:      7 minutes a seed (AMD EPYC, beside other work)
Result:    success 0.91 [0.66, 0.92] after PPO, 0.46 [0.39, 0.53] after as much time of more cloning
           (IQM of 5 seeds)
"""

import pathlib
from typing import Any

import ml_collections

from experiments import quickstart
from mmrl_jax import runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.configs import reach_ppo
from mmrl_jax.training.provenance import commit, hardware

SEEDS = 5
MAIN = "final/train/success"
VARIANTS: dict[str, dict] = {"reach_ppo": {}}


def run(
    config: ml_collections.ConfigDict, seed: int, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """A whole quickstart; None if a signal came first."""
    del config  # The main job has one.
    problem, directory = quickstart.make_problem(seed), workdir_lib.as_path(workdir)
    with runs.claim(problem, directory):
        summary = quickstart.quickstart(problem, directory)
    if summary is None:
        return None
    # The intervals over the episodes of one run say nothing over seeds.
    means = {name: x for name, x in summary.items() if not name.endswith(("_lo", "_hi"))}
    return means | {"commit": commit(), "hardware": hardware()}


RUNNERS = {"reach_ppo": run}


def get_config(_: str = "reach_ppo") -> ml_collections.ConfigDict:
    """The config of the main job."""
    return reach_ppo.get_config()
