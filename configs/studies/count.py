"""Counting: rewards over the full range after labels of a part of it, against more of those labels.

Command:   python -m experiments.study --study=configs/studies/count.py
           python -m experiments.train --config=configs/studies/count.py:grpo --workdir=DIR
Hardware:  two CPU cores.
Time:      0.8 to 1.7 minutes a run (AMD EPYC, beside other work)
Result:    accuracy 0.36 fine-tuned, 0.37 for longer, 0.75 after GRPO, 0.91 with all labels
           (IQM of 5 seeds); dr_grpo, token_ppo and dpo: not run
"""

from typing import Any

import ml_collections

from configs import count_grpo

SEEDS = 5
MAIN = "final/train/accuracy"

# What a variant changes of the baseline, supervised fine-tuning on counts of 1 to 3.
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {},
    # More steps on its own labels, in more time than RL takes.
    "sft_longer": {"sft.updates": 4500},
    "grpo": {"algorithm": "grpo"},
    "dr_grpo": {"algorithm": "grpo", "grpo.preset": "dr_grpo"},
    "token_ppo": {"algorithm": "token_ppo", "rl.group": 4},
    "dpo": {"algorithm": "dpo"},
    # As many labels of all counts, all of them right: what the model can learn.
    "sft_full": {"sft.updates": 4500, "sft.counts": (0, 6), "sft.noise": 0.0},
    # RL that is shown another question's picture.
    "grpo_swapped": {"algorithm": "grpo", "rl.swapped": True},
}


def get_config(variant: str = "sft") -> ml_collections.ConfigDict:
    """The config of a variant.

    Raises:
      KeyError: there is no such variant.
    """
    config = count_grpo.get_config()
    config.algorithm = "sft"
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
