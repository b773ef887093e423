"""Instruction examples of one's own: a local file with one JSON object a line, or an array of them.

    {"prompt": "What is the capital of France?", "response": "Paris.", "client": "ann"}

Every example has the fields that the template names. `client` and `domain` are optional: all
examples have them, or none. `docs/your_own_data.md` walks through it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fedlora_jax.data import own_files, text
from fedlora_jax.data.bad_records import read_each
from fedlora_jax.data.own_files import Example
from fedlora_jax.data.text import Encoder, Rows, Template, Texts

Made: TypeAlias = tuple[Rows, Sequence[Example]]


def read(
    path: str | os.PathLike[str],
    template: Template,
    fields: Mapping[str, str] | None = None,
    on_bad_record: str = "stop",
) -> list[Example]:
    """The examples of a file, in its order; blank lines are passed over.

    Args:
      path: A file in UTF-8.
      template: Which fields are needed.
      fields: What the file calls `prompt`, `response`, `client` or `domain`, where otherwise.
      on_bad_record: As for `read_each`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `own_files.read`.
    """
    return own_files.read(
        path, template.fields, fields, optional=template.optional, on_bad_record=on_bad_record
    )


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
    on_bad_record: str = "stop",
) -> Texts:
    """The rows of a split: one example each, or windows over the texts of each client.

    Args:
      split: `'federated'`, `'validation'` or `'test'`.
      files: As for `own_files.read_splits`.
      encoder: The tokenizer, and what ends a text.
      template: How an example becomes text.
      length: T, tokens of a row.
      fields: As for `read`.
      held_out: The share of the federated examples in a split without a file of its own; 0.2 for
        testing and none for validation by default.
      packing: Windows in which everything is to be predicted, instead of an example a row in which
        only the answer is.
      most: At most so many rows, evenly spaced over the split, and a warning if it has more; 0 for
        all.
      on_bad_record: As for `read_each`.

    Returns:
      Rows with the domain of each (one called `all` if the file does not say), and the client if
      it does. Names are sorted, over all files.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `own_files.read_splits` and `rows`; or if there is no such split or nothing is
        in it.
    """
    check_template(template, packing)
    splits = own_files.read_splits(
        files,
        template.fields,
        fields,
        held_out=held_out or {"test": 0.2},
        optional=template.optional,
        on_bad_record=on_bad_record,
    )
    return rows(
        split,
        own_files.members(splits, split, files),
        [example for examples in splits.values() for example in examples],
        encoder,
        template,
        length,
        packing=packing,
        most=most,
        on_bad_record=on_bad_record,
    )


def check_template(template: Template, packing: bool) -> None:
    """Checks that something would be learned.

    Raises:
      ValueError: If without packing the template has no `{response}`.
    """
    if not packing and "response" not in template.fields:
        raise ValueError(
            "the template has no {response}, so nothing would be learned; for whole texts set "
            "config.data.packing"
        )


def rows(
    split: str,
    examples: Sequence[Example],
    known: Sequence[Example],
    encoder: Encoder,
    template: Template,
    length: int,
    *,
    packing: bool = False,
    most: int = 0,
    on_bad_record: str = "stop",
) -> Texts:
    """Examples as rows of tokens.

    Args:
      split: Its name.
      examples: Those of the split.
      known: Those of all splits, whose clients and domains are numbered.
      encoder: As for `load`.
      template: As for `load`.
      length: As for `load`.
      packing: As for `load`.
      most: As for `load`.
      on_bad_record: As for `load`; without packing a prompt that leaves nothing of its answer is
        bad.

    Raises:
      ValueError: As `text.prompted` or `text.pack`.
    """
    if packing:
        made, owners = _packed(examples, template, encoder, length)
        kept = text.taken(len(owners), most, split)
        made, owners = made.thinned(most), [owners[place] for place in kept]
    else:
        chosen = [examples[place] for place in text.taken(len(examples), most, split)]
        made, owners = _one_a_row(chosen, template, encoder, length, on_bad_record)
    return text.with_owners(made._asdict(), owners, known)


def _one_a_row(
    examples: Sequence[Example],
    template: Template,
    encoder: Encoder,
    length: int,
    on_bad_record: str,
) -> Made:
    def encode(some: Sequence[Example]) -> Any:
        pairs = text.encode_prompted(*_contents(some), template, encoder)
        return zip(*([np.array(ids, np.int32) for ids in side] for side in pairs))

    def fitting(
        item: tuple[Example, tuple[np.ndarray, np.ndarray]],
    ) -> tuple[Example, np.ndarray, np.ndarray]:
        example, (prompt, answer) = item
        text.check_fits(prompt, answer, length, example.name)
        return example, prompt, answer

    encoded = zip(examples, _in_pieces(examples, encode), strict=True)
    owners, prompts, answers = zip(*read_each(encoded, fitting, on_bad_record))
    names = [example.name for example in owners]
    return text.prompted(prompts, answers, length, encoder.end, names), owners


def _packed(examples: Sequence[Example], template: Template, encoder: Encoder, length: int) -> Made:
    """Windows over the texts of one client and domain, and for each window one of those."""

    def encode(some: Sequence[Example]) -> Any:
        documents = text.encode_whole(*_contents(some), template, encoder)
        return [np.array(ids, np.int32) for ids in documents]

    documents = list(_in_pieces(examples, encode))
    groups: dict[tuple[str | None, str | None], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.client, example.domain), []).append(index)
    made, owners = [], []
    for members in groups.values():
        made.append(text.pack([documents[index] for index in members], length, encoder.end))
        owners += [examples[members[0]]] * len(made[-1].tokens)
    return Rows(*map(np.concatenate, zip(*made))), owners


def _contents(examples: Sequence[Example]) -> tuple[list[dict[str, str]], list[str]]:
    return [example.fields for example in examples], [example.name for example in examples]


def _in_pieces(examples: Sequence[Example], encode: Callable[[Sequence[Example]], Any]) -> Any:
    """What `encode` gives for each example, a piece at a time: lists of ids take much room."""
    for start in range(0, len(examples), text.AT_ONCE):
        yield from encode(examples[start : start + text.AT_ONCE])
