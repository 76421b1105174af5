"""The command `mmrl-train` from a checkout, see `mmrl_jax.commands.train`.

python -m experiments.train --config=reach_ppo --workdir=runs/reach
"""

from mmrl_jax.commands.train import run

if __name__ == "__main__":
    run()
