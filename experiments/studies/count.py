"""Study of counting: GRPO over the full range after labels of a part of it, or more such labels.

Command:   python -m experiments.study --study=experiments/studies/count.py
           python -m experiments.train --config=experiments/studies/count.py:grpo --workdir=DIR
Hardware:  two CPU cores.
Time:      0.8 to 1.7 minutes per run (AMD EPYC, on a shared machine)
Result:    accuracy 0.36 after fine-tuning, 0.37 after longer fine-tuning, 0.75 after GRPO, 0.91
           with labels of the full range (IQM of 5 seeds); dr_grpo, token_ppo and dpo: not run
"""

from typing import Any

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import count_grpo

SEEDS = 5
MAIN = "final/train/accuracy"

# Changes of each variant to the baseline, which is supervised fine-tuning on counts of 1 to 3.
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {},
    # More steps on the same labels, in more time than RL takes.
    "sft_longer": {"sft": {"num_updates": 4500}},
    "grpo": {"stages": ("sft", "grpo")},
    "dr_grpo": {"stages": ("sft", "grpo"), "grpo": {"preset": "dr_grpo"}},
    "token_ppo": {"stages": ("sft", "ppo"), "ppo": {"num_completions": 4}},
    "dpo": {"stages": ("sft", "dpo")},
    # As many correct labels of all counts, as an upper bound.
    "sft_full": {"sft": {"num_updates": 4500, "counts": (0, 6), "label_noise": 0.0}},
    # RL with the image of another prompt.
    "grpo_swapped": {"stages": ("sft", "grpo"), "grpo": {"shuffle_images": True}},
}


def get_config(variant: str = "sft") -> ml_collections.ConfigDict:
    """Returns the config of a variant.

    Raises:
      KeyError: If the variant is unknown.
    """
    return problems.complete(count_grpo.CONFIG, {"stages": ("sft",)}, VARIANTS[variant])
