"""Texts, or pairs of texts, with a class or a number: prepared data sets, and files of one's own.

`DATASETS` says which fields of a published data set are its texts.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlora_jax.data import own_files, sources, text
from fedlora_jax.data.bad_records import read_each
from fedlora_jax.data.own_files import Example
from fedlora_jax.data.text import Texts
from fedlora_jax.names import lookup

DATASETS = {
    "glue/cola": ("sentence",),
    "glue/sst2": ("sentence",),
    "glue/mrpc": ("sentence1", "sentence2"),
    "glue/qqp": ("question1", "question2"),
    "glue/stsb": ("sentence1", "sentence2"),
    "glue/mnli": ("premise", "hypothesis"),
    "glue/mnli_matched": ("premise", "hypothesis"),
    "glue/mnli_mismatched": ("premise", "hypothesis"),
    "glue/qnli": ("question", "sentence"),
    "glue/rte": ("sentence1", "sentence2"),
    "glue/wnli": ("sentence1", "sentence2"),
    "newsgroups20": ("text",),
    "banking77": ("text",),
}


class Reader(NamedTuple):
    """How texts become tokens.

    Attributes:
      tokenizer: A `tokenizers.Tokenizer`.
      pad: Id of the padding token.
      length: T, tokens of a row.
    """

    tokenizer: Any
    pad: int
    length: int


class _Labelled(NamedTuple):
    texts: tuple[str, ...]
    label: float
    client: str | None
    domain: str | None


def load(
    dataset: str,
    split: str,
    reader: Reader,
    *,
    fields: Sequence[str] = (),
    most: int = 0,
    on_bad_record: str = "stop",
    data_dir: str | os.PathLike[str] | None = None,
) -> Texts:
    """The rows of a split of a prepared data set.

    Args:
      dataset: A name in `DATASETS`; or another data set that is prepared, with `fields`.
      split: In the language of TFDS.
      reader: How texts become tokens.
      fields: Which features are its texts, one or two; by default those in `DATASETS`.
      most: At most so many rows, evenly spaced over the split, and a warning if it has more; 0 for
        all.
      on_bad_record: As for `read_each`.
      data_dir: As for `sources.load`.

    Returns:
      `tokens` and perhaps `token_types` as `text.padded` gives them; `label` int32 of a data set
      with classes, else float32; and `domain`.

    Raises:
      FileNotFoundError: If the data set is not prepared.
      ValueError: If there is no such data set, split or field; if a text is empty, or a label out
        of range, as those are that a data set does not publish.
    """
    names = tuple(fields) or lookup(DATASETS, dataset, "data set of labelled texts")
    _check_number(names)
    classes = class_names(dataset, data_dir)
    domains = getattr(dict(sources.info(dataset, data_dir).features).get("domain"), "names", None)

    def labelled(item: tuple[str, Mapping[str, Any]]) -> _Labelled:
        name, record = item
        texts = {key: x.decode() for key, x in record.items() if isinstance(x, bytes)}
        label = record["label"]
        if dataset.startswith("glue/") and label == -1:
            raise ValueError(
                f"{name}: label -1 is out of range, for the labels of GLUE's test splits are not "
                "published: use a split of validation"
            )
        if classes and not 0 <= label < len(classes) or not math.isfinite(label):
            raise ValueError(f"{name}: label {label} is out of range 0 .. {len(classes) - 1}")
        return _Labelled(
            tuple(text.value_of(texts, field, name) for field in names),
            float(label),
            None,
            domains[record["domain"]] if domains else None,
        )

    records = list(sources.records(dataset, split, data_dir))
    chosen = [records[place] for place in text.taken(len(records), most, split)]
    found = read_each(chosen, labelled, on_bad_record)
    known = [_Labelled((), 0.0, None, domain) for domain in domains] if domains else found
    return text.with_owners(_rows(found, reader, bool(classes)), found, known)


def class_names(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Names of the classes of a prepared data set, in order; none if its labels are numbers.

    Raises:
      FileNotFoundError: If the data set is not prepared.
      ValueError: If it has no labels.
    """
    features = dict(sources.info(dataset, data_dir).features)
    feature = lookup(features, "label", f"feature of {dataset!r}")
    return tuple(feature.names) if hasattr(feature, "names") else ()


def load_files(
    split: str,
    files: Mapping[str, str],
    reader: Reader,
    *,
    texts: Sequence[str],
    numbers: bool = False,
    classes: Sequence[str] = (),
    fields: Mapping[str, str] | None = None,
    held_out: Mapping[str, float] | None = None,
    most: int = 0,
    on_bad_record: str = "stop",
) -> Texts:
    """The rows of a split of one's own files: CSV, TSV or JSON with named columns.

    Args:
      split: `'federated'`, `'validation'` or `'test'`.
      files: As for `own_files.read_splits`; the hash is of texts alone.
      reader: How texts become tokens.
      texts: Names of the columns with a text, one or two.
      numbers: Whether labels are numbers, not classes.
      classes: Names of the classes, in order; by default what the federated file has, sorted, by
        number if all are integers, and equal numbers by their text.
      fields: What the files call `label`, `client` or `domain`, where otherwise.
      held_out: As for `jsonl.load`.
      most: As for `load`.
      on_bad_record: As for `read_each`.

    Returns:
      As `load`, and `client` where the files have it.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: As `own_files.read_splits`; if there is no such split, or nothing in it; or if a
        label is no number, or none of the classes.
    """
    _check_number(texts)
    splits = _read_splits(files, texts, fields, held_out, on_bad_record)
    chosen = own_files.members(splits, split, files)
    names = classes or (() if numbers else _classes(splits, files))
    places = {name: place for place, name in enumerate(names)}

    def labelled(example: Example) -> _Labelled:
        label = example.fields["label"]
        try:
            value = _number(label) if numbers else lookup(places, label, "class")
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from None
        return _Labelled(
            tuple(example.fields[name] for name in texts), value, example.client, example.domain
        )

    chosen = [chosen[place] for place in text.taken(len(chosen), most, split)]
    found = read_each(chosen, labelled, on_bad_record)
    everything = [example for examples in splits.values() for example in examples]
    return text.with_owners(_rows(found, reader, not numbers), found, everything)


def class_names_of_files(
    files: Mapping[str, str],
    *,
    texts: Sequence[str],
    fields: Mapping[str, str] | None = None,
    on_bad_record: str = "stop",
) -> tuple[str, ...]:
    """The classes that `load_files` numbers by default.

    Raises:
      FileNotFoundError: As `load_files`.
      ValueError: As `load_files`.
    """
    train = {"federated": files.get("federated", "")}
    return tuple(_classes(_read_splits(train, texts, fields, None, on_bad_record), {}))


def _read_splits(
    files: Mapping[str, str],
    texts: Sequence[str],
    fields: Mapping[str, str] | None,
    held_out: Mapping[str, float] | None,
    on_bad_record: str,
) -> dict[str, list[Example]]:
    return own_files.read_splits(
        files,
        (*texts, "label"),
        fields,
        held_out=held_out or {"test": 0.2},
        told_by=texts,
        on_bad_record=on_bad_record,
    )


def _classes(splits: Mapping[str, Sequence[Example]], files: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the federated file, some of whose examples may be held out."""
    found = {
        example.fields["label"]
        for split, examples in splits.items()
        if split == "federated" or not files.get(split)
        for example in examples
    }
    try:
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(found))


def _number(label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"label {label!r} is no number")
    return value


def _check_number(texts: Sequence[str]) -> None:
    if len(texts) not in (1, 2) or isinstance(texts, str):
        raise ValueError(f"expected the names of one text or two, got {texts!r}")


def _rows(found: Sequence[_Labelled], reader: Reader, has_classes: bool) -> dict[str, np.ndarray]:
    tokens = text.padded(
        reader.tokenizer, reader.pad, [each.texts for each in found], reader.length
    )
    kind = np.int32 if has_classes else np.float32
    return {**tokens, "label": np.array([each.label for each in found], kind)}
