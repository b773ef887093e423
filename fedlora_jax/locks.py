"""One process at a time where two would spoil each other's files.

A lock is held on a file by the operating system, which frees it when the process
ends, however it ends. Who holds it is written beside it, for those who find it held.
"""

import contextlib
import os
import shlex
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import filelock


class Held(OSError):
    """Another process is at work there."""


@contextlib.contextmanager
def held(what: Path, lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Lets no other process come here meanwhile.

    Args:
      what: What is locked, for messages.
      lock: The file; its directory is made if it is not there.
      wait: Wait until it is free, instead of raising an error.

    Raises:
      Held: If another process holds it; the message says which.
      OSError: If nothing can be written in the directory.
    """
    check_writable(lock.parent)
    note = lock.with_name(lock.name + ".holder")
    with _acquired(filelock.FileLock(lock), what, note, wait):
        note.write_text(_myself())
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def check_writable(directory: Path) -> None:
    """Makes a directory, if it is not there, and tries to write in it.

    Raises:
      OSError: If that is impossible; the message says where and why.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(0, "it is no directory")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"written")
    except OSError as error:
        raise OSError(f"cannot write in {directory}: {error.strerror or error}") from error


@contextlib.contextmanager
def _acquired(lock: filelock.BaseFileLock, what: Path, note: Path, wait: bool) -> Iterator[None]:
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        if not wait:
            raise Held(f"{what} is in use by {_holder(note)}") from None
        warnings.warn(f"waiting for {what}, in use by {_holder(note)}", stacklevel=5)
        lock.acquire()
    except NotImplementedError:
        warnings.warn(
            f"{what}: its file system has no locks, so start no second process there", stacklevel=5
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _myself() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})"


def _holder(note: Path) -> str:
    try:
        return note.read_text() or "another process"
    except OSError:  # It has just begun, or just ended.
        return "another process"
