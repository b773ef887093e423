"""Several hosts that run the same program on one mesh: who writes, and what all wait for.

All of them see one file system. With one host every function here does nothing.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(coordinator: str, count: int, index: int) -> None:
    """Waits for all hosts to start; to be called before anything else of JAX.

    Args:
      coordinator: `address:port` of the first host, or `auto`: the cluster's own settings, of TPU
        pods, Slurm, Open MPI and others that JAX knows, say all three.
      count: How many hosts there are.
      index: Which of them this is, from 0.

    Raises:
      ValueError: If there is no such host or address, or no cluster that JAX knows.
    """
    if coordinator == "auto":
        _join_cluster()
    else:
        address, _, port = coordinator.rpartition(":")
        if not address or not port.isdecimal():
            raise ValueError(f"--coordinator must be address:port, or auto; got {coordinator!r}")
        if index >= count:
            raise ValueError(f"--host must be less than --num_hosts={count}, got {index}")
        # If one does not come, JAX ends this process by a signal, and does not say why.
        print(
            f"host {index} of {count}: waiting at {coordinator} for all of them, five minutes at "
            "most; if it is aborted, one did not come or has another --num_hosts",
            file=sys.stderr,
            flush=True,
        )
        jax.distributed.initialize(coordinator, count, index)
    # The service that has just been started catches the signal, and goes on.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A first exchange on CPUs fails if another host comes half a minute later; others may wait.
    wait("joined")


def _join_cluster() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--coordinator=auto: JAX knows no cluster here ({error}); give --coordinator="
            "address:port, --num_hosts and --host"
        ) from error


def are_several() -> bool:
    """Whether this is one of several hosts; false before `join`."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the host that writes what is of all."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Returns when every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Lets the first host do it alone, and the others when it is done, or has failed."""
    if not is_first():
        wait(what)
    try:
        yield
    finally:
        if is_first():
            wait(what)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Goes on if nothing was raised on any host; all hosts must come here.

    Raises:
      ValueError: If another host cannot go on. Where something was raised, that is.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if any_of_all(failure is not None):
        raise failure or ValueError("another host cannot go on; its own message says why")


def check_same(numbers: Mapping[str, int]) -> None:
    """Compares numbers that every host must have alike, below 2^32; all hosts must come here.

    Raises:
      ValueError: On all hosts, if a number differs between any two; by its name.
    """
    if jax.process_count() == 1:
        return
    everyone = multihost_utils.process_allgather(np.array([*numbers.values()], np.uint32))
    differing = (everyone != everyone[0]).any(axis=0)
    names = [name for name, differs in zip(numbers, differing, strict=True) if differs]
    if names:
        raise ValueError(
            f"hosts differ in {' and '.join(names)}: give all the same configuration, and data and "
            "backbone on a disk that they share"
        )


def any_of_all(value: bool) -> bool:
    """Whether it is so on any host; all must ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def of_first(value: float) -> float:
    """The number that the first host has, so that all go the same way; all must ask."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def least_of_all(value: float) -> float:
    """The least of the numbers that hosts have, so that what fits one fits all; all must ask."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float32(value)).min())
