"""Examples of one's own in local files: their fields, whose they are, and their splits."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fedlora_jax.data import record_files, text
from fedlora_jax.data.bad_records import read_each
from fedlora_jax.data.held_out import split_of
from fedlora_jax.data.record_files import Record
from fedlora_jax.foreign import reading
from fedlora_jax.names import lookup

SPLITS = ("federated", "validation", "test")


class Example(NamedTuple):
    """An example of a file.

    Attributes:
      name: The file, and the line or number in it.
      fields: The text of each field that is wanted.
      client: Whose it is; None if the file does not say.
      domain: Of what kind it is; None if the file does not say.
    """

    name: str
    fields: dict[str, str]
    client: str | None
    domain: str | None


def read(
    path: str | os.PathLike[str],
    wanted: Sequence[str],
    fields: Mapping[str, str] | None = None,
    *,
    optional: Collection[str] = (),
    on_bad_record: str = "stop",
) -> list[Example]:
    """The examples of a file, in its order.

    Args:
      path: As for `record_files.read`.
      wanted: Names of the fields that are needed.
      fields: What the file calls one of these, or `client` or `domain`, where otherwise.
      optional: Fields that may be missing or empty: their text is empty then.
      on_bad_record: As for `read_each`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `record_files.read`; or if a record lacks a field, or a text in it is empty,
        named by file and line or number.
    """
    names = (*wanted, *optional, "prompt", "response", "client", "domain")
    called = {name: name for name in names}
    for name, theirs in (fields or {}).items():
        lookup(called, name, "field to be called otherwise")
        called[name] = theirs or name
    records = record_files.read(path, on_bad_record)
    given = {
        name
        for name in ("client", "domain")
        if called[name] != name or any(name in record.fields for record in records)
    }

    def value(record: Record, field: str) -> str:
        given = record.fields.get(called[field])
        missing = not given or given != given  # NaN, as a table's empty cell comes out of pandas
        if field in optional and (missing or not str(given).strip()):
            return ""
        return text.value_of(record.fields, called[field], record.name)

    def example(record: Record) -> Example:
        values = {field: value(record, field) for field in (*wanted, *optional)}
        owner, kind = (
            value(record, field) if field in given else None for field in ("client", "domain")
        )
        return Example(record.name, values, owner, kind)

    with reading(path, "a file of such examples"):
        return read_each(records, example, on_bad_record)


def read_splits(
    files: Mapping[str, str],
    wanted: Sequence[str],
    fields: Mapping[str, str] | None = None,
    *,
    held_out: Mapping[str, float],
    told_by: Collection[str] = (),
    **options: Any,
) -> dict[str, list[Example]]:
    """The examples of each split.

    Args:
      files: The file of each split. A split without one is held out of the federated examples, by
        a hash of their text, so that equal texts are in one split.
      wanted: As for `read`.
      fields: As for `read`.
      held_out: The share of the federated examples in a split without a file of its own.
      told_by: The fields whose texts make that hash; by default all that are wanted.
      **options: As for `read`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `read`; or if a split is none of `SPLITS`, or there is no file to train on.
    """
    for name in (*files, *held_out):
        lookup(dict.fromkeys(SPLITS), name, "split")
    if not files.get("federated"):
        raise ValueError(
            "there is no file to train on (config.data.files.federated): name it with file=PATH, "
            "as in --config=configs/table.py:file=PATH or configs/jsonl.py:file=PATH"
        )
    splits: dict[str, list[Example]] = {
        name: read(files[name], wanted, fields, **options) if files.get(name) else []
        for name in SPLITS
    }
    shares = {
        name: share for name, share in held_out.items() if name in SPLITS[1:] and not splits[name]
    }
    rest: dict[str, list[Example]] = {name: [] for name in ("federated", *shares)}
    for example in splits["federated"]:
        content = "\0".join(example.fields[name] for name in sorted(told_by or example.fields))
        rest[split_of(content.encode(), shares)].append(example)
    return {**splits, **rest}


def members(
    splits: Mapping[str, list[Example]], split: str, files: Mapping[str, str]
) -> list[Example]:
    """The examples of one split.

    Raises:
      ValueError: If there is no such split, or nothing in it.
    """
    chosen = lookup(splits, split, "split")
    if not chosen:
        raise ValueError(f"no example of {files['federated']} is in the split {split!r}")
    return chosen
