"""The tokenizers that GGUF files describe, as `tokenizers.Tokenizer`.

Read are byte-level vocabularies (`gpt2`) split before merging as `SPLITTERS` has it, and those of
SentencePiece with scores (`llama`).
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedlora_jax.names import lookup

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"  # as SentencePiece spells it
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

T = TypeVar("T")


class Unreadable(ValueError):
    """The tokenizer is none of those that are read; the message goes on after the file's name."""


def make(entry: Callable[..., Any], library: Any) -> Any:
    """The tokenizer of a file.

    Args:
      entry: The value of `tokenizer.ggml.NAME`, by `NAME` and a default.
      library: The module `tokenizers`.

    Raises:
      Unreadable: If it is none of those that are read.
    """
    kind = entry("model")
    if kind is None:
        raise Unreadable("has no tokenizer.")
    tokenizer = _lookup(_KINDS, kind, "tokenizer", "has an")(entry, library)
    _add_tokens(tokenizer, entry, library)
    return tokenizer


def _lookup(table: Mapping[str, T], name: str, kind: str, before: str) -> T:
    try:
        return lookup(table, name, kind)
    except ValueError as error:
        raise Unreadable(f"{before} {error}") from error


def _gpt_2(library: Any) -> Any:
    return library.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm(library: Any) -> Any:
    digits = library.pre_tokenizers.Digits(individual_digits=True)
    return library.pre_tokenizers.Sequence([digits, _gpt_2(library)])


def _llama_3(library: Any) -> Any:
    pieces = library.pre_tokenizers.Split(library.Regex(_LLAMA3), "isolated")
    spelt = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library.pre_tokenizers.Sequence([pieces, spelt])


SPLITTERS = {
    "gpt-2": _gpt_2,
    "llama-bpe": _llama_3,
    "llama-v3": _llama_3,
    "llama3": _llama_3,
    "smollm": _smollm,
}


def _byte_level(entry: Callable[..., Any], library: Any) -> Any:
    name = entry("pre", "default")
    # Converters say "default" that do not know. To guess would be to learn from other tokens.
    if name == "default":
        raise Unreadable(
            "has a tokenizer 'gpt2' and does not say how it splits a text; known are "
            f"{', '.join(SPLITTERS)}."
        )
    splitter = _lookup(SPLITTERS, name, "pre-tokenizer", "has a tokenizer 'gpt2' with an")
    # Llama 3 takes a whole piece that is a token as it is, and begins a text with one.
    llama_3 = splitter is _llama_3
    vocabulary = {token: index for index, token in enumerate(entry("tokens"))}
    merges = [tuple(merge.split(" ")) for merge in entry("merges")]
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges, ignore_merges=llama_3))
    tokenizer.pre_tokenizer = splitter(library)
    tokenizer.decoder = library.decoders.ByteLevel()
    _begin(tokenizer, entry, library, default=llama_3)
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
    _begin(tokenizer, entry, library, default=True)
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
        raise Unreadable(
            "has a tokenizer 'llama' without scores that say which of its pieces to merge first."
        )
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


_KINDS = {"gpt2": _byte_level, "llama": _sentence_pieces}


def _begin(tokenizer: Any, entry: Callable[..., Any], library: Any, *, default: bool) -> None:
    """Lets a text begin with its token, where the file says so or, by default, does not say."""
    index = entry("bos_token_id")
    if index is not None and entry("add_bos_token", default):
        token = tokenizer.id_to_token(index)
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[token, "$A"], special_tokens=[(token, index)]
        )


def _add_tokens(tokenizer: Any, entry: Callable[..., Any], library: Any) -> None:
    """What is one token wherever it stands in a text."""
    tokens = entry("tokens")
    for index, kind in enumerate(entry("token_type", [])):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = kind != _USER_DEFINED
            added = library.AddedToken(tokens[index], special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
