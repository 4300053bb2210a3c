"""Several processes as one program: the call that must come before any other use of jax, by these flags.

    --distributed                                            the cluster says the rest (TPU pod, SLURM, Open MPI)
    --coordinator HOST:PORT --num-processes N --process-id I    started by hand; process 0 listens on HOST:PORT

Every process runs the same command (but for its process_id) and sees the same files.
"""

import socket
import time
from collections.abc import Callable
from typing import Any

from lpl_jax import stopping
from lpl_jax.errors import InputError
from lpl_jax.io.faults import explain

# A process that fails waits so long for the others, which may wait for it: then the job ends.
SHUTDOWN_SECONDS = 60
MESSAGE_BYTES = 1024


def initialize(
    *,
    auto: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Join the other processes, if there are any: without arguments nothing happens. Before any other use of jax.

    Args:
      auto: take everything from the cluster's environment.
      coordinator, num_processes, process_id: or all three by hand.
      timeout: seconds in which all processes must have started.

    Raises:
      InputError: arguments that contradict each other, no cluster, or processes that cannot be reached.
    """
    by_hand = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = [name for name, value in by_hand.items() if value is not None]
    if not auto and not given:
        return
    if auto and given:
        raise InputError(
            f"--distributed takes everything from the cluster, and {_flag(given[0])} is given: use one of them"
        )
    if timeout < 1:
        raise InputError(f"--connect-timeout={timeout}: must be 1 or more seconds")
    if given:
        _check(by_hand)
        if process_id and coordinator:
            _reach(coordinator, timeout)
    import jax  # here, so that flags are checked without it

    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(
            f"--distributed: no TPU pod, SLURM or Open MPI job found ({error}); "
            "give --coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    except RuntimeError as error:
        address = coordinator or "the coordinator of the cluster"
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(f"the processes did not come together at {address} within {timeout} s: {reason}") from error
    stopping.share_with_jax()


def _check(given: dict[str, Any]) -> None:
    """All of them, and possible together."""
    if missing := [name for name, value in given.items() if value is None]:
        present = next(name for name, value in given.items() if value is not None)
        raise InputError(f"{_flag(present)} also needs {' and '.join(map(_flag, missing))}")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={given['coordinator']}: give HOST:PORT, such as 10.0.0.1:8476")
    count, index = given["num_processes"], given["process_id"]
    if count < 1 or not 0 <= index < count:
        raise InputError(f"--process-id={index} with --num-processes={count}: possible are 0 to N - 1")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _reach(coordinator: str, timeout: float) -> None:
    """Waits until process 0 listens."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or error
                raise InputError(
                    f"--coordinator={coordinator} cannot be reached within {timeout} s ({reason}): "
                    "is process 0 running there, and its port open?"
                ) from None
            time.sleep(0.2)


def on_first(function: Callable[[], None]) -> None:
    """function() in process 0 alone; all processes wait for it, and all raise its InputError.

    For what only one process can check, such as a lock: the others would wait for ever for one that has given up.
    """
    import jax

    on_all(function if jax.process_index() == 0 else lambda: None)


def on_all(function: Callable[[], None]) -> None:
    """function() in every process; where it raises an InputError or OSError in one of them, all raise one."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        function()
        return
    message, failure = b"", None
    try:
        function()
    except (InputError, OSError) as error:
        failure = error
        message = explain(error)[0].encode()[:MESSAGE_BYTES]
    padded = np.frombuffer(message.ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(padded)]
    if text := next(filter(None, texts), ""):
        raise failure or InputError(text)


def wait_for_all(name: str) -> None:
    """Returns when every process has called it: for processes that end at different times. Alone, at once."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
