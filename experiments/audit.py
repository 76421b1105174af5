"""The command `mmrl-audit` from a checkout, see `mmrl_jax.commands.audit`.

python -m experiments.audit --data=demos/reach --output=audit
"""

from mmrl_jax.commands.audit import run

if __name__ == "__main__":
    run()
