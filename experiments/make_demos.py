"""The command `mmrl-make-demos` from a checkout, see `mmrl_jax.commands.make_demos`.

python -m experiments.make_demos --config=reach_ppo --policy=expert --output=demos/reach
"""

from mmrl_jax.commands.make_demos import run

if __name__ == "__main__":
    run()
