"""PPO on `language_reach` without behavior cloning, to measure the effect of demonstrations.

Command:   python -m experiments.train --config=reach_ppo_scratch \
               --workdir=runs/reach_ppo_scratch
Hardware:  two CPU cores.
Time and result: not run.
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of PPO from random parameters, with more updates than `reach_ppo`."""
    changes = {
        "stages": ("ppo",),
        "ppo": {"num_updates": 240, "initial_std": 0.5, "entropy_coef": 0.003},
    }
    return problems.complete(reach_ppo.CONFIG, changes)
