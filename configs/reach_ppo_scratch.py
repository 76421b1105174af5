"""PPO on `language_reach` without a warm start: what the demonstrations are worth.

Command:   python -m experiments.train --config=configs/reach_ppo_scratch.py \
               --workdir=runs/reach_ppo_scratch
Hardware:  two CPU cores.
Time and result: not run.
"""

import ml_collections

from configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """`reach_ppo` from random parameters, for longer."""
    config = reach_ppo.get_config()
    config.warm_start.updates = 0
    config.ppo.initial_std = 0.5
    config.ppo.entropy_weight = 0.003
    config.run.updates = 240
    return config
