"""PPO of the multimodal transformer on any Brax environment, with pixels and an instruction.

Command:   python -m experiments.train --config=pixels_ppo --workdir=runs/pendulum
           python -m experiments.train --config=pixels_ppo:brax:reacher \
               --workdir=runs/reacher_pixels
Hardware:  two CPU cores.
Result:    better than random actions after twenty updates (test_learning); full length: not run.
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

CONFIG: dict[str, Any] = {
    "problem": "control",
    "stages": ("ppo",),
    "env": {"options": {"episode_length": 1000}},
    "model": {"patch_margin": 2},
    "run": {"eval_episodes": 32},
    "ppo": {
        "num_updates": 60,
        "eval_interval": 30,
        "checkpoint_interval": 30,
        "num_envs": 256,
        "unroll_length": 20,
        "num_epochs": 4,
        "num_minibatches": 10,
        "discount": 0.97,
        # Returns are 30 and more. With a coefficient of 0.5 and a gradient norm clipped to 1, the
        # gradient of the value loss would dominate that of the policy.
        "value_coef": 0.02,
        "optimizer": {"learning_rate": 3e-4, "schedule": "linear", "max_grad_norm": 10.0},
        "entropy_coef": 1e-2,
        "auxiliary_coef": 40.0,
        "pointing_coef": 4.0,
        "initial_std": 0.5,
    },
}


def get_config(name: str = "brax:inverted_pendulum") -> ml_collections.ConfigDict:
    """Returns the config for the environment `name`.

    Args:
      name: Name of the environment: 'brax:<name>', or 'playground:<name>' if MuJoCo Playground is
        installed.
    """
    return problems.complete(CONFIG, {"env": {"name": name}})
