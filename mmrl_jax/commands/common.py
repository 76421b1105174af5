"""What the commands share: flags and help, clean errors, which errors end a run without a stack."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import sys

from absl import app, flags, logging
import jax

from mmrl_jax import envs
from mmrl_jax.tasks import rewards
from mmrl_jax.training import checkpoint, loop

# What can end a run without a fault of the code: the message says all, a stack adds nothing.
FAILURES = (
    FloatingPointError,
    checkpoint.CheckpointDamaged,
    checkpoint.CheckpointMismatch,
    checkpoint.CheckpointWriteError,
    envs.InvalidEnvironment,
    loop.HostFailed,
    rewards.NoRewards,
)


@contextlib.contextmanager
def clean_exit(*errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into 'error: <message>' on standard error and exit code 1."""
    try:
        yield
    except errors as error:
        sys.exit(f"error: {error}")


def keep_compiled_programs() -> None:
    """Lets compiled programs outlive the process, unless the environment says where or that not.

    A second start of a run takes them from there. They are kept in JAX_COMPILATION_CACHE_DIR, or in
    ~/.cache/mmrl_jax.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = pathlib.Path.home() / ".cache" / "mmrl_jax"
        jax.config.update("jax_compilation_cache_dir", str(directory))


def refuse_arguments(argv: list[str]) -> None:
    """Ends the command with a message where there are arguments that are no flags."""
    if len(argv) > 1:
        sys.exit(f"error: Unknown arguments {argv[1:]}; flags begin with '--'.")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs a command.

    Args:
      main: Called with what remains of the command line. `--help` shows the documentation and the
        flags of its module: the script that is executed only calls it.
    """
    module = sys.modules[main.__module__]
    sys.modules["__main__"].__doc__ = module.__doc__
    for flag in flags.FLAGS.get_flags_for_module(module.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    app.run(main)
