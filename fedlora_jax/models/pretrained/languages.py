"""How a language model reads and writes: what its files say of tokens and conversations."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from fedlora_jax.data.text import read_tokenizer
from fedlora_jax.foreign import read_object, reading
from fedlora_jax.models.pretrained import gguf_files
from fedlora_jax.models.pretrained.files import PathLike, find_file, is_gguf, locate

_SETTINGS = "tokenizer_config.json"


class ChatTemplate(NamedTuple):
    """A conversation's template as a file has it.

    Attributes:
      text: In Jinja.
      source: The file.
    """

    text: str
    source: str


class Language(NamedTuple):
    """How a model reads and writes.

    Attributes:
      tokenizer: A `tokenizers.Tokenizer`; it neither pads nor cuts.
      template: That of a conversation, or None.
      end_tokens: The tokens that end a text, each by itself.
      special: Tokens with a part to play by their names, `{"eos_token": "<|im_end|>"}`.
    """

    tokenizer: Any
    template: ChatTemplate | None
    end_tokens: tuple[int, ...] = ()
    special: dict[str, str] = {}

    @property
    def end_token(self) -> int | None:
        """The first token that ends a text, or None."""
        return self.end_tokens[0] if self.end_tokens else None


def read_language(source: PathLike) -> Language:
    """Reads what lies beside a model's weights, or in them.

    Args:
      source: As for `locate`: a GGUF file; a directory with one, or with a `tokenizer.json`; or
        that file.

    Raises:
      FileNotFoundError: If there is no tokenizer.
      ImportError: If the package `tokenizers` is not installed.
      ValueError: If it cannot be read.
    """
    path = locate(source)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if path.suffix == ".json" and path.is_file():
        with reading(path.parent, "a directory with a tokenizer"):
            return _beside(path)
    if path.is_dir() or not is_gguf(path):
        try:
            path = find_file(path)
        except FileNotFoundError:
            pass
        if not is_gguf(path):
            raise FileNotFoundError(f"{source} has no tokenizer.json, and is no GGUF file")
    return _within(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _within(path: Path, modified: int) -> Language:
    """Of a GGUF file, which takes seconds to open; anew where that is modified."""
    del modified
    template, end = gguf_files.chat_template(path), gguf_files.end_token(path)
    return Language(
        gguf_files.read_tokenizer(path),
        None if template is None else ChatTemplate(template, str(path)),
        () if end is None else (end,),
        gguf_files.special_tokens(path),
    )


@functools.lru_cache(maxsize=2)
def _tokenizer(file: Path, modified: int) -> Any:
    """Of a tokenizer.json, which may be long; anew where that is modified."""
    del modified
    return read_tokenizer(file)


def _beside(file: Path) -> Language:
    """Of a tokenizer.json, and what lies beside it."""

    def entries(name: str) -> dict[str, Any]:
        path = file.parent / name
        return read_object(path, "settings of a tokenizer") if path.is_file() else {}

    known, special = entries(_SETTINGS), {}
    for name, token in known.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content
    tokenizer = _tokenizer(file, file.stat().st_mtime_ns)
    end = entries("generation_config.json").get("eos_token_id")
    end = entries("config.json").get("eos_token_id") if end is None else end
    if end is None and "eos_token" in special:
        end = tokenizer.token_to_id(special["eos_token"])
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return Language(tokenizer, _template(file.parent, known), tuple(ends), special)


def _template(directory: Path, known: dict[str, Any]) -> ChatTemplate | None:
    """Newer checkpoints have a chat template in a file of its own, some several by name."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file))
    found = known.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    return None if found is None else ChatTemplate(found, str(directory / _SETTINGS))
