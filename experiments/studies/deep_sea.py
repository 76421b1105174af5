"""Study of exploration on Deep Sea: PPO, PPO with a larger entropy bonus, and PPO with novelty.

A policy that acts at random finds the treasure of a sea of size N in one of 2^N episodes. Every run
has 1,500 updates of 64 environments with two episodes each.

Command:   python -m experiments.study --study=experiments/studies/deep_sea.py
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import deep_sea_rnd

SEEDS = 5
MAIN = "final/train/success"
SIZES = (10, 20, 30)
# Stage of each algorithm, and its changes to the config.
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {}),
    "ppo_entropy": ("ppo", {"entropy_coef": 1e-2}),
    "rnd": ("rnd", {}),
}
VARIANTS = {f"{name}_{size}": (name, size) for size in SIZES for name in ALGORITHMS}


def get_config(variant: str = "rnd_10") -> ml_collections.ConfigDict:
    """Returns the config of a variant.

    Raises:
      KeyError: If the variant is unknown.
    """
    name, size = VARIANTS[variant]
    stage, changes = ALGORITHMS[name]
    sized = {
        "env": {"options": {"size": size}},
        # An episode, and the step that resets the environment after it, twice.
        stage: {"num_updates": 1500, "unroll_length": 2 * (size + 1)} | changes,
    }
    return problems.complete(deep_sea_rnd.get_config(stage), sized)
