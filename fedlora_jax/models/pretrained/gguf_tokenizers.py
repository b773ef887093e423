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
_SPACE = "▁"  # as SentencePiece spells it
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


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
    kind, splitter = entry("model"), entry("pre", "default")
    if kind == "llama":
        tokenizer = _sentence_pieces(entry, library)
    elif kind == "gpt2" and splitter in _SPLITTERS:
        tokenizer = _byte_level(entry, library, splitter)
    else:
        raise Unreadable(
            f"{kind!r} split as {splitter!r}; read here are SentencePiece's ('llama') and "
            f"byte-level ones ('gpt2') split as {', '.join(map(repr, _SPLITTERS))}"
        )
    _add_tokens(tokenizer, entry, library)
    _begin(tokenizer, entry, library, kind == "llama" or splitter in _LLAMA3)
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


def _sentence_pieces(entry: Callable[..., Any], library: Any) -> Any:
    """As in transformers: a space is put before a text, but not before one that begins with a
    space, nor after a special token within it."""
    tokens, unknown = entry("tokens"), entry("unknown_token_id")
    model = library.models.BPE(
        {token: index for index, token in enumerate(tokens)},
        _merges(_scores(entry)),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = library.Tokenizer(model)
    prefixed = entry("add_space_prefix", True)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(
        _SPACE, prepend_scheme="first" if prefixed else "never", split=False
    )
    after = library.decoders
    steps = [after.Replace(_SPACE, " "), after.ByteFallback(), after.Fuse()]
    tokenizer.decoder = after.Sequence(steps + [after.Strip(" ", 1, 0)] * prefixed)
    return tokenizer


def _scores(entry: Callable[..., Any]) -> dict[str, float]:
    """The scores of the pieces that text is made of."""
    tokens = entry("tokens")
    kinds = entry("token_type", [_NORMAL] * len(tokens))
    scores = {
        token: score
        for token, score, kind in zip(tokens, entry("scores", []), kinds)
        if kind == _NORMAL
    }
    if len(set(scores.values())) < 2:  # some converters write one for all
        raise Unreadable("'llama' without scores that say which of its pieces are merged first")
    return scores


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs that make a piece, of the best score first."""
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    # Of equal ones the longest at the left first, as in transformers.
    pairs.sort(key=lambda pair: (scores[pair[0] + pair[1]], len(pair[0])), reverse=True)
    return pairs


def _add_tokens(tokenizer: Any, entry: Callable[..., Any], library: Any) -> None:
    """What is one token wherever it stands in a text."""
    tokens = entry("tokens")
    for index, kind in enumerate(entry("token_type", [])):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = kind != _USER_DEFINED
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
