"""PPO with a history of frames and discrete actions on `recall`, which needs a memory of four.

Command:   python -m experiments.train --config=configs/recall_ppo.py --workdir=runs/recall
Hardware:  two CPU cores.
Result:    success above 0.95 with four frames, about 0.25 with one (tests/test_learning.py).
"""

import ml_collections

from configs import reach_ppo


def get_config() -> ml_collections.ConfigDict:
    """Four frames; with `--config.env.history=1` no policy does better than chance."""
    config = reach_ppo.get_config()
    config.env.name = "recall"
    config.env.height = config.env.width = 16
    config.env.history = 4
    config.env.options = ml_collections.ConfigDict()
    config.model.width = 32
    config.model.patch_hidden = 32
    config.model.auxiliary = ()
    config.model.pointing = ml_collections.config_dict.placeholder(str)
    config.warm_start.updates = 0
    config.ppo.num_envs = 256
    config.ppo.unroll = 10
    config.ppo.epochs = 2
    config.ppo.minibatches = 4
    config.ppo.learning_rate = 1e-3
    config.ppo.schedule = "constant"
    config.ppo.discount = 1.0
    config.ppo.entropy_weight = 0.01
    config.run.updates = 60
    config.run.updates_per_dispatch = 5
    config.run.eval_interval = 20
    config.run.eval_episodes = 512
    config.run.checkpoint_interval = 20
    return config
