"""Runs of several processes: their start, what they agree on, and their end.

Every process runs the same program, and each holds a part of every global array (JAX's
multi-controller runtime). All processes must therefore start the same compiled programs in the same
order. A decision that depends on one process, such as a signal or an unreadable file, is taken
together: `any_process` and `on_all` exchange it. With one process these functions do nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import faulthandler
import hashlib
import os
import re
import sys
import time
import traceback
from typing import Any, TypeVar

import jax
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
import numpy as np

from mmrl_jax.distributed import rendezvous

# Time in seconds without a sign of life after which a process counts as dead, and JAX ends the
# others.
HEARTBEAT_S = 30
# Time in seconds that a process which ends with an error waits for the others to do so too.
END_TOGETHER_S = 10
# Time in seconds for JAX's own connection, after the processes have met.
_CONNECT_S = 120
# Errors of JAX after the connection to another process was lost: a status with one of these words.
_LOST = re.compile(r"[A-Z_]+: .*(?i:gloo|nccl|connection|heartbeat|coordination)", re.DOTALL)

T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """A call of `on_all` has failed in another process, which prints the reason.

    Attributes:
      transient: Whether the call may be repeated, see `on_all`.
    """

    def __init__(self, message: str, *, transient: bool):
        super().__init__(message)
        self.transient = transient


def initialize(
    *,
    distributed: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: float = 300,
) -> None:
    """Connects this process to the other processes of a run, before JAX touches a device.

    Without arguments, the run has this process only.

    Args:
      distributed: Whether to find the other processes automatically, which is possible on TPU pods
        and in Slurm jobs.
      coordinator_address: Address of process 0 as HOST:PORT, with a free port; with
        `num_processes` and `process_id` instead of `distributed`.
      num_processes: Number of processes.
      process_id: Number of this process, in [0, num_processes).
      timeout_s: Time in seconds within which all processes must start.

    Raises:
      ValueError: If arguments are missing or invalid, or no processes are found automatically.
      ProcessesMissing: If not all processes have started in time, see `rendezvous.meet`.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    devices: Sequence[int] | None = None
    if distributed:
        if len(missing) < len(given):
            raise ValueError(
                "--distributed finds the processes automatically: omit --"
                + " and --".join(name for name in given if name not in missing)
                + ", or give all three without --distributed."
            )
        coordinator_address, num_processes, process_id, devices = _detect(timeout_s)
    elif len(missing) == len(given):
        return
    elif missing:
        raise ValueError(f"--{' and --'.join(missing)} must be given too, see --help.")
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} must be at least 0 and below "
            f"--num_processes={num_processes}."
        )
    if not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(
            f"--coordinator_address={coordinator_address!r} must have the form HOST:PORT."
        )
    if num_processes == 1:
        return
    rendezvous.meet(coordinator_address, num_processes, process_id, timeout_s=timeout_s)
    # JAX's own handler of SIGTERM would replace the end of a process that a signal asks to end;
    # `training.preemption` handles the signal while a stage runs.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        local_device_ids=devices,
        initialization_timeout=_CONNECT_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=_CONNECT_S,
    )


def _detect(timeout_s: float) -> tuple[str, int, int, Sequence[int] | None]:
    """Returns coordinator, number of processes, own number and own devices of a cluster's job."""
    reason = "neither a TPU pod nor a Slurm job is around this process"
    try:
        found: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout_s)
        )
        if None not in found[:3]:
            return found
    except RuntimeError as error:  # For example, the name of the first host cannot be resolved.
        reason = str(error)
    raise ValueError(
        f"--distributed found no other processes: {reason}. Give --coordinator_address=HOST:PORT "
        "--num_processes=N --process_id=I instead."
    )


def is_primary() -> bool:
    """Returns whether this is process 0, which alone writes logs, reports, configs and locks."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Returns whether a flag is set in any process. All processes must call it.

    Args:
      flag: Flag of this process.
    """
    return flag if jax.process_count() == 1 else bool(np.any(gather(np.array(flag))))


def gather(tree: Any) -> Any:
    """Returns host arrays of all processes, stacked along a new first axis [P, ...].

    All processes must call it, with the same structure, shapes and dtypes.

    Args:
      tree: Pytree of numpy arrays.
    """
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(tree)


def from_primary(numbers: Sequence[int]) -> list[int]:
    """Returns the integers of process 0, of which other processes may have an outdated list.

    Args:
      numbers: Integers of this process, in the range of int32.
    """
    if jax.process_count() == 1:
        return list(numbers)
    length = int(np.max(gather(np.array(len(numbers), np.int32))))
    padded = np.full(length + 1, len(numbers), np.int32)
    padded[1 : len(numbers) + 1] = numbers
    first = gather(padded)[0]
    return [int(x) for x in first[1 : first[0] + 1]]


def check_same(values: Mapping[str, str]) -> None:
    """Checks that texts are the same in all processes.

    Args:
      values: Texts by their names, which are the same in all processes.

    Raises:
      ValueError: In all processes, if a text differs.
    """
    digests = [hashlib.blake2b(x.encode(), digest_size=8).digest() for x in values.values()]
    digests = gather(np.array([list(x) for x in digests], np.uint8))
    differ = np.any(digests != digests[:1], axis=-1)  # [P, number of texts]
    if not differ.any():
        return
    names = ", ".join(name for name, x in zip(values, differ.any(0), strict=True) if x)
    processes = ", ".join(map(str, np.flatnonzero(differ.any(1))))
    raise ValueError(
        f"Process {processes} has another {names} than process 0: start all processes with the "
        "same code, versions, flags and files."
    )


def on_all(function: Callable[[], T], *, transient: tuple[type[Exception], ...] = ()) -> T:
    """Calls a function in every process, and raises in all if it raises in one.

    Args:
      function: Function that needs no other process.
      transient: Types of exceptions after which the call may be repeated, in all processes.

    Returns:
      The result in this process.

    Raises:
      OtherProcessFailed: If the function has raised in other processes only, or the call may be
        repeated for the error of this process, but not for that of another one.
      Exception: Any other exception of the function in this process.
    """
    if jax.process_count() == 1:
        return function()
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    fatal = not isinstance(error, transient) or isinstance(error, jax.errors.JaxRuntimeError)
    states = gather(np.array(0 if error is None else 2 if fatal else 1, np.int32))
    if not states.any():
        return result
    failed = ", ".join(map(str, np.flatnonzero(states)))
    if error is None or (states.max() == 2 and not fatal):
        message = f"Process {failed} failed here; the reason is in its own output."
        raise OtherProcessFailed(message, transient=states.max() == 1) from error
    if not fatal and not is_primary():  # Process 0 alone says that the call is repeated, and why.
        print(f"Process {jax.process_index()}: {error}", file=sys.stderr, flush=True)
    raise error


def is_lost(error: BaseException) -> bool:
    """Returns whether an error means that the connection to another process was lost."""
    # Errors of collectives on a CPU are of several types, also ValueError.
    return jax.process_count() > 1 and bool(_LOST.match(str(error)))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Context manager around a command, after which its processes end, in whatever way.

    After an error, a process would wait for the others in order to disconnect, and these would wait
    for it in a compiled program. It therefore prints its error and ends without that; then the
    others lose the connection and end too. At the end of the command, all wait for the files of
    process 0.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    # JAX aborts this process when the heartbeat of another one stops. A dump of all threads would
    # follow on the message that says so.
    faulthandler.disable()
    try:
        yield
        any_process(False)
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            any_process(False)
            return
        try:
            print(_description(error), file=sys.stderr, flush=True)
            sys.stdout.flush()
            _wait_for_others()
            if is_primary():
                time.sleep(1)  # JAX aborts the other processes as soon as process 0 has ended.
        finally:  # Also if the message cannot be written, because the disk is full.
            os._exit(1)


def _description(error: BaseException) -> str:
    """Returns what a process prints that ends with an error."""
    if isinstance(error, SystemExit):
        return str(error.code)
    if is_lost(error):
        return (
            f"error: Process {jax.process_index()} of {jax.process_count()} has lost the "
            "connection to another process, which has ended or whose host is gone: its own output "
            "says why. This process ends too. The same command on all hosts resumes from the last "
            f"checkpoint. ({type(error).__name__}: {error})"
        )
    return "".join(traceback.format_exception(error)).rstrip()


def _wait_for_others() -> None:
    """Waits until all processes have called this function, but END_TOGETHER_S at most."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(Exception):  # JAX raises errors of several types.
        client.wait_at_barrier("mmrl_jax/end", timeout_in_ms=1000 * END_TOGETHER_S)
