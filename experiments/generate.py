"""The command `mmrl-generate` from a checkout, see `mmrl_jax.commands.generate`.

python -m experiments.generate --workdir=runs/vqa --image=photo.png --prompt="How many are there?"
"""

from mmrl_jax.commands.generate import run

if __name__ == "__main__":
    run()
