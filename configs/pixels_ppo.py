"""PPO of the multimodal transformer on any Brax environment, given pixels and an instruction.

Command:   python -m experiments.train --config=configs/pixels_ppo.py --workdir=runs/pendulum
           python -m experiments.train --config=configs/pixels_ppo.py:brax:reacher \
               --workdir=runs/reacher_pixels
Hardware:  two CPU cores.
Result:    twenty updates beat random actions (tests/test_learning.py); full length: not run.
"""

import ml_collections

from configs import reach_ppo


def get_config(name: str = "brax:inverted_pendulum") -> ml_collections.ConfigDict:
    """The config for `name`: 'brax:<name>', or 'playground:<name>' if that package is installed."""
    config = reach_ppo.get_config()
    config.env.name = name
    config.env.options = ml_collections.ConfigDict({"episode_length": 1000})
    config.model.auxiliary = ()
    config.model.pointing = ml_collections.config_dict.placeholder(str)
    config.warm_start.updates = 0
    config.ppo.num_envs = 256
    config.ppo.unroll = 20
    config.ppo.epochs = 4
    config.ppo.minibatches = 10
    config.ppo.learning_rate = 3e-4
    config.ppo.discount = 0.97
    # Returns of 30 and more: at full weight and clipped to 1, the value's gradient would leave
    # little of the policy's.
    config.ppo.value_weight = 0.02
    config.ppo.max_grad_norm = 10.0
    config.ppo.entropy_weight = 1e-2
    config.ppo.initial_std = 0.5
    config.run.updates = 60
    config.run.eval_interval = 30
    config.run.eval_episodes = 32
    config.run.checkpoint_interval = 30
    return config
