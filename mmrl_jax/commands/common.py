"""Flags, help and error handling of the commands."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import sys

from absl import app, flags, logging
import jax

from mmrl_jax import envs
from mmrl_jax.data import records
from mmrl_jax.tasks import rewards
from mmrl_jax.training import checkpoint, loop

# Errors that end a run although the code is correct, and whose message needs no traceback.
FAILURES = (
    FloatingPointError,
    checkpoint.CheckpointDamaged,
    checkpoint.CheckpointMismatch,
    checkpoint.CheckpointWriteError,
    records.InvalidData,
    envs.InvalidEnvironment,
    loop.HostFailed,
    rewards.NoRewards,
)


@contextlib.contextmanager
def clean_exit(*errors: type[Exception]) -> Iterator[None]:
    """Turns the given errors into 'error: <message>' on standard error and exit code 1."""
    try:
        yield
    except errors as error:
        sys.exit(f"error: {error}")


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, so that a resumed run does not compile again.

    The cache is in ~/.cache/mmrl_jax, unless JAX_COMPILATION_CACHE_DIR is set.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = pathlib.Path.home() / ".cache" / "mmrl_jax"
        jax.config.update("jax_compilation_cache_dir", str(directory))


def refuse_arguments(argv: list[str]) -> None:
    """Exits with a message if the command line has positional arguments."""
    if len(argv) > 1:
        sys.exit(f"error: Unknown arguments {argv[1:]}; flags begin with '--'.")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs a command.

    Args:
      main: Function that is called with the remaining command line. `--help` shows the docstring
        and the flags of its module rather than those of the executed script.
    """
    module = sys.modules[main.__module__]
    sys.modules["__main__"].__doc__ = module.__doc__
    for flag in flags.FLAGS.get_flags_for_module(module.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    app.run(main)
