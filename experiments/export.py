"""The command `mmrl-export` from a checkout, see `mmrl_jax.commands.export`.

python -m experiments.export --workdir=runs/vlm --output=tuned
"""

from mmrl_jax.commands.export import run

if __name__ == "__main__":
    run()
