"""Study that compares our PPO with Brax's PPO on one of Brax's environments.

Both use the same environment on spring physics, hyperparameters, hidden layers and number of steps,
and are evaluated on the same episodes. `gain` is the mean return minus that of random actions.

Command:   python -m experiments.study --study=experiments/studies/vs_brax.py:reacher
           or :inverted_pendulum, :hopper, :halfcheetah
Hardware:  two CPU cores.
Time:      1 to 5 minutes per run on one core.
Result:    ratio of our gain to Brax's 1.01 [0.99, 1.97] on inverted_pendulum; with generalized
           advantages 0.90 [0.46, 1.80] on inverted_pendulum, 1.07 [1.03, 1.21] on reacher, 1.08
           [0.76, 1.28] on hopper and 1.13 [0.96, 1.51] on halfcheetah.
"""

import ml_collections

from experiments import brax_ppo
from mmrl_jax import problems
from mmrl_jax.configs import mlp_ppo

SEEDS = 5
MAIN = brax_ppo.GAIN
# Brax's advantages differ from generalized advantages, see `ppo.advantage`. The variant `ours` uses
# Brax's, and `gae` uses generalized advantages.
VARIANTS: dict[str, dict] = {"brax": {}, "ours": {}, "gae": {"ppo": {"advantage": "gae"}}}
RUNNERS = {"brax": brax_ppo.run_brax, "ours": brax_ppo.run_ours, "gae": brax_ppo.run_ours}


# Sizes at which Brax's PPO converges: on seeds 100 to 102, inverted_pendulum has a gain of 949 to
# 977 after 2.05M steps (90 to 980 after 0.51M steps with batches of 2560 steps); on seed 100,
# reacher has a return of -195, compared with -840 for random actions. The others use 1.02M steps.
SIZES = {
    "inverted_pendulum": {
        "num_updates": 100,
        "num_envs": 1024,
        "unroll_length": 20,
        "num_minibatches": 4,
        "entropy_coef": 1e-2,
    },
    "reacher": {"num_updates": 400, "discount": 0.95},
    "hopper": {"num_updates": 400, "discount": 0.97},
    "halfcheetah": {"num_updates": 400, "discount": 0.95},
}


def get_config(name: str, variant: str = "ours") -> ml_collections.ConfigDict:
    """Returns the config of a variant on the Brax environment `name`, with 1000-step episodes."""
    changes = {
        "env": {"name": f"brax:{name}", "options": {"backend": "spring"}},
        "ppo": {
            "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
            "advantage": "return",
            # Brax's networks have the initial standard deviation softplus(0).
            "initial_std": 0.69,
            "eval_interval": SIZES[name]["num_updates"],
        }
        | SIZES[name],
        "run": {"eval_episodes": 128},
    }
    return problems.complete(mlp_ppo.CONFIG, changes, VARIANTS[variant])
