"""Our PPO against Brax's on inverted_pendulum.

Command:   python -m experiments.study --study=configs/studies/vs_brax_inverted_pendulum.py
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

import ml_collections

from configs.studies.vs_brax import MAIN, RUNNERS, SEEDS, VARIANTS, base_config

__all__ = ["MAIN", "RUNNERS", "SEEDS", "VARIANTS", "get_config"]


def get_config(_: str = "ours") -> ml_collections.ConfigDict:
    """The config of both variants."""
    return base_config("inverted_pendulum")
