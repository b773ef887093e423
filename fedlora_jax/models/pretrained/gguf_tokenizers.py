"""The tokenizers that GGUF files describe, as `tokenizers.Tokenizer`."""

from collections.abc import Callable
from typing import Any

# How a byte-level vocabulary splits a text before merging: GPT-2's way, with digits apart, or
# by Llama 3's expression, in which case a whole piece that is a token is taken as it is.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SPLITTERS = ("smollm", "gpt-2", "default", *_LLAMA3)
_LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4


class Unreadable(ValueError):
    """The tokenizer is of a kind that is not read here; the message names it."""


def make(entry: Callable[..., Any], library: Any) -> Any:
    """The tokenizer of a file.

    Args:
      entry: The value of `tokenizer.ggml.NAME`, by `NAME` and a default.
      library: The module `tokenizers`.

    Raises:
      Unreadable: If it is none of those that are read.
    """
    model, splitter = entry("model"), entry("pre", "default")
    if model != "gpt2" or splitter not in _SPLITTERS:
        raise Unreadable(
            f"{model!r} split as {splitter!r}; read here are byte-level ones ('gpt2') split as "
            f"{', '.join(map(repr, _SPLITTERS))}"
        )
    tokenizer = _byte_level(entry, library, splitter)
    _add_tokens(tokenizer, entry, library)
    _begin(tokenizer, entry, library, splitter in _LLAMA3)
    return tokenizer


def _byte_level(entry: Callable[..., Any], library: Any, splitter: str) -> Any:
    vocabulary = {token: index for index, token in enumerate(entry("tokens"))}
    merges = [tuple(merge.split(" ")) for merge in entry("merges")]
    whole = splitter in _LLAMA3
    model = library.models.BPE(vocabulary, merges, ignore_merges=whole)
    tokenizer = library.Tokenizer(model)
    before = library.pre_tokenizers
    split = before.ByteLevel(add_prefix_space=False, use_regex=not whole)
    if splitter == "smollm":
        split = before.Sequence([before.Digits(individual_digits=True), split])
    elif whole:
        pieces = before.Split(library.Regex(_LLAMA3_PIECES), "isolated")
        split = before.Sequence([pieces, split])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Any, entry: Callable[..., Any], library: Any) -> None:
    """What is one token wherever it stands in a text."""
    tokens = entry("tokens")
    for index, kind in enumerate(entry("token_type", [])):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            added = library.AddedToken(tokens[index], special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])


def _begin(tokenizer: Any, entry: Callable[..., Any], library: Any, default: bool) -> None:
    """Lets a text begin with its token, where the file says so or, by default, does not say."""
    index = entry("bos_token_id")
    if index is not None and entry("add_bos_token", default):
        token = tokenizer.id_to_token(index)
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[token, "$A"], special_tokens=[(token, index)]
        )
