"""PPO of the multimodal transformer on `language_locomotion`, from scratch.

Command:   python -m experiments.train --config=configs/locomotion_ppo.py --workdir=runs/ant
Hardware:  two CPU cores.
Time and result: not run.
"""

import ml_collections

from configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Brax's ant on spring physics, told in words where to run and how fast."""
    config = reach_ppo.get_config()
    config.env.name = "language_locomotion"
    config.env.options = ml_collections.ConfigDict({"episode_length": 200})
    config.model.auxiliary = (("command", 2),)
    config.model.pointing = None
    config.warm_start.updates = 0
    config.ppo.num_envs = 256
    config.ppo.unroll = 20
    config.ppo.epochs = 4
    config.ppo.minibatches = 10
    config.ppo.learning_rate = 3e-4
    config.ppo.discount = 0.97
    config.ppo.auxiliary_weight = 0.5
    config.ppo.entropy_weight = 1e-3
    config.ppo.initial_std = 0.5
    config.run.updates = 400
    config.run.eval_interval = 50
    config.run.eval_episodes = 64
    config.run.checkpoint_interval = 50
    return config
