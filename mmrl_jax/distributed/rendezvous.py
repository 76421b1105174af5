"""A meeting of the processes of a run before JAX connects them, so that an absent one is named.

If a process does not come, `jax.distributed.initialize` aborts the others with a message that does
not name it. The processes therefore meet first, at the address of JAX's coordinator and before it
listens there: each tells process 0 its number, and process 0 answers all of them.
"""

import json
import socket
import sys
import time
from typing import Any

_GREETING = "mmrl_jax"
_MAX_BYTES = 65536
_RETRY_S = 0.2
_TELL_EVERY_S = 20.0


class ProcessesMissing(RuntimeError):
    """Some processes of a run did not start in time, or their arguments contradict each other."""


def meet(address: str, num_processes: int, process_id: int, *, timeout_s: float) -> None:
    """Waits until all processes of a run have called this function.

    Args:
      address: Address of process 0 as HOST:PORT. Nothing may listen at the port yet.
      num_processes: Number of processes.
      process_id: Number of this process, in [0, num_processes).
      timeout_s: Time in seconds after which the processes that have come give up.

    Raises:
      ProcessesMissing: In every process that has come, if some have not come in time, two have the
        same number, or their numbers of processes differ.
    """
    host, _, port = address.rpartition(":")
    if process_id == 0:
        problem = _host(int(port), address, num_processes, timeout_s)
    else:
        problem = _visit((host.strip("[]"), int(port)), num_processes, process_id, timeout_s)
    if problem is not None:
        raise ProcessesMissing(problem)


def _host(port: int, address: str, num_processes: int, timeout_s: float) -> str | None:
    """Waits for the other processes as process 0, and returns what is wrong after telling them."""
    deadline = time.monotonic() + timeout_s
    server = _listen(port, address, deadline)
    connections: list[socket.socket] = []
    missing, problem = {*range(1, num_processes)}, None
    try:
        with server:
            while missing and problem is None:
                left = deadline - time.monotonic()
                server.settimeout(max(0.01, min(left, _TELL_EVERY_S)))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    names = ", ".join(map(str, sorted(missing)))
                    if left > _TELL_EVERY_S:
                        _tell(f"Waiting for process {names} of {num_processes} at {address} ...")
                        continue
                    problem = (
                        f"{num_processes - len(missing)} of {num_processes} processes have started "
                        f"within {timeout_s:.0f} s. Missing: process {names}. Check on the host of "
                        "each missing process that the command runs there with its own "
                        f"--process_id, and that the host can reach {address}."
                    )
                    break
                guest = _read_line(connection)
                if guest is None:  # Another program has tried the port.
                    connection.close()
                    continue
                connections.append(connection)
                problem = _contradiction(guest, num_processes, missing)
                missing.discard(guest["process_id"])
        # The port is free again before any process continues to JAX's coordinator.
        for connection in connections:
            _send_line(connection, {"greeting": _GREETING, "problem": problem})
    finally:
        for connection in connections:
            connection.close()
    return problem


def _listen(port: int, address: str, deadline: float) -> socket.socket:
    """Returns a socket that listens at the port, as soon as an earlier run has released it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    told = False
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            text = (
                f"Process 0 cannot listen at the port of --coordinator_address={address} ({error}"
            )
            if time.monotonic() > deadline:
                raise ProcessesMissing(
                    f"{text}): stop the program that uses it, or choose another port for all "
                    "processes."
                ) from error
            if not told:
                _tell(f"{text}); trying again ...")
                told = True
            time.sleep(_RETRY_S)


def _contradiction(guest: dict[str, Any], num_processes: int, missing: set[int]) -> str | None:
    """Returns what is wrong with the arguments of a process that has come; None if nothing is."""
    number, count = guest["process_id"], guest["num_processes"]
    if count != num_processes:
        return (
            f"Process {number} was started with --num_processes={count}, but process 0 with "
            f"--num_processes={num_processes}: give all processes the same number."
        )
    if number not in missing:
        return (
            f"Two processes were started with --process_id={number}: give each of the "
            f"{num_processes} processes another number, from 0 on."
        )
    return None


def _visit(
    address: tuple[str, int], num_processes: int, process_id: int, timeout_s: float
) -> str | None:
    """Tells process 0 that this process has come, and returns its answer: what is wrong, if any."""
    deadline = time.monotonic() + timeout_s
    greeting = {"greeting": _GREETING, "process_id": process_id, "num_processes": num_processes}
    while True:
        reason: object = "it closed the connection"
        try:
            with socket.create_connection(address, timeout=10 * _RETRY_S) as connection:
                _send_line(connection, greeting)
                # Process 0 may have started later than this process, and then gives up later.
                answer = _read_line(connection, timeout_s=timeout_s + 10)
            if answer is not None:
                return answer["problem"]
        except OSError as error:
            reason = error
        if time.monotonic() > deadline:
            host, port = address
            return (
                f"Process 0 did not answer process {process_id} at --coordinator_address="
                f"{host}:{port} within {timeout_s:.0f} s ({reason}). Check that process 0 has "
                "started, that this is the address of its host, and that the port is open."
            )
        time.sleep(_RETRY_S)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # The other process has ended, which JAX's own connection will notice.


def _read_line(connection: socket.socket, *, timeout_s: float = 5.0) -> dict[str, Any] | None:
    """Returns a message of another process; None if the connection brings none."""
    connection.settimeout(timeout_s)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _MAX_BYTES:
            more = connection.recv(4096)
            if not more:
                return None
            data += more
        message = json.loads(data)
    except (OSError, ValueError):
        return None
    ours = isinstance(message, dict) and message.get("greeting") == _GREETING
    return message if ours else None
