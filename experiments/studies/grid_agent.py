"""Study of an agent with actions as text, before and after PPO, on seen and held-out grids.

Command:   python -m experiments.study --study=experiments/studies/grid_agent.py
           python -m experiments.train --config=experiments/studies/grid_agent.py:ppo --workdir=DIR
Hardware:  two CPU cores.
Time:      1 to 3 minutes per run (AMD EPYC, on a shared machine)
Result:    success 0.73 after cloning, 0.84 after PPO (IQM of 5 seeds; every seed improves)
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import grid_agent_ppo

SEEDS = 5
MAIN = "final/train/success"

# Changes of each variant to the baseline, which clones the expert.
VARIANTS: dict[str, dict[str, Any]] = {
    "cloned": {},
    "ppo": {"stages": ("sft", "ppo")},
}


def get_config(variant: str = "cloned") -> ml_collections.ConfigDict:
    """Returns the config of a variant, with half of the PPO updates of `grid_agent_ppo`.

    Raises:
      KeyError: If the variant is unknown.
    """
    size = {"stages": ("sft",), "ppo": {"num_updates": 150}}
    return problems.complete(grid_agent_ppo.CONFIG, size, VARIANTS[variant])
