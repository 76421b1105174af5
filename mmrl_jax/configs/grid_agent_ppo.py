"""A small vision-language model follows instructions on a grid, with actions written as text.

It observes the grid and the instruction, and answers with a word: up, down, left, right or stay. It
is fine-tuned on 4096 episodes of an expert, and then with PPO with a value for every token.

Command:   python -m experiments.train --config=grid_agent_ppo --workdir=runs/grid
           with --config.env.name=language_reach for an arm, whose words are the torques of two
           joints
Hardware:  two CPU cores.
Time:      with half of the PPO updates, 2.8 minutes (study grid_agent); full length: not run
Result:    with half of the PPO updates, success 0.73 after fine-tuning and 0.84 after PPO (IQM of 5
           seeds); full length: not run
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
    """Returns the config of the text agent."""
    return problems.complete(CONFIG)
