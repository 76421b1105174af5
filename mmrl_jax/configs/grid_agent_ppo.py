"""An agent writes its steps: a small vision-language model walks on a grid by instruction.

It sees the grid and the instruction, and answers by a word: up, down, left, right or stay. First it
clones 4096 episodes of an expert, then PPO with a value for every token goes on with rewards alone.

Command:   python -m experiments.train --config=configs/grid_agent_ppo.py --workdir=runs/grid
           with --config.env.name=language_reach for an arm, whose words are two joints' torques
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

CONFIG: dict[str, Any] = {
    "problem": "text_agent",
    "stages": ("sft", "ppo"),
    "env": {"name": "language_grid"},
    "sft": {
        "num_updates": 3000,
        "episodes": 4096,
        "batch_size": 128,
        "optimizer": {"learning_rate": 2e-3},
        "updates_per_dispatch": 50,
        "eval_interval": 500,
        "checkpoint_interval": 500,
    },
    "ppo": {
        "num_updates": 300,
        "updates_per_dispatch": 5,
        "num_envs": 128,
        "unroll_length": 16,
        "format_penalty": 0.1,
        "discount": 0.95,
        "gae_lambda": 0.95,
        "entropy_coef": 0.01,
        "num_epochs": 2,
        "num_minibatches": 4,
        "optimizer": {"learning_rate": 5e-4, "schedule": "linear"},
    },
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the agent."""
    return problems.complete(CONFIG)
