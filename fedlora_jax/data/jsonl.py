"""Instruction examples of one's own: a local file with one JSON object a line.

    {"prompt": "What is the capital of France?", "response": "Paris.", "client": "ann"}

Every line has the fields that the template names. `client` and `domain` are optional: all lines
have them, or none. `docs/your_own_data.md` walks through it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlora_jax.data import text
from fedlora_jax.data.held_out import split_of
from fedlora_jax.data.text import Encoder, Rows, Template, Texts
from fedlora_jax.names import lookup

_SPLITS = ("federated", "validation", "test")
_ALL = "all"


class Example(NamedTuple):
    """A line of a file.

    Attributes:
      name: File and number of the line.
      fields: The text of each field that the template names.
      client: Whose it is; None if the file does not say.
      domain: Of what kind it is; None if the file does not say.
    """

    name: str
    fields: dict[str, str]
    client: str | None
    domain: str | None


def read(
    path: str | os.PathLike[str], template: Template, fields: Mapping[str, str] | None = None
) -> list[Example]:
    """The examples of a file, in its order; blank lines are passed over.

    Args:
      path: A file in UTF-8.
      template: Which fields are needed.
      fields: What the file calls `prompt`, `response`, `client` or `domain`, where otherwise.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If a line is not a JSON object, or lacks a field, or a text in it is empty, named
        by file and line; or if the file holds no example.
    """
    called = {name: name for name in ("prompt", "response", "client", "domain")}
    for name, theirs in (fields or {}).items():
        lookup(called, name, "field to be called otherwise")
        called[name] = theirs or name
    lines = _objects(Path(path).expanduser())
    given = {
        name
        for name in ("client", "domain")
        if called[name] != name or any(name in line for _, line in lines)
    }

    def example(name: str, line: Mapping[str, Any]) -> Example:
        values = {
            field: text.value_of(line, called.get(field, field), name) for field in template.fields
        }
        owner, kind = (
            text.value_of(line, called[field], name) if field in given else None
            for field in ("client", "domain")
        )
        return Example(name, values, owner, kind)

    return [example(name, line) for name, line in lines]


def load(
    split: str,
    files: Mapping[str, str],
    encoder: Encoder,
    template: Template,
    length: int,
    *,
    fields: Mapping[str, str] | None = None,
    held_out: Mapping[str, float] | None = None,
    packing: bool = False,
    most: int = 0,
) -> Texts:
    """The rows of a split: one example each, or windows over the texts of each client.

    Args:
      split: `'federated'`, `'validation'` or `'test'`.
      files: The file of each split. A split without one is held out of the federated examples, by
        a hash of their text, so that equal texts are in one split.
      encoder: The tokenizer, and what ends a text.
      template: How an example becomes text.
      length: T, tokens of a row.
      fields: As for `read`.
      held_out: The share of the federated examples in a split without a file of its own; 0.2 for
        testing and none for validation by default.
      packing: Windows in which everything is to be predicted, instead of an example a row in which
        only the answer is.
      most: At most so many rows, evenly spaced over the file; 0 for all.

    Returns:
      Rows with the domain of each (one called `all` if the file does not say), and the client if
      it does. Names are sorted, over all files.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `read` and `text.prompted`; or if there is no such split, nothing is in it, or
        without packing the template has no `{response}`.
    """
    if not packing and "response" not in template.fields:
        raise ValueError(
            "the template has no {response}, so nothing would be learned; for whole texts set "
            "config.data.packing"
        )
    splits = _splits(files, template, fields, held_out or {"test": 0.2})
    chosen = lookup(splits, split, "split")
    if not chosen:
        raise ValueError(f"no example of {files['federated']} is in the split {split!r}")
    everything = [example for examples in splits.values() for example in examples]
    clients = sorted({example.client for example in everything if example.client is not None})
    domains = tuple(sorted({example.domain or _ALL for example in everything}))
    if clients and any(example.client is None for example in everything):
        raise ValueError(f"only some of the files {', '.join(files.values())} have clients")

    rows, members = _packed if packing else _one_a_row, chosen
    made, owners = rows(members, template, encoder, length)
    arrays = {
        "tokens": made.tokens,
        "answer": made.answer,
        "domain": np.array([domains.index(x.domain or _ALL) for x in owners], np.int32),
    }
    if clients:
        arrays["client"] = np.array([clients.index(str(x.client)) for x in owners], np.int32)
    kept = text.evenly(len(owners), most)
    return Texts({name: x[kept] for name, x in arrays.items()}, tuple(clients), domains)


def _one_a_row(
    examples: Sequence[Example], template: Template, encoder: Encoder, length: int
) -> tuple[Rows, Sequence[Example]]:
    names = [example.name for example in examples]
    prompts, answers = text.encode_prompted([x.fields for x in examples], names, template, encoder)
    return text.prompted(prompts, answers, length, encoder.end, names), examples


def _packed(
    examples: Sequence[Example], template: Template, encoder: Encoder, length: int
) -> tuple[Rows, Sequence[Example]]:
    """Windows over the texts of one client and domain, and for each window one of those."""
    names = [example.name for example in examples]
    documents = text.encode_whole([x.fields for x in examples], names, template, encoder)
    groups: dict[tuple[str | None, str | None], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.client, example.domain), []).append(index)
    made, owners = [], []
    for members in groups.values():
        made.append(text.pack([documents[index] for index in members], length, encoder.end))
        owners += [examples[members[0]]] * len(made[-1].tokens)
    return Rows(*map(np.concatenate, zip(*made))), owners


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each line that is not blank."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected an object with fields, got {line.strip()[:40]!r}")
        found.append((name, value))
    if not found:
        raise ValueError(f"{path} holds no example")
    return found


def _splits(
    files: Mapping[str, str],
    template: Template,
    fields: Mapping[str, str] | None,
    held_out: Mapping[str, float],
) -> dict[str, list[Example]]:
    for name in (*files, *held_out):
        lookup(dict.fromkeys(_SPLITS), name, "split")
    if not files.get("federated"):
        raise ValueError("there is no file to train on: set config.data.files.federated")
    splits: dict[str, list[Example]] = {
        name: read(files[name], template, fields) if files.get(name) else [] for name in _SPLITS
    }
    shares = {
        name: share for name, share in held_out.items() if name in _SPLITS[1:] and not splits[name]
    }
    rest: dict[str, list[Example]] = {name: [] for name in ("federated", *shares)}
    for example in splits["federated"]:
        content = "\0".join(example.fields[name] for name in sorted(example.fields))
        rest[split_of(content.encode(), shares)].append(example)
    return {**splits, **rest}
