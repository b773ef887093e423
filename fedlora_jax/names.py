"""Lookup by name with an error that helps."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """`table[name]`.

    Raises:
      ValueError: If `name` is not in the table; it lists the valid names, the nearest one first.
    """
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(str(name), table, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown {kind} {name!r}.{hint} Valid names: {', '.join(sorted(table))}.")


def check_choices(function: Callable[..., Any], **values: Any) -> None:
    """Checks values for parameters of a function that are annotated as `Literal`; others pass.

    Raises:
      ValueError: If one is not among those of its annotation, as `lookup`.
    """
    parameters = inspect.signature(function).parameters
    for name, value in values.items():
        if name in parameters and get_origin(kind := parameters[name].annotation) is Literal:
            lookup(dict.fromkeys(get_args(kind)), value, name)
