"""Flags, help and error handling of the commands."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
import pathlib
import signal
import sys

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from mmrl_jax import envs, problems
from mmrl_jax.config import loading, schema
from mmrl_jax.data import records
from mmrl_jax.distributed import multihost, rendezvous
from mmrl_jax.problems import renamed
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
    multihost.OtherProcessFailed,
    rewards.NoRewards,
)
# Exit code of a command that a signal interrupted, so that `train && evaluate` does not evaluate a
# run that is not finished. A shell gives it to a process that SIGTERM ended.
EXIT_INTERRUPTED = 128 + signal.SIGTERM


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


def define_config(doc: str | None, *, required: bool = False) -> bool:
    """Defines the flag --config, whose value is the complete config of the command line.

    An error in its overrides ends the process with a message.

    Args:
      doc: Text that --help prints before the keys of a config.
      required: Whether the command line must have the flag.

    Returns:
      Whether the command line asks for --help with a config, which is then printed.
    """
    with clean_exit(ValueError):
        config = loading.flag_config(sys.argv)
        if config is not None:
            # What decides which keys a config has must be known before it is completed.
            deciding = loading.override_values(sys.argv, problems.DECIDING)
            config = problems.complete(config, deciding)
            if loading.wants_help(sys.argv):
                print(doc)
                print("The keys of this config, each set by --config.<key>=<value>:\n")
                print(schema.describe(problems.options(config), config, problems.remarks(config)))
                return True
            loading.validate_overrides(
                sys.argv,
                problems.with_env_options(config),
                renamed=renamed.KEYS,
                elsewhere=functools.partial(problems.elsewhere, config),
            )
            overridden = loading.overridden(sys.argv)
            config = problems.with_env_options(config, overridden)
            sys.argv = loading.without_flag(sys.argv)
            config_flags.DEFINE_config_dict("config", config, "Config of the run.")
            return False
    config_flags.DEFINE_config_file("config", None, "Name or path of the config.")
    if required:
        flags.mark_flag_as_required("config")
    return False


def define_process_flags() -> None:
    """Defines the flags of a command that may run in several processes, see `connected`."""
    flags.DEFINE_bool(
        "distributed", False, "Find the other processes of a TPU pod or a Slurm job automatically."
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, with a free port, for processes that are started by hand.",
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes, started by hand.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0 on.")
    flags.DEFINE_integer(
        "initialization_timeout",
        300,
        "Time in seconds within which all processes must start.",
        lower_bound=1,
    )


def connected(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int | None]:
    """Returns a command that first connects the processes of its run, and ends them together.

    Args:
      main: Command that may run in several processes, with the flags of `define_process_flags`. No
        device may be used before it is called.
    """

    def run(argv: list[str]) -> int | None:
        with clean_exit(ValueError, rendezvous.ProcessesMissing):
            multihost.initialize(
                distributed=flags.FLAGS.distributed,
                coordinator_address=flags.FLAGS.coordinator_address,
                num_processes=flags.FLAGS.num_processes,
                process_id=flags.FLAGS.process_id,
                timeout_s=flags.FLAGS.initialization_timeout,
            )
        with multihost.ending_together():
            return main(argv)

    return run


def refuse_arguments(argv: list[str]) -> None:
    """Exits with a message if the command line has positional arguments."""
    if len(argv) > 1:
        sys.exit(f"error: Unknown arguments {argv[1:]}; flags begin with '--'.")


def run_command(main: Callable[[list[str]], int | None], *, processes: bool = False) -> None:
    """Parses the flags and runs a command.

    Args:
      main: Function that is called with the remaining command line and returns the exit code, None
        for 0. `--help` shows the docstring and the flags of its module rather than those of the
        executed script.
      processes: Whether the command may run in several processes, see `connected`.
    """
    module = sys.modules[main.__module__]
    sys.modules["__main__"].__doc__ = module.__doc__
    modules = [module.__name__]
    if processes:
        define_process_flags()
        modules.append(__name__)
    for name in modules:
        for flag in flags.FLAGS.get_flags_for_module(name):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    if loading.wants_help(sys.argv):
        app.define_help_flags()
        # By itself absl exits with 1, which scripts and CI take for a failure.
        whole = "--helpfull" in sys.argv
        app.usage(shorthelp=not whole, writeto_stdout=True, exitcode=0)
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    try:
        app.run(connected(main) if processes else main)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # The exit code of a shell for a command that Ctrl-C ended.
