"""Behaviour cloning of the scripted expert on `language_reach`: the warm start alone.

Command:   python -m experiments.train --config=configs/reach_bc.py --workdir=runs/reach_bc
Hardware:  two CPU cores.
"""

import ml_collections

from configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """`reach_ppo`, stopped after the warm start."""
    config = reach_ppo.get_config()
    config.algorithm = "bc"
    return config
