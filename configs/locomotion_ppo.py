"""PPO of the multimodal transformer on `language_locomotion`, from scratch.

Command:   python -m experiments.train --config=configs/locomotion_ppo.py --workdir=runs/ant
Hardware:  two CPU cores.
Result:    twenty updates beat random actions (tests/test_learning.py); full length: not run.
"""

import ml_collections

from configs import pixels_ppo


def get_config() -> ml_collections.ConfigDict:
    """Brax's ant on spring physics, told in words where to run and how fast."""
    config = pixels_ppo.get_config("language_locomotion")
    config.env.options.episode_length = 200
    config.model.auxiliary = (("command", 2),)
    config.ppo.auxiliary_weight = 0.5
    config.ppo.entropy_weight = 1e-3
    config.run.updates = 400
    config.run.eval_interval = 50
    config.run.checkpoint_interval = 50
    return config
