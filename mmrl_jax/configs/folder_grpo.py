r"""SmolLM2 learns from your own pictures, questions and reward functions.

A folder holds the pictures and metadata.jsonl, a line of JSON with file_name, prompt and answer for
each, and whatever else the reward functions want to know; see mmrl_jax/tasks/folder.py. A reward
function takes keywords and returns a number, e.g. in my_rewards.py in the current directory:

    def length(*, prompt, completion, answer, **columns):
        return -len(completion) / 100

At least 64 records choose the best checkpoint (dataset.validation_size) and as many others are
reported (dataset.test_size, or all of a folder of your own, dataset.test_directory); all records of
an image are on one side, and the same images are held out whatever the seed of the run.

It is called in processes of its own, between the program that answers and the one that learns. An
answer whose reward fails, or takes too long, is left out and counted (completion/unscored), unless
its function declares what a failed call counts as, see mmrl_jax/tasks/rewards.py.

Command:   python -m experiments.train --config=configs/folder_grpo.py --workdir=runs/folder \
               --config.dataset.directory=DIR --config.rewards.functions="('my_rewards:length',)"
           with --config=configs/folder_grpo.py:sft,grpo to learn from the records' answers first,
           or :dpo, :ppo for other algorithms,
           with --config.model.checkpoint=DIRECTORY for another decoder in the hub's format; for a
           whole vision-language model see configs/vlm_grpo.py
Hardware:  meant for one GPU
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
    # Nothing has aligned the vision encoder with the language model: it learns too.
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
    "model": smollm2_vqa_grpo.SEES,
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
    """Returns the config of 'grpo', 'dpo', 'ppo', or of 'sft' on the records' answers.

    Args:
      stages: One of them, or several separated by commas, e.g. 'sft,grpo'.
    """
    return problems.complete(CONFIG, {"stages": tuple(stages.split(","))})
