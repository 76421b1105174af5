"""Ablation study of `reach_ppo`: each part is removed or changed, with fewer updates.

Command:   python -m experiments.study --study=experiments/studies/reach.py
           python -m experiments.train --config=experiments/studies/reach.py:no_film --workdir=DIR
Hardware:  two CPU cores.
Time:      2 to 5 minutes per run (AMD EPYC, on a shared machine)
Result:    success 0.85 for the baseline, 0.87 with MiniLM, 0.83 with cross-attention, at most 0.60
           for the other variants (IQM of 5 seeds)
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo

SEEDS = 5
MAIN = "final/train/success"

# Changes of each variant to the baseline.
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "no_auxiliary": {
        "bc": {"auxiliary_coef": 0.0, "pointing_coef": 0.0},
        "ppo": {"auxiliary_coef": 0.0, "pointing_coef": 0.0},
    },
    "no_warm_start": {"stages": ("ppo",)},
    "no_film": {"model": {"film": False}},
    "cross_attention": {"model": {"fusion": "cross"}},
    "late_concatenation": {"model": {"fusion": "late"}},
    "minilm": {"model": {"text_encoder": "minilm"}},
    "pixels_24": {"env": {"height": 24, "width": 24}},
}


def get_config(variant: str = "baseline") -> ml_collections.ConfigDict:
    """Returns the config of a variant, with 750 updates of cloning and 90 of PPO.

    Raises:
      KeyError: If the variant is unknown.
    """
    size = {
        "bc": {"num_updates": 750, "eval_interval": 750, "checkpoint_interval": 750},
        "ppo": {"num_updates": 90, "eval_interval": 90},
    }
    return problems.complete(reach_ppo.CONFIG, size, VARIANTS[variant])
