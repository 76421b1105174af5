"""Our PPO against Brax's, on one of Brax's environments.

Both get the same environment on spring physics, hyperparameters, hidden layers and steps, and are
evaluated on the same episodes. `gain` is the mean return over that of random actions.

Command:   python -m experiments.study --study=configs/studies/vs_brax.py:reacher
           and with inverted_pendulum, hopper, halfcheetah
Hardware:  two CPU cores.
Time:      not run
Result:    not run
"""

import ml_collections

from configs import mlp_ppo
from experiments import brax_ppo

SEEDS = 5
MAIN = brax_ppo.GAIN
VARIANTS: dict[str, dict] = {"brax": {}, "ours": {}}
RUNNERS = {"brax": brax_ppo.run_brax, "ours": brax_ppo.run_ours}


def get_config(name: str, _: str = "ours") -> ml_collections.ConfigDict:
    """The config of both variants: 1.02M steps of the environment `name`, 1000 an episode."""
    config = mlp_ppo.get_config(name)
    config.env.options.backend = "spring"
    config.ppo.num_envs = 1024
    config.ppo.unroll = 10
    config.ppo.minibatches = 16
    config.ppo.epochs = 4
    config.ppo.learning_rate = 3e-4
    config.ppo.schedule = "constant"
    config.ppo.discount = 0.97
    config.ppo.entropy_weight = 1e-2
    # Of Brax's networks at first: softplus(0).
    config.ppo.initial_std = 0.69
    config.run.updates = config.run.eval_interval = 100
    config.run.eval_episodes = 128
    return config
