"""What the studies of our PPO against Brax's share: one study an environment, `vs_brax_<name>.py`.

Both get the same environment on spring physics, hyperparameters, hidden layers and steps, and are
evaluated on the same episodes. `gain` is the mean return over that of random actions.
"""

import ml_collections

from configs import mlp_ppo
from experiments import brax_ppo

SEEDS = 5
MAIN = brax_ppo.GAIN
VARIANTS: dict[str, dict] = {"brax": {}, "ours": {}}
RUNNERS = {"brax": brax_ppo.run_brax, "ours": brax_ppo.run_ours}


def base_config(name: str) -> ml_collections.ConfigDict:
    """1.02M steps of the environment, 1000 steps an episode, with Brax's usual hyperparameters."""
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
