"""PPO with a history of frames and discrete actions on `recall`, which needs four frames.

Command:   python -m experiments.train --config=recall_ppo --workdir=runs/recall
Hardware:  two CPU cores.
Result:    success above 0.95 with four frames, about 0.25 with one frame (test_learning).
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

CONFIG: dict[str, Any] = {
    "problem": "control",
    "stages": ("ppo",),
    "env": {"name": "recall", "height": 16, "width": 16, "history": 4},
    "model": {"width": 32, "patch_margin": 2, "patch_hidden": 32},
    "ppo": {
        "num_updates": 60,
        "updates_per_dispatch": 5,
        "eval_interval": 20,
        "checkpoint_interval": 20,
        "num_envs": 256,
        "unroll_length": 10,
        "num_epochs": 2,
        "num_minibatches": 4,
        "optimizer": {"learning_rate": 1e-3},
        "discount": 1.0,
        "entropy_coef": 0.01,
        "auxiliary_coef": 40.0,
        "pointing_coef": 4.0,
        "initial_std": 0.3,
    },
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; with `--config.env.history=1` no policy is better than chance."""
    return problems.complete(CONFIG)
