"""Supervised fine-tuning of a small vision-language model that counts: count_grpo's first stage.

Command:   python -m experiments.train --config=count_sft --workdir=runs/count_sft
           with --config.sft.counts='(0, 6)' for labels over the full range
Hardware:  two CPU cores.
Time:      0.8 minutes (AMD EPYC, on a shared machine)
Result:    accuracy 0.36 [0.30, 0.39] over zero to six (IQM of 5 seeds); labels of one to three
           allow at most 3 / 7
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import count_grpo


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of `count_grpo` without GRPO."""
    return problems.complete(count_grpo.CONFIG, {"stages": ("sft",)})
