"""Text for language models by configuration: which text, by whose tokenizer, in what template.

`config.data` says it: `name`, of `SOURCES`; `tokenizer`, a `tokenizer.json`, a `.gguf`, or a
directory or model of the hub with either; `end_token`, the token that ends a text, by default the
tokenizer's own; `length`, tokens of a row; `template`, a format string or `"chat"`.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import ml_collections

from fedlora_jax.data import jsonl, python_stdlib, text
from fedlora_jax.data.text import Encoder, Template, Texts
from fedlora_jax.models import Llama
from fedlora_jax.models.pretrained import gguf_files, locate
from fedlora_jax.models.pretrained.files import find_file, is_gguf

SOURCES = ("jsonl", "python_stdlib")
CHAT = "chat"


class _Tokens(NamedTuple):
    """What a model's files say of its tokens.

    Attributes:
      tokenizer: A `tokenizers.Tokenizer`.
      special: Tokens with a part to play, `eos_token` and such.
      chat: Its template of a conversation in Jinja, or None.
    """

    tokenizer: Any
    special: dict[str, str]
    chat: str | None


def load(config: ml_collections.ConfigDict, split: str) -> Texts:
    """The rows of a split.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the configuration or the text is at fault; it names which.
    """
    data = config.data
    if data.name == "python_stdlib":
        return python_stdlib.load(
            split,
            encoder(config),
            data.length,
            windows_per_client=data.windows_per_client.get(split, 0),
            windows_per_file=data.windows_per_file.get(split, 0),
        )
    return jsonl.load(
        split,
        data.files,
        encoder(config),
        template(config),
        data.length,
        fields=data.fields,
        held_out=data.held_out,
        packing=data.packing,
        most=data.rows.get(split, 0),
    )


def domain_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The names of the domains, in order."""
    if config.data.name == "python_stdlib":
        return tuple(python_stdlib.domain_names())
    return jsonl.domain_names(config.data.files, template(config), config.data.fields)


def check(config: ml_collections.ConfigDict, model: nn.Module) -> None:
    """Checks that text, tokenizer and model fit each other, before any of it is used.

    Raises:
      ValueError: If rows are longer than the model's context, the tokenizer is another model's, or
        the text is of another edition than the configuration says.
    """
    data = config.data
    if isinstance(model, Llama):
        context = model.context
        if context is not None and data.length > context:
            raise ValueError(
                f"config.data.length is {data.length}, but the context of the model "
                f"{config.model.name} {context} tokens"
            )
        text.check_vocabulary(
            encoder(config).tokenizer,
            model.vocab_size,
            source=data.tokenizer,
            model=config.model.name,
        )
    if data.name == "python_stdlib" and data.edition not in ("", python_stdlib.edition()):
        raise ValueError(
            f"config.data.edition is {data.edition}, but the library of this Python is "
            f"{python_stdlib.edition()}: results on one do not compare with those on the other"
        )


def encoder(config: ml_collections.ConfigDict) -> Encoder:
    """The tokenizer of `config.data.tokenizer`, and the token that ends a text.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If the tokenizer does not have the end token, or none is known.
    """
    tokens = _tokens(config)
    end = config.data.end_token or tokens.special.get("eos_token")
    if not end:
        raise ValueError(
            f"{config.data.tokenizer} does not say which token ends a text: set "
            "config.data.end_token"
        )
    return Encoder(tokens.tokenizer, text.token_id(tokens.tokenizer, end))


def template(config: ml_collections.ConfigDict) -> Template:
    """The template of `config.data.template`: a format string, or the model's own for a chat.

    Raises:
      ValueError: If it is wrong, or the model's files have none.
    """
    if config.data.template != CHAT:
        return text.format_template(config.data.template)
    tokens = _tokens(config)
    if tokens.chat is None:
        raise ValueError(
            f"{config.data.tokenizer} has no chat template: set config.data.template to a format "
            "string with {prompt} and {response}"
        )
    return text.chat_template(tokens.chat, tokens.special)


def _tokens(config: ml_collections.ConfigDict) -> _Tokens:
    path = locate(config.data.tokenizer)
    if path.is_dir():
        own = path / "tokenizer.json"
        path = own if own.exists() else find_file(path)
    return _read(path, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=2)
def _read(path: Path, modified: int) -> _Tokens:
    """What is in a file and, for a tokenizer.json, beside it; anew if that has been modified."""
    del modified
    if is_gguf(path):
        return _Tokens(
            gguf_files.read_tokenizer(path),
            gguf_files.special_tokens(path),
            gguf_files.chat_template(path),
        )
    beside = path.parent / "tokenizer_config.json"
    known = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    special = {}
    for name, token in known.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content
    return _Tokens(text.read_tokenizer(path), special, _chat(path.parent, known))


def _chat(directory: Path, known: dict[str, Any]) -> str | None:
    """Newer checkpoints have a chat template in a file of its own, some several by name."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = known.get("chat_template")
    if isinstance(found, list):
        return {each["name"]: each["template"] for each in found}.get("default")
    return found
