"""Behaviour cloning of the scripted expert on `language_reach`: the warm start alone.

Command:   python -m experiments.train --config=configs/reach_bc.py --workdir=runs/reach_bc
Hardware:  two CPU cores.
Time:      1.6 minutes, half a minute of compilation.
Result:    success on the training split 0.24 (seed 0), of an expert's 0.38.
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns `reach_ppo`, stopped after the first stage."""
    return problems.complete(reach_ppo.CONFIG, {"stages": ("bc",)})
