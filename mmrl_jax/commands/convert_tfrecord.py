"""Converts a data set of TFDS from TFRecord to array_record, without TensorFlow.

  mmrl-convert-tfrecord --input=bridge/1.0.0 --output=bridge_array_record/1.0.0

Open X-Embodiment is published as TFRecord, which `tfds.data_source` cannot read. The records are
copied as they are, and their checksums are verified. Damaged records are left out and counted. The
same command resumes an interrupted conversion. Training reads both formats.
"""

from absl import flags

from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.data import tfrecord

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError, ImportError):
        quarantine = tfrecord.to_array_record(FLAGS.input, FLAGS.output)
    print(f"{FLAGS.output}: done. {quarantine.summary()}")


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_string("input", None, "Directory with dataset_info.json.", required=True)
    flags.DEFINE_string("output", None, "Directory of the result.", required=True)
    run_command(main)


if __name__ == "__main__":
    run()
