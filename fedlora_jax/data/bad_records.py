"""Records that cannot be used: each is named, and ends the work or is skipped and counted."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from fedlora_jax.names import lookup

Record = TypeVar("Record")
T = TypeVar("T")

POLICIES = ("stop", "skip")
_SHOWN = 3  # of those skipped


class BadRecord(ValueError):
    """Where a record is, and what is wrong with it."""


def check_policy(on_bad_record: str) -> None:
    """Checks what is to happen on a bad record.

    Raises:
      ValueError: If it is neither `'stop'` nor `'skip'`.
    """
    lookup(dict.fromkeys(POLICIES), on_bad_record, "on_bad_record")


def good(results: Iterable[T | BadRecord], on_bad_record: str) -> Iterator[T]:
    """Those results that are not bad records, in their order.

    Args:
      results: Records, with a `BadRecord` in place of each that cannot be used.
      on_bad_record: `'stop'` raises the first bad one; `'skip'` leaves them out and warns at the
        end, with their number and the first few.

    Raises:
      BadRecord: The first one.
      ValueError: On another policy.
    """
    check_policy(on_bad_record)
    bad = []
    for result in results:
        if not isinstance(result, BadRecord):
            yield result
        elif on_bad_record == "stop":
            raise result
        else:
            bad.append(str(result))
    if bad:
        warnings.warn(summary(bad), stacklevel=2)


def summary(bad: list[str]) -> str:
    """One line on what was skipped: how many, and the first few."""
    rest = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f"skipped {len(bad)} bad record{'s'[: len(bad) > 1]}: {'; '.join(bad[:_SHOWN])}{rest}"


def read_each(
    records: Iterable[Record], read: Callable[[Record], T], on_bad_record: str = "stop"
) -> list[T]:
    """What is in the records that can be used, in their order.

    Args:
      records: In their order.
      read: Gives what is in a record; raises a `ValueError` that names it if it cannot be used.
      on_bad_record: As for `good`.

    Raises:
      BadRecord: As `good`.
      ValueError: If none can be used; or as `good`.
    """

    bad: list[BadRecord] = []

    def result(record: Record) -> T | BadRecord:
        try:
            return read(record)
        except ValueError as error:
            bad.append(BadRecord(str(error)))
            return bad[-1]

    found = list(good(map(result, records), on_bad_record))
    if not found:
        first = f"; the first: {bad[0]}" if bad else ""
        raise ValueError(f"there is no record that can be used{first}")
    return found
