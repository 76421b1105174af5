r"""SmolLM2 learns from your own images, prompts and reward functions.

A folder contains the images and a metadata.jsonl, which has a line of JSON for each record with
file_name, prompt, answer, and further columns for the reward functions; docs/data.md has further
layouts. Reward functions for common kinds of answers are in mmrl_jax.rewards. One of your own takes
keyword arguments and returns a number, for example in my_rewards.py in the current directory:

    def length(*, prompt, completion, answer, **columns):
        return -len(completion) / 100

At least 64 records select the best checkpoint (dataset.validation_size), and as many others are for
the reported evaluation (dataset.test_size, or all records of dataset.test_directory). All records
of an image are in the same split, and the split does not depend on the seed of the run.

Reward functions are called in worker processes, between the program that generates and the one that
learns. A completion whose reward fails or times out is masked out and counted
(completion/unscored), unless the function declares the result of a failed call, see
mmrl_jax/tasks/rewards.py.

Command:   python -m experiments.train --config=folder_grpo --workdir=runs/folder \
               --config.dataset.directory=DIR --config.rewards.functions="('my_rewards:length',)"
           with --config=folder_grpo:sft,grpo to learn from the records' answers first,
           or :dpo, :ppo for other algorithms,
           with --config.model.checkpoint=DIRECTORY for another decoder in the Hugging Face format;
           for a complete pretrained vision-language model see configs/vlm_grpo.py
Hardware:  intended for one GPU
Time:      not run
Result:    not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import smollm2_vqa_grpo

SAMPLED: dict[str, Any] = {
    "num_updates": 1000,
    "eval_interval": 50,
    "checkpoint_interval": 50,
    "prompts_per_update": 32,
    "num_completions": 8,
    # The vision encoder is trained too, because it is not yet aligned with the language model.
    "trainable": r"params/vision/.*|lora/.*",
    "reference_ema_decay": 1.0,
    "num_epochs": 1,
    "num_minibatches": 4,
    "grad_accum_steps": 2,
    "optimizer": {"learning_rate": 1e-4, "schedule": "linear"},
}
CONFIG: dict[str, Any] = {
    "problem": "dataset",
    "stages": ("grpo",),
    "model": smollm2_vqa_grpo.MODEL,
    "sft": {
        "num_updates": 5000,
        "batch_size": 64,
        "trainable": r"params/vision/.*",
        "optimizer": {"learning_rate": 3e-4},
        "updates_per_dispatch": 50,
        "eval_interval": 500,
        "checkpoint_interval": 500,
    },
    "grpo": SAMPLED | {"kl_coef": 0.02, "entropy_coef": 0.02},
    "dpo": SAMPLED,
    "ppo": SAMPLED | {"kl_coef": 0.02, "entropy_coef": 0.02},
}


def get_config(stages: str = "grpo") -> ml_collections.ConfigDict:
    """Returns the config of one or more stages.

    Args:
      stages: Names of stages separated by commas, for example 'sft,grpo'. They are 'grpo', 'dpo',
        'ppo', and 'sft' on the records' answers.
    """
    return problems.complete(CONFIG, {"stages": tuple(stages.split(","))})
