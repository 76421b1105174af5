"""An agent that writes its steps, before and after PPO over its tokens, on held-out grids too.

Command:   python -m experiments.study --study=experiments/studies/grid_agent.py
           python -m experiments.train --config=experiments/studies/grid_agent.py:ppo --workdir=DIR
Hardware:  two CPU cores.
Time:      1 to 3 minutes a run (AMD EPYC, beside other work)
Result:    success 0.73 after cloning, 0.84 after PPO (IQM of 5 seeds; every seed gains)
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import grid_agent_ppo

SEEDS = 5
MAIN = "final/train/success"

# What a variant changes of the baseline, which clones the expert.
VARIANTS: dict[str, dict[str, Any]] = {
    "cloned": {},
    "ppo": {"stages": ("sft", "ppo")},
}


def get_config(variant: str = "cloned") -> ml_collections.ConfigDict:
    """The config of a variant; half of the PPO of `grid_agent_ppo`.

    Raises:
      KeyError: there is no such variant.
    """
    size = {"stages": ("sft",), "ppo": {"num_updates": 150}}
    return problems.complete(grid_agent_ppo.CONFIG, size, VARIANTS[variant])
