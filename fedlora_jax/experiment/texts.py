"""Text for language models by configuration: which text, by whose tokenizer, in what template.

`config.data` says it: `name`, of `SOURCES`; `tokenizer`, a `tokenizer.json`, a `.gguf`, or a
directory or model of the hub with either; `end_token`, the token that ends a text, by default the
tokenizer's own; `length`, tokens of a row; `template`, a format string or `"chat"`.
"""

import flax.linen as nn
import ml_collections

from fedlora_jax.data import jsonl, python_stdlib, text
from fedlora_jax.data.text import Encoder, Template, Texts
from fedlora_jax.models import Llama
from fedlora_jax.models.pretrained import read_language

SOURCES = ("jsonl", "python_stdlib")
CHAT = "chat"


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
    language = read_language(config.data.tokenizer)
    # What ends a text in training, before what ends it in writing: that may be one of several.
    named = config.data.end_token or language.special.get("eos_token")
    end = text.token_id(language.tokenizer, named) if named else language.end_token
    if end is None:
        raise ValueError(
            f"{config.data.tokenizer} does not say which token ends a text: set "
            "config.data.end_token"
        )
    return Encoder(language.tokenizer, end)


def template(config: ml_collections.ConfigDict) -> Template:
    """The template of `config.data.template`: a format string, or the model's own for a chat.

    Raises:
      ValueError: If it is wrong, or the model's files have none.
    """
    if config.data.template != CHAT:
        return text.format_template(config.data.template)
    language = read_language(config.data.tokenizer)
    if language.template is None:
        raise ValueError(
            f"{config.data.tokenizer} has no chat template: set config.data.template to a format "
            "string with {prompt} and {response}"
        )
    return text.chat_template(language.template, language.special)
