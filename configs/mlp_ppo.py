"""PPO with a plain MLP on any Brax environment, by default inverted_pendulum.

Command:   python -m experiments.train --config=configs/mlp_ppo.py --workdir=runs/pendulum
           python -m experiments.train --config=configs/mlp_ppo.py:reacher --workdir=runs/reacher
Hardware:  two CPU cores.
Time:      1.2 minutes.
Result:    return on inverted_pendulum 1000 of 1000 (seeds 0 to 2). Other environments: not run.
"""

import ml_collections

from configs import reach_ppo


def get_config(name: str = "inverted_pendulum") -> ml_collections.ConfigDict:
    """The config for Brax's environment `name`."""
    config = reach_ppo.get_config()
    config.env.name = f"brax:{name}"
    config.env.height = config.env.width = 0
    config.env.options = ml_collections.ConfigDict(
        {"backend": "positional", "episode_length": 1000}
    )
    config.model = ml_collections.ConfigDict({"kind": "mlp", "lora": config.model.lora})
    config.model.frozen = ml_collections.config_dict.placeholder(str)
    config.warm_start.updates = 0
    config.ppo.num_envs = 256
    config.ppo.unroll = 10
    config.ppo.minibatches = 16
    config.ppo.epochs = 4
    config.ppo.learning_rate = 1e-3
    # No clipping, as in Brax: values of 100 give gradients whose clip would leave nothing of the
    # policy's.
    config.ppo.max_grad_norm = 1e9
    config.ppo.discount = 0.99
    config.ppo.entropy_weight = 1e-3
    config.ppo.initial_std = 0.5
    config.run.updates = 80
    config.run.updates_per_dispatch = 5
    config.run.eval_episodes = 64
    config.run.eval_interval = 20
    return config
