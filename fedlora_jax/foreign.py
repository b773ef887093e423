"""Files of others: whatever is wrong with one is an error that names it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Makes a `ValueError` that names the file of all that goes wrong within.

    Libraries trust what they read: a damaged file gives errors of any kind.

    Args:
      path: The file.
      what: What it should be, `"a safetensors file"`.

    Raises:
      ValueError: As said.
      OSError: As it is, if it names a file.
      ImportError: As it is.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        named = isinstance(error, ValueError | FileNotFoundError) and str(path) in str(error)
        if named or (isinstance(error, OSError) and error.filename):
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not {what}, or is damaged: {reason}") from error


def read_json(
    path: str | os.PathLike[str],
    what: str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """What a JSON file holds.

    Args:
      path: The file, in UTF-8.
      what: What it should be.
      pairs: Makes an object of its names and values.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not JSON.
    """
    with reading(path, f"JSON of {what}"):
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=pairs)


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """As `read_json`, of a file that holds one object.

    Raises:
      FileNotFoundError: As `read_json`.
      ValueError: As `read_json`; or if it holds something else.
    """
    found = read_json(path, what)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not {what}: expected an object, found {str(found)[:40]!r}")
    return found
