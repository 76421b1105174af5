"""The command `mmrl-convert-tfrecord` from a checkout, see `mmrl_jax.commands.convert_tfrecord`.

python -m experiments.convert_tfrecord --input=bridge/1.0.0 --output=bridge_array_record/1.0.0
"""

from mmrl_jax.commands.convert_tfrecord import run

if __name__ == "__main__":
    run()
