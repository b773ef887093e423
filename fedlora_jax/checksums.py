"""Checksums of what is written, so that what comes back is what was written or an error.

A directory keeps those of its files in `checksums.json`. One without that file, of an older
version, is taken as it is.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "checksums.json"
# Orbax's own notes, which it writes when all else is there.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Damaged(ValueError):
    """What is on disk is not what was written there."""


def of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: Path) -> None:
    """Writes the checksums of all files in a directory, and has all of it on the disk then."""
    (directory / CHECKSUMS).write_text(json.dumps(_of_files(directory), indent=1) + "\n")
    # Together, for one commit of the file system's journal does for many.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(force, [*directory.rglob("*"), directory]))


def force(path: Path) -> None:
    """Waits until a file, or what a directory lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(directory: Path) -> None:
    """Compares the files of a directory with their checksums, if it has these.

    Raises:
      Damaged: If a file is missing, is new, or is not what was written.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return
    try:
        expected = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    found = _of_files(directory)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{directory / name} is missing")
        if expected.get(name) != found[name]:
            raise Damaged(f"{directory / name} is damaged: it is not what was written")


def _of_files(directory: Path) -> dict[str, str]:
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    return {
        name: of_file(path)
        for name, path in sorted(paths.items())
        if path.is_file() and name not in (CHECKSUMS, *_LATER)
    }
