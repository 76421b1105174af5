"""PPO with an MLP on any Brax environment, by default inverted_pendulum.

Command:   python -m experiments.train --config=mlp_ppo --workdir=runs/pendulum
           python -m experiments.train --config=mlp_ppo:reacher --workdir=runs/reacher
Hardware:  two CPU cores.
Time:      1.2 minutes.
Result:    return on inverted_pendulum 1000 of 1000 (seeds 0 to 2). Other environments: not run.
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

CONFIG: dict[str, Any] = {
    "problem": "control",
    "stages": ("ppo",),
    "env": {
        "height": 0,
        "width": 0,
        "options": {"backend": "positional", "episode_length": 1000},
    },
    "model": {"kind": "mlp"},
    "run": {"eval_episodes": 64},
    "ppo": {
        "num_updates": 80,
        "updates_per_dispatch": 5,
        "eval_interval": 20,
        "checkpoint_interval": 10,
        "num_envs": 256,
        "unroll_length": 10,
        "num_minibatches": 16,
        "num_epochs": 4,
        # There is no clipping, as in Brax: values of about 100 have gradients so large that
        # clipping their sum would almost remove the policy gradient.
        "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "max_grad_norm": 1e9},
        "discount": 0.99,
        "entropy_coef": 1e-3,
        "initial_std": 0.5,
    },
}


def get_config(name: str = "inverted_pendulum") -> ml_collections.ConfigDict:
    """Returns the config for the Brax environment `name`."""
    return problems.complete(CONFIG, {"env": {"name": f"brax:{name}"}})
