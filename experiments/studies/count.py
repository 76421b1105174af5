"""Counting: rewards over the full range after labels of a part of it, against more of those labels.

Command:   python -m experiments.study --study=experiments/studies/count.py
           python -m experiments.train --config=experiments/studies/count.py:grpo --workdir=DIR
Hardware:  two CPU cores.
Time:      0.8 to 1.7 minutes a run (AMD EPYC, beside other work)
Result:    accuracy 0.36 fine-tuned, 0.37 for longer, 0.75 after GRPO, 0.91 with all labels
           (IQM of 5 seeds); dr_grpo, token_ppo and dpo: not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import count_grpo

SEEDS = 5
MAIN = "final/train/accuracy"

# What a variant changes of the baseline, supervised fine-tuning on counts of 1 to 3.
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {},
    # More steps on its own labels, in more time than RL takes.
    "sft_longer": {"sft": {"num_updates": 4500}},
    "grpo": {"stages": ("sft", "grpo")},
    "dr_grpo": {"stages": ("sft", "grpo"), "grpo": {"preset": "dr_grpo"}},
    "token_ppo": {"stages": ("sft", "ppo"), "ppo": {"num_completions": 4}},
    "dpo": {"stages": ("sft", "dpo")},
    # As many labels of all counts, all of them right: what the model can learn.
    "sft_full": {"sft": {"num_updates": 4500, "counts": (0, 6), "label_noise": 0.0}},
    # RL that is shown another prompt's image.
    "grpo_swapped": {"stages": ("sft", "grpo"), "grpo": {"shuffle_images": True}},
}


def get_config(variant: str = "sft") -> ml_collections.ConfigDict:
    """The config of a variant.

    Raises:
      KeyError: there is no such variant.
    """
    return problems.complete(count_grpo.CONFIG, {"stages": ("sft",)}, VARIANTS[variant])
