"""Text by configuration: which text, by whose tokenizer, in what template.

`config.data` says it: `name`, of `SOURCES`; `tokenizer`, a `tokenizer.json`, a `.gguf`, or a
directory or model of the hub with either; `length`, tokens of a row; and what the source needs.

For language models that is `end_token`, the token that ends a text, by default the tokenizer's own,
and `template`, a format string, `"chat"` or `"alpaca"`. For classification and regression it is the
`text` that is read, one name or two, and `pad_token`, by default the tokenizer's own.

Token ids are made once and kept beside the prepared data sets.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import ml_collections

from fedlora_jax.data import (
    instructions,
    jsonl,
    labelled_texts,
    python_stdlib,
    record_files,
    sources,
    text,
    tokenised,
)
from fedlora_jax.data.bad_records import BadRecord
from fedlora_jax.data.labelled_texts import Reader
from fedlora_jax.data.text import Encoder, Template, Texts
from fedlora_jax.models import Bert, Llama
from fedlora_jax.models.pretrained import read_language
from fedlora_jax.names import lookup

# What is learned from each source.
SOURCES = {
    "instructions": ("causal_lm",),
    "jsonl": ("causal_lm",),
    "labelled_texts": ("classification", "regression"),
    "python_stdlib": ("causal_lm",),
    "table": ("classification", "regression"),
}
CHAT, ALPACA = "chat", "alpaca"
_PADDING = ("[PAD]", "<pad>")

Recipe: TypeAlias = dict[str, Any]


def load(config: ml_collections.ConfigDict, split: str) -> Texts:
    """The rows of a split.

    Raises:
      FileNotFoundError: If a file is missing, or a data set is not prepared.
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
    makers = {
        "instructions": _instructions,
        "jsonl": _jsonl,
        "labelled_texts": _labelled_texts,
        "table": _table,
    }
    options = {
        "most": data.get("rows", {}).get(split, 0),
        "on_bad_record": data.get("on_bad_record", "stop"),
    }
    make, recipe = lookup(makers, data.name, "source of text")(config, split, options)
    recipe |= {"source": data.name, "split": split, "length": data.length}
    try:
        return tokenised.kept(sources.directory_of(), recipe, make)
    except BadRecord as error:
        raise ValueError(
            f"{error}\nconfig.data.on_bad_record='skip' leaves out what cannot be used"
        ) from error


def _jsonl(
    config: ml_collections.ConfigDict, split: str, options: dict[str, Any]
) -> tuple[Callable[[], Texts], Recipe]:
    data = config.data
    options |= {
        "fields": data.fields.to_dict(),
        "held_out": data.held_out.to_dict(),
        "packing": data.packing,
    }
    written, read = encoder(config), template(config)
    make = partial(jsonl.load, split, data.files, written, read, data.length, **options)
    return make, {
        "files": record_files.digests(data.files),
        **_language(config, written),
        **options,
    }


def _instructions(
    config: ml_collections.ConfigDict, split: str, options: dict[str, Any]
) -> tuple[Callable[[], Texts], Recipe]:
    data = config.data
    options |= {"held_out": data.held_out.to_dict(), "packing": data.packing}
    written, read = encoder(config), template(config)
    make = partial(instructions.load, data.dataset, split, written, read, data.length, **options)
    return make, {"data": _prepared(data.dataset), **_language(config, written), **options}


def _labelled_texts(
    config: ml_collections.ConfigDict, split: str, options: dict[str, Any]
) -> tuple[Callable[[], Texts], Recipe]:
    data, read = config.data, reader(config)
    options |= {"fields": list(data.get("text", ()))}
    make = partial(labelled_texts.load, data.dataset, split, read, **options)
    return make, {"data": _prepared(data.dataset), **_padding(read), **options}


def _table(
    config: ml_collections.ConfigDict, split: str, options: dict[str, Any]
) -> tuple[Callable[[], Texts], Recipe]:
    data, read = config.data, reader(config)
    options |= {
        "texts": list(data.text),
        "numbers": config.task == "regression",
        "classes": list(data.classes),
        "fields": data.fields.to_dict(),
        "held_out": data.held_out.to_dict(),
    }
    make = partial(labelled_texts.load_files, split, data.files, read, **options)
    return make, {"files": record_files.digests(data.files), **_padding(read), **options}


def _prepared(dataset: str) -> list[Any]:
    """What changes with a prepared data set."""
    info = sources.info(dataset)
    splits = {name: [x.num_examples, x.num_bytes] for name, x in info.splits.items()}
    return [info.full_name, splits]


def _language(config: ml_collections.ConfigDict, written: Encoder) -> Recipe:
    """What ids depend on besides the text, of a language model."""
    wording: Any = config.data.template
    if wording == CHAT:
        language = read_language(config.data.tokenizer)
        wording = [CHAT, language.template and language.template.text, language.special]
    return {"tokenizer": _digest(written.tokenizer), "end": written.end, "template": wording}


def _padding(read: Reader) -> Recipe:
    return {"tokenizer": _digest(read.tokenizer), "pad": read.pad}


def _digest(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def check(config: ml_collections.ConfigDict, model: nn.Module) -> None:
    """Checks that text, tokenizer and model fit each other, before any of it is used.

    Raises:
      ValueError: If rows are longer than the model's context, the tokenizer is another model's, or
        the text is of another edition than the configuration says.
    """
    data = config.data
    lookup(dict.fromkeys(SOURCES[data.name]), config.task, f"task for the source {data.name!r}")
    if isinstance(model, Llama):
        _check_decoder(config, model)
    if isinstance(model, Bert):
        _check_encoder(config, model)
    if data.name == "python_stdlib" and data.edition not in ("", python_stdlib.edition()):
        raise ValueError(
            f"config.data.edition is {data.edition}, but the library of this Python is "
            f"{python_stdlib.edition()}: results on one do not compare with those on the other"
        )


def _check_decoder(config: ml_collections.ConfigDict, model: Llama) -> None:
    length, context = config.data.length, model.context
    if context is not None and length > context:
        raise ValueError(
            f"config.data.length is {length}, but the context of the model {config.model.name} "
            f"{context} tokens"
        )
    _check_vocabulary(config, encoder(config).tokenizer, model.vocab_size)


def _check_encoder(config: ml_collections.ConfigDict, model: Bert) -> None:
    read = reader(config)
    _check_vocabulary(config, read.tokenizer, model.vocab_size)
    if read.pad != model.pad_token:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} pads with token {read.pad}, but the model "
            f"{config.model.name} masks {model.pad_token}: set config.data.pad_token"
        )
    pair = text.padded(read.tokenizer, read.pad, [("a", "b")], 16)
    if "token_types" in pair and model.num_token_types < 2:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} tells two texts apart by token types, but the "
            f"model {config.model.name} has one: they do not belong together"
        )
    names = class_names(config)
    outputs = len(names) if names else 1
    if model.num_classes != outputs:
        raise ValueError(
            f"config.model.options.num_classes is {model.num_classes}, but {config.task} of the "
            f"data set takes {outputs}"
            + (f": {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else "")
        )


def _check_vocabulary(config: ml_collections.ConfigDict, tokenizer: Any, vocab_size: int) -> None:
    text.check_vocabulary(
        tokenizer, vocab_size, source=config.data.tokenizer, model=config.model.name
    )


def class_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Names of the classes of `labelled_texts` or a `table`, in order; none for regression.

    Raises:
      FileNotFoundError: As `load`.
      ValueError: As `load`; or if a data set has classes and is to be learned by regression, or
        has none and is not.
    """
    data = config.data
    if data.name == "table":
        if config.task == "regression":
            return ()
        return tuple(data.classes) or labelled_texts.class_names_of_files(
            data.files,
            texts=data.text,
            fields=data.fields,
            on_bad_record=data.get("on_bad_record", "stop"),
        )
    names = labelled_texts.class_names(data.dataset)
    wanted = "classification" if names else "regression"
    if config.task != wanted:
        raise ValueError(f"{data.dataset} is learned by {wanted}, config.task is {config.task}")
    return names


def reader(config: ml_collections.ConfigDict) -> Reader:
    """The tokenizer of `config.data.tokenizer`, what pads a text, and the tokens of a row.

    Raises:
      FileNotFoundError: If there is no tokenizer.
      ValueError: If the tokenizer does not have the padding token, or none is known.
    """
    data = config.data
    language = read_language(data.tokenizer)
    tokenizer = language.tokenizer
    known = [token for token in _PADDING if tokenizer.token_to_id(token) is not None]
    named = data.get("pad_token", "") or language.special.get("pad_token") or (*known, None)[0]
    if named is None:
        raise ValueError(
            f"{data.tokenizer} does not say which token pads a text: set config.data.pad_token"
        )
    return Reader(tokenizer, text.token_id(tokenizer, named), data.length)


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
    """The template of `config.data.template`: a format string, Alpaca's, or the model's own.

    Raises:
      ValueError: If it is wrong, or the model's files have none.
    """
    if config.data.template == ALPACA:
        return text.alpaca_template()
    if config.data.template != CHAT:
        return text.format_template(config.data.template)
    language = read_language(config.data.tokenizer)
    if language.template is None:
        raise ValueError(
            f"{config.data.tokenizer} has no chat template: set config.data.template to a format "
            "string with {prompt} and {response}"
        )
    written, source = language.template
    return text.chat_template(written, language.special, source)
