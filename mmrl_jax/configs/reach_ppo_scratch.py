"""PPO on `language_reach` without a warm start: what the demonstrations are worth.

Command:   python -m experiments.train --config=configs/reach_ppo_scratch.py \
               --workdir=runs/reach_ppo_scratch
Hardware:  two CPU cores.
Time and result: not run.
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns `reach_ppo` from random parameters, for longer."""
    changes = {
        "stages": ("ppo",),
        "ppo": {"num_updates": 240, "initial_std": 0.5, "entropy_coef": 0.003},
    }
    return problems.complete(reach_ppo.CONFIG, changes)
