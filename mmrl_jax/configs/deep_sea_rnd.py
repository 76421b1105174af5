"""PPO with random network distillation on Deep Sea, where random actions find nothing.

Command:   python -m experiments.train --config=deep_sea_rnd --workdir=runs/deep_sea
           with --config=deep_sea_rnd:ppo for PPO without intrinsic rewards, and
           --config.env.options.size=20 for a larger sea
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

SIZE = 10
PPO: dict[str, Any] = {
    "num_updates": 500,
    "updates_per_dispatch": 50,
    "eval_interval": 100,
    "checkpoint_interval": 100,
    "num_envs": 64,
    # Two episodes, and the steps that reset the environment after them.
    "unroll_length": 2 * (SIZE + 1),
    "num_minibatches": 4,
    "num_epochs": 4,
    "optimizer": {"learning_rate": 1e-3, "schedule": "linear"},
    "discount": 0.999,
    "entropy_coef": 1e-3,
}
CONFIG: dict[str, Any] = {
    "problem": "control",
    "env": {"name": "deep_sea", "height": 0, "width": 0, "options": {"size": SIZE}},
    "model": {"kind": "mlp"},
    "run": {"eval_episodes": 64},
}


def get_config(algorithm: str = "rnd") -> ml_collections.ConfigDict:
    """Returns the config of 'rnd', or of 'ppo' with the same options."""
    return problems.complete(CONFIG, {"stages": (algorithm,), algorithm: PPO})
