"""Behavior cloning of the scripted expert on `language_reach`: the first stage of reach_ppo.

Command:   python -m experiments.train --config=reach_bc --workdir=runs/reach_bc
Hardware:  two CPU cores.
Time:      1.6 minutes, including half a minute of compilation.
Result:    success on the training split 0.35 (seed 0); the expert has 0.38.
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of `reach_ppo` with its first stage only."""
    return problems.complete(reach_ppo.CONFIG, {"stages": ("bc",)})
