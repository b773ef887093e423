"""Partitions from a JSON file, and what a run's own file is checked by."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_jax.data.partition._common import Parts
from fedlora_jax.foreign import read_json

FORMAT = 1

_SHAPES = (
    'expected a list with a list of positions for each client, {"clients": {"name": [...], ...}}, '
    "or a partition.json that a run has written"
)


def file(
    num_examples: int,
    path: str | os.PathLike[str],
    labels: np.ndarray | None = None,
    domains: np.ndarray | None = None,
    clients: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
) -> Parts:
    """Reads any other partition from a JSON file.

    That is `[[0, 5, 7], [1, 2]]`, a list of positions for each client;
    `{"clients": {"name": [0, 5, 7], ...}}`, with clients numbered in the order of the file; or a
    `partition.json` that a run has written, which must be of the same data.

    Args:
      num_examples: M.
      path: The file.
      labels: Integers or numbers `[M]` of the data, if there are any, to tell other data by.
      domains: Integers `[M]`, likewise.
      clients: Integers `[M]`, likewise.
      tokens: Integers `[M, T]`, likewise.

    Returns:
      int32 arrays of positions in `0 .. M - 1`, in the order of the file, each at most once.
      Positions that the file does not name are left out.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not JSON or of another shape, a position is out of range or there twice,
        a client is empty, or the partition is of other data. It names file and client.
    """
    path = Path(path).expanduser()
    content = load(path)
    if isinstance(content, dict) and "parts" in content:
        _check_written(content, path)
        theirs = content["data"]
        mine = digest(num_examples, labels, domains, clients, tokens)
        if theirs["digest"] != mine:
            raise ValueError(
                f"{path} is a partition of other data: of {theirs['num_examples']} examples of "
                f"{theirs['name']} with the digest {str(theirs['digest'])[:12]}, and there are "
                f"{num_examples} with the digest {mine[:12]} here. Write it anew for these"
            )
    return parts_of(content, path, num_examples)


def digest(
    num_examples: int,
    labels: np.ndarray | None = None,
    domains: np.ndarray | None = None,
    clients: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
) -> str:
    """A SHA-256 that changes with all of the data that partitioners look at, and with its text.

    The same on every machine, whatever the width of integers.

    Args:
      num_examples: M.
      labels: Integers or other numbers `[M]`, if there are any.
      domains: Integers `[M]`, likewise.
      clients: Integers `[M]`, likewise.
      tokens: Integers `[M, T]`, likewise.
    """
    found = hashlib.sha256(f"{num_examples} examples".encode())
    given = {"labels": labels, "domains": domains, "clients": clients, "tokens": tokens}
    for name, values in given.items():
        if values is not None:
            kind = "<f8" if np.asarray(values).dtype.kind == "f" else "<i8"
            found.update(f" {name} {kind} ".encode())
            found.update(np.asarray(values).astype(kind).tobytes())
    return found.hexdigest()


def digest_of_parts(parts: Iterable[np.ndarray]) -> str:
    """The SHA-256 of parts, written as JSON without spaces."""
    text = json.dumps([part.tolist() for part in parts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not JSON, or gives a name twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no partition file {path}")
    return read_json(path, "a partition", _distinct)


def parts_of(content: Any, path: Path, num_examples: int) -> Parts:
    """The parts in what `load` has read.

    Args:
      content: In one of the shapes that `file` names.
      path: Where it is from, for errors.
      num_examples: M.

    Raises:
      ValueError: As `file`, but for other data.
    """
    if isinstance(content, dict) and "parts" in content:
        _check_written(content, path)
        content = content["parts"]
    if isinstance(content, dict) and isinstance(content.get("clients"), dict):
        names = [f"client {name!r}" for name in content["clients"]]
        listed = list(content["clients"].values())
    elif isinstance(content, list):
        names, listed = [f"client {number}" for number in range(len(content))], content
    else:
        raise ValueError(f"{path}: {_SHAPES}")
    if not listed:
        raise ValueError(f"{path}: there is no client")
    owner = np.full(num_examples, -1)
    parts = []
    for number, positions in enumerate(listed):
        part = _part(positions, f"{path}: {names[number]}", num_examples)
        if len(shared := part[owner[part] >= 0]):
            other = names[owner[shared[0]]]
            raise ValueError(f"{path}: {names[number]} has example {shared[0]}, as has {other}")
        owner[part] = number
        parts.append(part)
    return parts


def _part(positions: Any, where: str, num_examples: int) -> np.ndarray:
    if not isinstance(positions, list):
        raise ValueError(f"{where}: expected a list of positions, not {positions!r}")
    if not positions:
        raise ValueError(f"{where} is empty; every client needs at least one example")
    for position in positions:
        if type(position) is not int:
            raise ValueError(f"{where}: a position is a whole number, not {position!r}")
        if not 0 <= position < num_examples:
            raise ValueError(
                f"{where}: position {position} is out of range, the {num_examples} examples are 0 "
                f"to {num_examples - 1}"
            )
    values, counts = np.unique(positions, return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"{where} has example {values[counts.argmax()]} twice")
    return np.array(positions, np.int32)


def _check_written(content: dict[str, Any], path: Path) -> None:
    """Checks that a run's own file is whole."""
    missing = {"format", "data", "sha256", "parts"} - content.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: {_SHAPES}")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} is in format {content['format']}, and this version reads format {FORMAT}"
        )
    wanted = {"name", "num_examples", "digest"}
    if not isinstance(content["data"], dict) or wanted - content["data"].keys():
        raise ValueError(f"{path}: data must say {', '.join(sorted(wanted))}: {_SHAPES}")
    text = json.dumps(content["parts"], separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != content["sha256"]:
        raise ValueError(
            f"{path} was changed after it was written: its parts do not have its sha256. For parts "
            "of your own, write a file with a list of positions for each client"
        )


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found
