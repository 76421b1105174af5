"""Study of offline learning on `language_reach`: cloning against weighing, and augmentation.

All variants learn from the same 12,288 episodes of a scripted expert that succeeds in 39 % of them,
in as many updates, with the coefficients of the warm start of `reach_ppo`, which is the baseline.

Command:   python -m experiments.study --study=experiments/studies/offline.py
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo

SEEDS = 5
MAIN = "final/train/success"

OPTIONS: dict[str, Any] = reach_ppo.CONFIG["bc"]
# Changes of each variant to the baseline.
VARIANTS: dict[str, dict[str, Any]] = {
    "bc": {},
    "awr": {"stages": ("awr",), "awr": OPTIONS},
    "iql": {"stages": ("iql",), "iql": OPTIONS},
    "bc_shift": {"bc": {"augmentation": {"shift": 2}}},
    "bc_color": {"bc": {"augmentation": {"brightness": 0.3, "contrast": 0.3, "noise": 5.0}}},
}


def get_config(variant: str = "bc") -> ml_collections.ConfigDict:
    """Returns the config of a variant.

    Raises:
      KeyError: If the variant is unknown.
    """
    return problems.complete(reach_ppo.CONFIG, {"stages": ("bc",)}, VARIANTS[variant])
