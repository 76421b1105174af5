"""PPO of the multimodal transformer on `language_locomotion`, from scratch.

Command:   python -m experiments.train --config=locomotion_ppo --workdir=runs/ant
Hardware:  two CPU cores.
Result:    better than random actions after twenty updates (test_learning); full length: not run.
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import pixels_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of Brax's ant on spring physics, with instructions of its velocity."""
    changes = {
        "env": {"name": "language_locomotion", "options": {"episode_length": 200}},
        "model": {"auxiliary": (("command", 2),)},
        "ppo": {
            "num_updates": 400,
            "eval_interval": 50,
            "checkpoint_interval": 50,
            "auxiliary_coef": 0.5,
            "entropy_coef": 1e-3,
        },
    }
    return problems.complete(pixels_ppo.CONFIG, changes)
