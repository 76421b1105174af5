"""The command `mmrl-plan` from a checkout, see `mmrl_jax.commands.plan`.

python -m experiments.plan --config=reach_ppo --topology=v5e-8
"""

from mmrl_jax.commands.plan import run

if __name__ == "__main__":
    run()
