"""The command `mmrl-convert-hf` from a checkout, see `mmrl_jax.commands.convert_hf`.

python -m experiments.convert_hf --to=checkpoint --source=SmolVLM --output=ours
"""

from mmrl_jax.commands.convert_hf import run

if __name__ == "__main__":
    run()
