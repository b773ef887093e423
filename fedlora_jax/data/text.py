"""Text as rows of token ids: windows of a stream, or one example with its answer a row.

A row has `tokens` int32 `[T]` and `answer` bool `[T]`: which of them are to be predicted from those
before. The first never is, nor is padding, for which the end-of-text token stands.
"""

import difflib
import json
import math
import os
import string
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fedlora_jax.foreign import reading

_ALL = "all"
# Texts that are encoded at once: an encoding takes much more room than its ids.
AT_ONCE = 2048

Ids: TypeAlias = Sequence[int] | np.ndarray


class Texts(NamedTuple):
    """Rows of a split, and what their numbers mean.

    Attributes:
      arrays: `tokens` int32 `[M, T]`, `domain` int32 `[M]`, and `client` int32 `[M]` where it is
        known whose a row is; for language models `answer` bool `[M, T]`; for classification or
        regression `label` int32 or float32 `[M]`, and `token_types` int32 `[M, T]` where a
        tokenizer tells the texts of a pair apart.
      clients: Names of the clients, in order; none where they are not known.
      domains: Names of the domains, in order.
    """

    arrays: dict[str, np.ndarray]
    clients: tuple[str, ...]
    domains: tuple[str, ...]


def with_owners(
    arrays: Mapping[str, np.ndarray], owners: Sequence[Any], known: Sequence[Any]
) -> Texts:
    """Rows with their clients and domains.

    Args:
      arrays: `[M, ...]`.
      owners: For each row, something with `client` and `domain`: a name, or None if unknown.
      known: The same for all that there is, other splits included: names are of these, sorted.

    Returns:
      The rows; all are of one domain called `all` where none is known.

    Raises:
      ValueError: If only some have clients.
    """
    clients = sorted({each.client for each in known if each.client is not None})
    if clients and any(each.client is None for each in known):
        raise ValueError(f"only some of the examples have clients, such as {clients[0]!r}")
    domains = sorted({each.domain or _ALL for each in known})
    places = {name: place for place, name in enumerate(domains)}
    found = {**arrays, "domain": np.array([places[x.domain or _ALL] for x in owners], np.int32)}
    if clients:
        places = {name: place for place, name in enumerate(clients)}
        found["client"] = np.array([places[x.client] for x in owners], np.int32)
    return Texts(found, tuple(clients), tuple(domains))


class Rows(NamedTuple):
    """Token ids `[M, T]`, and which are to be predicted, bool `[M, T]`."""

    tokens: np.ndarray
    answer: np.ndarray

    def thinned(self, most: int) -> "Rows":
        """At most so many rows, evenly spaced; all if `most` is 0."""
        kept = evenly(len(self.tokens), most)
        return Rows(self.tokens[kept], self.answer[kept])


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of `0 .. count - 1`, evenly spaced; all if `most` is 0."""
    kept = min(count, most) if most else count
    return np.arange(kept) * count // max(kept, 1)


def taken(count: int, most: int, split: str) -> np.ndarray:
    """`evenly` of the rows of a split, with a warning if that leaves any out."""
    if 0 < most < count:
        warnings.warn(
            f"{split}: {most:,} of {count:,} rows are taken, evenly spaced, as "
            f"config.data.rows.{split} says; 0 takes all",
            stacklevel=2,
        )
    return evenly(count, most)


class Encoder(NamedTuple):
    """A tokenizer with what else is needed of it.

    Attributes:
      tokenizer: A `tokenizers.Tokenizer`.
      end: Id of the token that ends a text.
    """

    tokenizer: Any
    end: int

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts, with a token for their beginning if the tokenizer sets one."""
        return self._encode(texts, True)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of what stands within a text, or has all its special tokens written out."""
        return self._encode(texts, False)

    def continuations(self, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Ids of what follows other texts: of the two as one text, those behind the first.

        Where a token of the one text has parts of both (`:)`), the second is encoded behind a line
        break. Tokenizers that put no space before a text, as byte-level ones, need none of it.
        """
        if not _puts_space(self.tokenizer):
            return self.pieces(texts)
        wholes = self.pieces([first + text for first, text in zip(before, texts, strict=True)])
        rests = map(_behind, self.pieces(before), wholes)
        return [rest or self._within(text) for rest, text in zip(rests, texts, strict=True)]

    def _within(self, text: str) -> list[int]:
        line_break, whole, alone = self.pieces(["\n", "\n" + text, text])
        return _behind(line_break, whole) or alone

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [
            encoding.ids
            for start in range(0, len(texts), AT_ONCE)
            for encoding in self.tokenizer.encode_batch(
                list(texts[start : start + AT_ONCE]), add_special_tokens=special
            )
        ]


def _puts_space(tokenizer: Any) -> bool:
    """Whether it begins a text with a space, as SentencePiece's do: `Paris` is `▁Paris`."""
    text = "a"
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text != "a"


def _behind(first: list[int], whole: list[int]) -> list[int]:
    """What is behind the first ids; nothing if the whole does not begin with them."""
    return whole[len(first) :] if whole[: len(first)] == first else []


def read_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a `tokenizer.json`; it neither pads nor cuts.

    Raises:
      ImportError: If the extra `text` is not installed.
      FileNotFoundError: If there is no such file.
      ValueError: If it is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs a tokenizer: pip install -e '.[text]'") from error
    with reading(path, "a tokenizer"):
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def padded(
    tokenizer: Any, pad: int, texts: Sequence[tuple[str, ...]], length: int
) -> dict[str, np.ndarray]:
    """Texts, or pairs of texts, as an encoder such as BERT reads them.

    Special tokens are those of the tokenizer's own post-processor. What is longer than a row is
    cut, of a pair the longer text first.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      pad: Id of the padding token.
      texts: One or two each.
      length: T, tokens of a row.

    Returns:
      `tokens` int32 `[M, T]`, and `token_types` int32 `[M, T]` if the tokenizer marks the second
      text of a pair, as BERT's does and RoBERTa's does not.

    Raises:
      ValueError: If the special tokens alone fill a row.
    """
    if not texts:
        raise ValueError("there are no texts")
    each = len(texts[0])
    needed = tokenizer.num_special_tokens_to_add(each == 2) + each
    if length < needed:
        raise ValueError(f"a row of {length} tokens holds no text: use {needed} or more")
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.enable_truncation(length, strategy="longest_first")
    own.enable_padding(length=length, pad_id=pad, pad_token=own.id_to_token(pad))
    tokens = np.empty((len(texts), length), np.int32)
    types = np.zeros_like(tokens)
    for start in range(0, len(texts), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        found = own.encode_batch([x if each == 2 else x[0] for x in texts[some]])
        tokens[some] = [encoding.ids for encoding in found]
        types[some] = [encoding.type_ids for encoding in found]
    return {"tokens": tokens, "token_types": types} if types.any() else {"tokens": tokens}


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a token.

    Raises:
      ValueError: If the tokenizer does not have it; it names the nearest one.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(
            f"the tokenizer has no token {token!r}.{_nearest(token, _special(tokenizer))}"
        )
    return found


def _special(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def check_vocabulary(tokenizer: Any, vocab_size: int, *, source: str, model: str) -> None:
    """Checks that a model has an embedding for each token, and a tokenizer for most of those.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      vocab_size: Token ids that the model knows; often a few more, to be a round number.
      source: Where the tokenizer is from.
      model: The model's name.

    Raises:
      ValueError: If an id of the tokenizer is not below `vocab_size`, or it has fewer than nine
        tenths as many tokens: then it is another model's.
    """
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if size > vocab_size or size < 0.9 * vocab_size:
        raise ValueError(
            f"the tokenizer {source} has {size} tokens, but the model {model} a vocabulary of "
            f"{vocab_size}: they do not belong together"
        )


def pack(documents: Iterable[Ids], length: int, end: int) -> Rows:
    """Windows over documents joined to one stream, each followed by the end-of-text token.

    Neighbouring windows share a token, the last of one and the first of the next, so that every
    token of the stream but its first is predicted once. The last window begins earlier, so that it
    is full, and predicts only what the one before does not. A stream shorter than a window is
    padded.

    Args:
      documents: Token ids.
      length: T, tokens of a window.
      end: Id of the end-of-text token.

    Raises:
      ValueError: If a document is empty, there is none, or a window has fewer than two tokens.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens has none to be predicted")
    pieces = []
    for index, document in enumerate(documents):
        if not len(document):
            raise ValueError(f"document {index} is empty")
        pieces += [np.asarray(document, np.int32), np.array([end], np.int32)]
    if not pieces:
        raise ValueError("there are no documents")
    stream = np.concatenate(pieces)
    count = len(stream)
    new = 1 + (length - 1) * np.arange(-(-(count - 1) // (length - 1)))
    first = np.minimum(new - 1, max(count - length, 0))
    places = first[:, None] + np.arange(length)
    padded = np.pad(stream, (0, max(length - count, 0)), constant_values=end)
    return Rows(padded[places], (places >= new[:, None]) & (places < count))


def prompted(
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    length: int,
    end: int,
    names: Sequence[str],
) -> Rows:
    """One example a row: a prompt, the answer that is to be predicted, and padding.

    What does not fit is cut from the end of the answer, with one warning that counts.

    Args:
      prompts: Token ids.
      answers: Token ids, with whatever ends an answer.
      length: T, tokens of a row.
      end: Id of the end-of-text token, which pads.
      names: What to call each example.

    Raises:
      ValueError: If a prompt or an answer is empty, or nothing of an answer is left; it names the
        first such example.
    """
    tokens = np.full((len(prompts), length), end, np.int32)
    answer = np.zeros((len(prompts), length), bool)
    cut = []
    for row, (prompt, reply, name) in enumerate(zip(prompts, answers, names, strict=True)):
        check_fits(prompt, reply, length, name)
        whole = [*prompt, *reply]
        if len(whole) > length:
            cut.append(name)
        kept = min(len(whole), length)
        tokens[row, :kept] = whole[:kept]
        answer[row, len(prompt) : kept] = True
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(prompts)} answers are cut to fit rows of {length} tokens, first "
            f"that of {cut[0]}",
            stacklevel=2,
        )
    return Rows(tokens, answer)


def check_fits(prompt: Ids, answer: Ids, length: int, name: str) -> None:
    """Checks that a row holds an example's prompt, and something of its answer.

    Raises:
      ValueError: If not, or if one of them is empty.
    """
    if not len(prompt) or not len(answer):
        raise ValueError(f"{name}: the {'answer' if len(prompt) else 'prompt'} is empty")
    if len(prompt) >= length:
        raise ValueError(
            f"{name}: its prompt of {len(prompt)} tokens leaves nothing of the answer in a row "
            f"of {length}. Use longer rows (config.data.length), or leave it out"
        )


class Template(NamedTuple):
    """How an example becomes text.

    Attributes:
      fields: Names of the fields it needs.
      render: From these to the prompt and the answer.
      written_out: Whether special tokens are in the text, so that none is to be added.
      optional: Names of fields that may be empty or not there.
    """

    fields: tuple[str, ...]
    render: Callable[[Mapping[str, str]], tuple[str, str]]
    written_out: bool = False
    optional: tuple[str, ...] = ()


def format_template(text: str) -> Template:
    """A template from a format string: `"Question: {prompt}\\nAnswer: {response}"`.

    The answer begins where `{response}` stands, or at spaces before it, for a space and the word
    after it are one token; without `{response}` all is prompt. Braces are doubled to be meant
    themselves. A field stands by its name alone.

    Raises:
      ValueError: On anything else between braces.
    """
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}") from None
    for _, field, form, conversion in pieces:
        if field is not None and (not field.isidentifier() or form or conversion):
            raise ValueError(f"template {text!r}: expected the name of a field, got {field!r}")
    fields = tuple(dict.fromkeys(field for _, field, _, _ in pieces if field is not None))

    def render(values: Mapping[str, str]) -> tuple[str, str]:
        parts = ["", ""]
        part = 0
        for literal, field, _, _ in pieces:
            parts[part] += literal
            if field == "response":
                part = 1
            parts[part] += "" if field is None else values[field]
        prompt, answer = parts
        if part:
            prompt = prompt.rstrip(" ")
            answer = parts[0][len(prompt) :] + answer
        return prompt, answer

    return Template(fields, render)


def alpaca_template() -> Template:
    """The template of Stanford Alpaca (Taori et al., 2023), which much was trained with since.

    It is of `prompt`, `context` (which may be empty, and then the template is another) and
    `response`.
    """

    def render(values: Mapping[str, str]) -> tuple[str, str]:
        context = values.get("context", "")
        given = ", paired with an input that provides further context" if context.strip() else ""
        return (
            f"Below is an instruction that describes a task{given}. Write a response that "
            f"appropriately completes the request.\n\n### Instruction:\n{values['prompt']}\n\n"
            + f"### Input:\n{context}\n\n" * bool(given)
            + "### Response:",
            values.get("response", ""),
        )

    return Template(("prompt", "response"), render, optional=("context",))


def chat_template(
    text: str, special: Mapping[str, str] | None = None, source: str | None = None
) -> Template:
    """A model's own template of a conversation, in Jinja, as a template of `prompt` and `response`.

    Rendered as transformers does: the prompt is a conversation of one question, up to where the
    assistant's answer begins, and the answer what follows when that is in it. Tools and documents
    are None. Unlike there, `strftime_now` is not defined: a template that asks takes its own date,
    and no text depends on the day on which it is made.

    Args:
      text: The Jinja template.
      special: Tokens that it may name: `bos_token`, `eos_token`.
      source: Where it is from, for errors.

    Raises:
      ImportError: If jinja2 is not installed (extra `text`).
      ValueError: If it is not a template, or (when rendered) fails or refuses a conversation.
    """
    called = f"{source}: the chat template" if source else "the chat template"
    jinja2 = _jinja()
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(jinja2), "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(text)
    except Exception as error:
        raise ValueError(f"{called} is not one of Jinja: {_reason(error)}") from error
    given = {"tools": None, "documents": None, **(special or {})}

    def conversation(messages: list[dict[str, str]], begun: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=begun, **given)
        except Exception as error:
            raise ValueError(f"{called} refuses a conversation: {_reason(error)}") from error

    def render(values: Mapping[str, str]) -> tuple[str, str]:
        question = {"role": "user", "content": values["prompt"]}
        prompt = conversation([question], True)
        if "response" not in values:
            return prompt, ""
        answer = {"role": "assistant", "content": values["response"]}
        whole = conversation([question, answer], False)
        if not whole.startswith(prompt):
            raise ValueError(
                f"{called} writes a question as {prompt!r} where an answer is to follow, "
                f"and as {whole[: len(prompt)]!r} where it does"
            )
        return prompt, whole[len(prompt) :]

    return Template(("prompt", "response"), render, written_out=True)


def _jinja() -> ModuleType:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(
            "a model's own chat template needs jinja2: pip install -e '.[text]'"
        ) from error
    return jinja2


def _reason(error: Exception) -> str:
    """What a template does wrong raises errors of any kind; those of Jinja speak for themselves."""
    known = isinstance(error, _jinja().TemplateError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as transformers has it; Jinja's own escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _generation_tag(jinja2: ModuleType) -> type:
    """Templates may mark what an assistant says by `{% generation %}`; here it stays as it is."""

    class Generation(jinja2.ext.Extension):  # type: ignore[name-defined]
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def value_of(example: Mapping[str, Any], field: str, name: str) -> str:
    """The text in a field of an example; numbers are written out.

    Raises:
      ValueError: If there is no such field, or it is neither text nor finite number, or empty; it
        names the example, and the nearest field.
    """
    if field not in example:
        raise ValueError(
            f"{name}: no field {field!r}.{_nearest(field, example)} Fields: {', '.join(example)}"
        )
    value = example[field]
    endless = isinstance(value, float) and not math.isfinite(value)
    if endless or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: field {field!r} holds {value!r}, which is no text")
    if not str(value).strip():
        raise ValueError(f"{name}: the text in field {field!r} is empty")
    return str(value)


def _nearest(name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def encode_prompted(
    examples: Sequence[Mapping[str, str]],
    names: Sequence[str],
    template: Template,
    encoder: Encoder,
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers as token ids: prompts by themselves, as a model is asked, answers as they
    are written behind them.

    An answer ends with the end-of-text token, whatever the template writes after it.

    Raises:
      ValueError: If the template refuses an example; it names that.
    """
    texts = _rendered(examples, names, template)
    encode = encoder.pieces if template.written_out else encoder.documents
    prompts = [prompt for prompt, _ in texts]
    answers = encoder.continuations(prompts, [answer for _, answer in texts])
    ended = [[*_without_end(ids, encoder), encoder.end] if ids else ids for ids in answers]
    return encode(prompts), ended


def encode_whole(
    examples: Sequence[Mapping[str, str]],
    names: Sequence[str],
    template: Template,
    encoder: Encoder,
) -> list[list[int]]:
    """Prompts with their answers as token ids, without a token for their end.

    Raises:
      ValueError: As `encode_prompted`.
    """
    texts = [prompt + answer for prompt, answer in _rendered(examples, names, template)]
    encode = encoder.pieces if template.written_out else encoder.documents
    return [_without_end(ids, encoder) for ids in encode(texts)]


def _rendered(
    examples: Sequence[Mapping[str, str]], names: Sequence[str], template: Template
) -> list[tuple[str, str]]:
    texts = []
    for example, name in zip(examples, names, strict=True):
        try:
            texts.append(template.render(example))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return texts


def _without_end(ids: list[int], encoder: Encoder) -> list[int]:
    """Ids up to a last end-of-text token after which there is nothing but white space."""
    if encoder.end not in ids:
        return ids
    last = len(ids) - 1 - ids[::-1].index(encoder.end)
    return ids if encoder.tokenizer.decode(ids[last + 1 :]).strip() else ids[:last]
