"""The command `mmrl-evaluate` from a checkout, see `mmrl_jax.commands.evaluate`.

python -m experiments.evaluate --workdir=runs/reach --split=all
"""

from mmrl_jax.commands.evaluate import run

if __name__ == "__main__":
    run()
