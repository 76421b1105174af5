"""A small vision-language model learns to count: from a few labels, then from rewards alone.

Supervised fine-tuning uses 32768 labeled images with one to three objects of a kind. One label in
ten is a random number from zero to six instead. Reinforcement learning uses images with zero to six
objects, and the reward is whether the count is correct. Without the random labels, other numbers
would hardly be explored: fine-tuning leaves them a probability of 1 in 10000.

Command:   python -m experiments.train --config=count_grpo --workdir=runs/count
           with --config.grpo.preset=dr_grpo, gspo, ... for other algorithms of the GRPO family,
           with --config=count_grpo:dpo or :ppo for other learners
Hardware:  two CPU cores.
Time:      1.2 minutes (AMD EPYC, on a shared machine)
Result:    accuracy 0.75 [0.63, 0.83] over zero to six (IQM of 5 seeds), 0.36 after fine-tuning
"""

from typing import Any

import ml_collections

from mmrl_jax import problems

# Keys that all RL stages share.
SAMPLED: dict[str, Any] = {
    "num_updates": 1000,
    "updates_per_dispatch": 10,
    "eval_interval": 250,
    "checkpoint_interval": 250,
    "prompts_per_update": 64,
    "num_completions": 16,
    "temperature": 1.5,
    "format_penalty": 0.5,
    "num_epochs": 1,
    "num_minibatches": 4,
    "optimizer": {"learning_rate": 4e-4, "schedule": "linear"},
}
# The RL stages, each of which may follow supervised fine-tuning.
RL: dict[str, dict[str, Any]] = {
    "grpo": SAMPLED | {"entropy_coef": 0.02},
    "dpo": SAMPLED,
    "ppo": SAMPLED | {"entropy_coef": 0.02},
}
CONFIG: dict[str, Any] = {
    "problem": "task",
    "task": {"kinds": ("count",)},
    "sft": {
        "num_updates": 2000,
        "examples": 32768,
        "counts": (1, 3),
        "label_noise": 0.1,
        "batch_size": 128,
        "optimizer": {"learning_rate": 2e-3},
        "updates_per_dispatch": 50,
        "eval_interval": 500,
        "checkpoint_interval": 500,
    },
    **RL,
}


def get_config(algorithm: str = "grpo") -> ml_collections.ConfigDict:
    """Returns the config of supervised fine-tuning followed by 'grpo', 'dpo' or 'ppo'."""
    return problems.complete(CONFIG, {"stages": ("sft", algorithm)})
