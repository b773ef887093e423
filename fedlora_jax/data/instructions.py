"""Published instruction data sets, prepared beforehand: a prompt, a response, and often a kind.

`DATASETS` says what each calls these. A data set without a split for validation or testing is split
here by a hash, so that equal prompts, or the variants of one question, are in one split.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedlora_jax.data import jsonl, sources, text
from fedlora_jax.data.bad_records import read_each
from fedlora_jax.data.held_out import split_of
from fedlora_jax.data.own_files import Example
from fedlora_jax.data.text import Encoder, Template, Texts
from fedlora_jax.names import lookup


class Fields(NamedTuple):
    """What a data set calls the parts of an example.

    Attributes:
      prompt: The question or instruction.
      response: What is to be answered.
      context: What the instruction is about; often empty. None for a data set without.
      domain: The kind of example, or None.
      group: Examples equal in this are in one split; by default the prompt.
    """

    prompt: str
    response: str
    context: str | None = None
    domain: str | None = None
    group: str | None = None


DATASETS = {
    "gsm8k": Fields("question", "answer"),
    "metamathqa": Fields("query", "response", domain="type", group="original_question"),
    # Its conversations have several turns: the first question of a user, and the answer to it.
    "code_feedback": Fields("user", "assistant"),
    "alpaca": Fields("instruction", "output", context="input"),
    "databricks_dolly": Fields("instruction", "response", context="context", domain="category"),
}


def load(
    dataset: str,
    split: str,
    encoder: Encoder,
    template: Template,
    length: int,
    *,
    held_out: Mapping[str, float] | None = None,
    packing: bool = False,
    most: int = 0,
    on_bad_record: str = "stop",
    data_dir: str | os.PathLike[str] | None = None,
) -> Texts:
    """The rows of a split of a prepared data set.

    The template is of `prompt`, `response` and, if it names that, `context`; if it does not, a
    context stands in the prompt after a blank line.

    Args:
      dataset: A name in `DATASETS`.
      split: A split of the data set in the language of TFDS; or `'federated'`, or one of
        `held_out` that the data set does not have: these are made of its split `train`.
      encoder: As for `jsonl.rows`.
      template: As for `jsonl.rows`.
      length: As for `jsonl.rows`.
      held_out: From split to its share of `train`; the rest is federated.
      packing: As for `jsonl.rows`.
      most: As for `jsonl.rows`.
      on_bad_record: As for `read_each`.
      data_dir: As for `sources.load`.

    Returns:
      Rows with the domain of each: its kind, if the data set says that.

    Raises:
      FileNotFoundError: If the data set is not prepared.
      ValueError: If there is no such data set or split, nothing is in the split, or as
        `jsonl.rows`.
    """
    jsonl.check_template(template, packing)
    called = lookup(DATASETS, dataset, "instruction data set")
    published = sources.info(dataset, data_dir).splits
    shares = {name: x for name, x in (held_out or {}).items() if name not in published}
    own = split != "federated" and split not in shares
    source = split if own else "train"
    separate = "context" in (*template.fields, *template.optional)

    def example(item: tuple[str, Mapping[str, Any]]) -> Example:
        name, record = item
        texts = _texts(record, name)
        prompt = text.value_of(texts, called.prompt, name)
        context = texts[called.context] if called.context else ""
        if context.strip() and not separate:
            prompt = f"{prompt}\n\n{context}"
        fields = {
            "prompt": prompt,
            "context": context,
            "response": text.value_of(texts, called.response, name),
            "group": texts[called.group or called.prompt],
        }
        kind = text.value_of(texts, called.domain, name) if called.domain else None
        return Example(name, fields, None, kind)

    known = read_each(sources.records(dataset, source, data_dir), example, on_bad_record)
    members = [x for x in known if own or split_of(x.fields["group"].encode(), shares) == split]
    if not members:
        raise ValueError(f"no example of {dataset} is in the split {split!r}")
    return jsonl.rows(
        split,
        members,
        known,
        encoder,
        template,
        length,
        packing=packing,
        most=most,
        on_bad_record=on_bad_record,
    )


def _texts(record: Mapping[str, Any], name: str) -> dict[str, str]:
    """The texts of a record, and of a conversation the first question and its answer."""
    found = {key: value.decode() for key, value in record.items() if isinstance(value, bytes)}
    if "messages" not in record:
        return found
    turns = [
        (role.decode(), content.decode())
        for role, content in zip(record["messages"]["role"], record["messages"]["content"])
    ]
    for (role, question), (next_role, answer) in zip(turns, turns[1:]):
        if (role, next_role) == ("user", "assistant"):
            return {**found, "user": question, "assistant": answer}
    raise ValueError(f"{name}: no question of a user is followed by an answer of an assistant")
