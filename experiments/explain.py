"""The command `mmrl-explain` from a checkout, see `mmrl_jax.commands.explain`.

python -m experiments.explain --workdir=runs/reach
"""

from mmrl_jax.commands.explain import run

if __name__ == "__main__":
    run()
