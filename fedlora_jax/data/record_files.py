"""Records of a local file: a JSON object a line, an array of them, or a table with named columns.

What a file is its name says: `.csv` and `.tsv` are tables, `.json` an array of objects or else a
JSON object a line, as is any other file. All are in UTF-8.
"""

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlora_jax.data.bad_records import read_each
from fedlora_jax.foreign import reading

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Of characters, for `csv`, which takes 128 KiB otherwise: whole documents are longer.
_LONGEST_FIELD = 2**31 - 1


class Record(NamedTuple):
    """A record of a file: its file and line or number, and its fields."""

    name: str
    fields: dict[str, Any]


def read(
    path: str | os.PathLike[str], on_bad_record: str = "stop", kind: str | None = None
) -> list[Record]:
    """The records of a file, in its order; blank lines are passed over.

    Args:
      path: The file.
      on_bad_record: As for `read_each`.
      kind: What it is, `'.csv'`, `'.tsv'`, `'.json'` or `'.jsonl'`; by default what its name says.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If a record is no object with fields, or has more or fewer than a table's header,
        named by file and line or number; or if the file has no record, or cannot be read as a
        whole.
    """
    path = Path(path).expanduser()
    with reading(path, "a file of records"):
        return _read(path, on_bad_record, kind)


def _read(path: Path, on_bad_record: str, kind: str | None) -> list[Record]:
    try:
        entries, fields_of = _open(path, (kind or path.suffix).lower())

        def record(entry: tuple[str, Any]) -> Record:
            name, content = entry
            try:
                return Record(name, fields_of(content))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

        first = next(entries, None)
        if first is None:
            raise ValueError(f"{path} holds no example")
        return read_each(itertools.chain([first], entries), record, on_bad_record)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None


def strings(record: Record, names: Iterable[str]) -> dict[str, str]:
    """The texts in these fields, which may be empty.

    Raises:
      ValueError: If a field is missing, or holds no text; it names the record.
    """
    for name in names:
        if not isinstance(record.fields.get(name), str):
            raise ValueError(f"{record.name}: no text in a field {name!r}, only {record.fields}")
    return {name: record.fields[name] for name in names}


def digests(files: Mapping[str, str]) -> dict[str, str]:
    """For each split with a file, a name that changes with the content of that.

    Raises:
      FileNotFoundError: If there is no such file.
    """
    found = {}
    for split, path in files.items():
        if path:
            with Path(path).expanduser().open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found[split] = Path(path).suffix.lower() + content
    return found


def _open(path: Path, kind: str) -> tuple[Iterator[tuple[str, Any]], Callable[[Any], Any]]:
    """Name and content of each record, and how to read the fields in a content."""
    if kind in _DELIMITERS:
        return _table(path, _DELIMITERS[kind])
    if kind == ".json" and _begins_an_array(path):
        return _array(path), _object
    return _lines(path), _object_in


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _object_in(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read: {error}") from None
    return _object(value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with fields, got {json.dumps(value)[:40]!r}")
    return value


def _begins_an_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        return next((line.lstrip() for line in file if line.strip()), "").startswith("[")


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of an array, counted from 1."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None
    for number, value in enumerate(values, start=1):
        yield f"{path}[{number}]", value


def _table(
    path: Path, delimiter: str
) -> tuple[Iterator[tuple[str, list[str]]], Callable[[list[str]], dict[str, str]]]:
    """The rows of a table, each by the line that it begins on."""
    rows = _rows(path, delimiter)
    _, header = next(rows, ("", []))
    if len(set(header)) != len(header) or not all(name.strip() for name in header):
        raise ValueError(f"{path}: the first line must name each column, once, not be {header}")

    def fields_of(row: list[str]) -> dict[str, str]:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} fields, but the header names {len(header)}")
        return dict(zip(header, row))

    return rows, fields_of


def _rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    yield f"{path}:{line}", row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: {error}") from None
