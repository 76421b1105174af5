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
SMALLEST = deep_sea_rnd.SIZE
OPTIONS = deep_sea_rnd.PPO | {"num_updates": 1500}


def _variants(size: int) -> dict[str, dict[str, Any]]:
    """Returns the changes of the variants of a size to the baseline, PPO on the smallest sea."""
    is_baseline = size == SMALLEST  # Variants say only what differs from it.
    sea: dict[str, Any] = {} if is_baseline else {"env": {"options": {"size": size}}}
    rollout: dict[str, Any] = {} if is_baseline else {"unroll_length": 2 * (size + 1)}
    return {
        f"ppo_{size}": {} if is_baseline else sea | {"ppo": rollout},
        f"ppo_entropy_{size}": sea | {"ppo": rollout | {"entropy_coef": 1e-2}},
        f"rnd_{size}": sea | {"stages": ("rnd",), "rnd": OPTIONS | rollout},
    }


VARIANTS = _variants(SMALLEST) | _variants(20) | _variants(30)


def get_config(variant: str = "ppo_10") -> ml_collections.ConfigDict:
    """Returns the config of a variant.

    Raises:
      KeyError: If the variant is unknown.
    """
    return problems.complete(
        deep_sea_rnd.CONFIG, {"stages": ("ppo",), "ppo": OPTIONS}, VARIANTS[variant]
    )
