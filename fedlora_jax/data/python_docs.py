"""Passages of Python's own documentation, classified by what they are about.

`pydoc_data.topics`, the text behind `help()`, is on every machine that runs Python: about 1,500
passages of real prose about nine groups of topics. A page often repeats another one; each passage
is taken once, as of the smallest page that has it. The text differs a little between versions of
Python, and so do results.
"""

import os
import re
import zlib
from collections.abc import Iterator
from pydoc_data.topics import topics as _PAGES

import numpy as np

from fedlora_jax.names import lookup

# The pages of each class; pages that a version of Python does not have are passed over.
_GROUPS = {
    "statements": "assert assignment augassign break continue del global import nonlocal pass "
    "raise return simple",
    "compound statements": "async await class compound context-managers else for function if try "
    "while with",
    "expressions": "atom-identifiers atom-literals attribute-references binary bitwise booleans "
    "calls comparisons conversions exprlists in lambda operator-summary power shifting slicings "
    "subscriptions truth unary yield",
    "names and literals": "dynamic-features execmodel exceptions floating identifiers imaginary "
    "integers naming numbers strings",
    "data model": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects "
    "callable-types id-classes objects specialattrs types typesfunctions typesmethods typesmodules",
    "special methods": "attribute-access customization numeric-types sequence-types specialnames",
    "containers": "dict lists typesmapping typesseq typesseq-mutable",
    "text": "formatstrings string-methods",
    "debugger": "debugger",
}

# Words in a passage, and characters below which a paragraph is a heading.
_LONGEST, _SHORTEST = 80, 60
# One passage in so many is for testing, and of the others one in so many for validation.
_TEST_SHARE, _VALIDATION_SHARE = 4, 6


def class_names() -> list[str]:
    """Names of the classes, in order."""
    return list(_GROUPS)


def passages(split: str) -> tuple[list[str], np.ndarray]:
    """The passages of a split and their classes.

    Which split a passage is in depends on its text alone.

    Args:
      split: `'federated'`, about five eighths, `'validation'`, one eighth, or `'test'`, a quarter.

    Returns:
      Texts, and labels int32 `[M]`.

    Raises:
      ValueError: If there is no such split.
    """
    lookup(dict.fromkeys(("federated", "validation", "test")), split, "split")
    found = [(text, label) for text, label in _all_passages() if _split_of(text) == split]
    return [text for text, _ in found], np.array([label for _, label in found], np.int32)


def load(split: str, tokenizer: str | os.PathLike[str], length: int = 64) -> dict[str, np.ndarray]:
    """The passages of a split as token ids.

    Args:
      split: `'federated'`, `'validation'` or `'test'`.
      tokenizer: A `tokenizer.json`, as it lies beside a model's weights.
      length: Tokens of a passage; longer ones are cut, shorter ones padded with the tokenizer's
        padding token.

    Returns:
      `tokens` int32 `[M, length]` and `label` int32 `[M]`.

    Raises:
      ImportError: If the package `tokenizers` is not installed (extra `text`).
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs a tokenizer: pip install -e '.[text]'") from error
    encoder = Tokenizer.from_file(os.fspath(tokenizer))
    padding = (encoder.padding or {}).copy()
    padding.update(length=length, direction="right", pad_to_multiple_of=None)
    encoder.enable_padding(**padding)
    encoder.enable_truncation(length)
    texts, labels = passages(split)
    tokens = np.array([encoding.ids for encoding in encoder.encode_batch(texts)], np.int32)
    return {"tokens": tokens, "label": labels}


def _split_of(text: str) -> str:
    rest, place = divmod(zlib.crc32(text.encode()), _TEST_SHARE)
    if place == 0:
        return "test"
    return "federated" if rest % _VALIDATION_SHARE else "validation"


def _all_passages() -> Iterator[tuple[str, int]]:
    classes = {
        page: label for label, pages in enumerate(_GROUPS.values()) for page in pages.split()
    }
    present = sorted(classes.keys() & _PAGES.keys(), key=lambda page: (len(_PAGES[page]), page))
    seen: set[str] = set()
    for page in present:
        for paragraph in re.split(r"\n\s*\n", _PAGES[page]):
            text = " ".join(paragraph.split())
            if len(text) < _SHORTEST or text in seen or not re.search("[a-z]", text):
                continue
            seen.add(text)
            words = text.split(" ")
            for start in range(0, len(words), _LONGEST):
                piece = " ".join(words[start : start + _LONGEST])
                if len(piece) >= _SHORTEST:
                    yield piece, classes[page]
