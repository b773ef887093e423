"""Rows of tokens: nothing is predicted twice, nothing is lost without a word."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.data import text
from tests import letters

pytest.importorskip("tokenizers", reason="needs the extra `text`")

END = letters.END
DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=40), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def encoder():
    return text.Encoder(letters.tokenizer(), END)


@given(DOCUMENTS, st.integers(2, 17))
@settings(deadline=None)
def test_windows_predict_each_token_of_the_stream_once(documents, length):
    rows = text.pack(documents, length, END)
    stream = [token for document in documents for token in [*document, END]]
    assert rows.tokens.shape == rows.answer.shape and rows.tokens.shape[1] == length
    assert rows.tokens.dtype == np.int32 and rows.answer.dtype == bool
    assert not rows.answer[:, 0].any()
    assert rows.tokens[rows.answer].tolist() == stream[1:]
    assert rows.tokens[0, 0] == stream[0]
    # What is before an answer in its row is what is before it in the stream.
    for window, first in zip(rows.tokens, np.cumsum(rows.answer.sum(1)) - rows.answer.sum(1)):
        start = min(first, max(len(stream) - length, 0))
        assert window.tolist() == (stream[start : start + length] + [END] * length)[:length]


def test_thinning_is_even():
    rows = text.pack([range(1, 100)], 2, END)
    for most in (0, 99, 1000):
        np.testing.assert_array_equal(rows.thinned(most).tokens, rows.tokens)
    assert rows.thinned(4).tokens[:, 0].tolist() == [1, 25, 50, 75]


def test_prompted_rows():
    rows = text.prompted([[5, 6], [7]], [[8, END], [9, 9, END]], 6, END, ["a", "b"])
    assert rows.tokens.tolist() == [[5, 6, 8, END, END, END], [7, 9, 9, END, END, END]]
    assert rows.answer.tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]]


def test_what_does_not_fit_is_counted_or_refused():
    with pytest.warns(UserWarning, match="1 of 2 answers are cut to fit rows of 3 tokens.*of b"):
        rows = text.prompted([[5], [6]], [[7, END], [8, 8, END]], 3, END, ["a", "b"])
    assert rows.answer.tolist() == [[0, 1, 1], [0, 1, 1]] and rows.tokens[1].tolist() == [6, 8, 8]
    with pytest.raises(ValueError, match="b: its prompt of 3 tokens leaves nothing.*data.length"):
        text.prompted([[5], [6] * 3], [[7], [8]], 3, END, ["a", "b"])
    for prompt, answer, problem in (([], [1], "prompt"), ([1], [], "answer")):
        with pytest.raises(ValueError, match=f"a: the {problem} is empty"):
            text.prompted([prompt], [answer], 9, END, ["a"])


def test_streams_that_hold_nothing():
    with pytest.raises(ValueError, match="document 1 is empty"):
        text.pack([[1], []], 4, END)
    with pytest.raises(ValueError, match="no documents"):
        text.pack([], 4, END)
    with pytest.raises(ValueError, match="window of 1 tokens"):
        text.pack([[1]], 1, END)


def test_format_templates():
    made = text.format_template("{{Q}} {prompt} ({topic}):{response}!")
    assert made.fields == ("prompt", "topic", "response") and not made.written_out
    example = {"prompt": "a {b}", "topic": "x", "response": "c"}
    assert made.render(example) == ("{Q} a {b} (x):", "c!")
    spaced = text.format_template("{prompt}:  {response}\n")
    assert spaced.render({"prompt": "a ", "response": "b"}) == ("a :", "  b\n")
    assert text.format_template("{text}").render({"text": "all"}) == ("all", "")
    for bad in ("{prompt.__class__}", "{0}", "{prompt!r}", "{prompt:>9}", "{}", "{prompt"):
        with pytest.raises(ValueError, match="template"):
            text.format_template(bad)


CHAT = (
    "{% for message in messages %}\n<|user|>{{ message['role'] }}: {{ message.content }}"
    "{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def test_chat_templates_and_the_end_of_an_answer(encoder):
    pytest.importorskip("jinja2")
    made = text.chat_template(CHAT, {"eos_token": "<|end|>"})
    assert made.render({"prompt": "hi"}) == ("<|user|>user: hi<|end|>\n<|user|>assistant: ", "")
    example = {"prompt": "hi", "response": "ho"}
    assert made.render(example)[1] == "ho<|end|>\n"
    (prompt,), (answer,) = text.encode_prompted([example], ["a"], made, encoder)
    assert prompt[0] == letters.USER and prompt.count(END) == 1
    assert encoder.tokenizer.decode(answer) == "ho" and answer.count(END) == 1 and answer[-1] == END
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert text.chat_template(marked).render(example) == ("hi", "ho")


def test_what_a_chat_template_may_name():
    """Tools and documents are there, and None; the date is not, so that no text is of its day."""
    pytest.importorskip("jinja2")
    given = "{% if tools is none and documents is none %}none {% endif %}"
    date = "{{ strftime_now('%Y') if strftime_now is defined else 'some day' }} "
    written = "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}"
    escaped = "{{ messages[0].content | tojson(True) }}"
    example = {"prompt": "<é>"}
    assert text.chat_template(given + date + written + escaped).render(example)[0] == (
        'none some day {"content":"<é>","role":"user"}"<\\u00e9>"'
    )


def test_chat_templates_that_do_not_serve(monkeypatch):
    pytest.importorskip("jinja2")
    example = {"prompt": "hi", "response": "ho"}
    with pytest.raises(ValueError, match="not one of Jinja"):
        text.chat_template("{% for %}")
    with pytest.raises(ValueError, match="refuses a conversation: no system"):
        text.chat_template("{{ raise_exception('no system') }}").render(example)
    with pytest.raises(ValueError, match="refuses a conversation"):
        text.chat_template("{{ messages.__class__.__mro__[1].__subclasses__() }}").render(example)
    for wrong in ("{{ messages + 1 }}", "{{ 1 // 0 }}", "{{ range(10 ** 9) }}"):
        with pytest.raises(ValueError, match="^x.jinja: the chat template refuses.*Error: "):
            text.chat_template(wrong, source="x.jinja").render(example)
    changing = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="writes a question as '1hi'"):
        text.chat_template(changing).render(example)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2: pip install -e '\.\[text\]'"):
        text.chat_template(CHAT)


def test_an_answer_ends_once(encoder):
    made = text.format_template("{prompt}={response}")
    examples = [{"prompt": "1", "response": x} for x in ("2", "2<|end|>", "2<|end|>\n\n")]
    prompts, answers = text.encode_prompted(examples, "abc", made, encoder)
    assert answers[0] == answers[1] == answers[2] and answers[0][-1] == END
    whole = text.encode_whole(examples, "abc", made, encoder)
    assert whole == [[*prompts[0], *answers[0][:-1]]] * 3
    (more,) = text.encode_whole([{"prompt": "1", "response": "2<|end|>3"}], "a", made, encoder)
    assert encoder.tokenizer.decode(more) == "1=23"
    assert encoder.tokenizer.decode(prompts[0]) == "1="


def test_a_token_for_the_beginning_is_set_once(encoder):
    import tokenizers

    begins = letters.tokenizer()
    begins.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", letters.USER)]
    )
    begun = text.Encoder(begins, END)
    made = text.format_template("{prompt}={response}")
    example = [{"prompt": "1", "response": "2"}]
    (prompt,), (answer,) = text.encode_prompted(example, "a", made, begun)
    (plain,), (same,) = text.encode_prompted(example, "a", made, encoder)
    assert prompt == [letters.USER, *plain] and answer == same
    (prompt,), _ = text.encode_prompted(example, "a", made._replace(written_out=True), begun)
    assert prompt == plain


@pytest.mark.parametrize("before", ["prepend", "first", "always"])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("to?", " Paris to"),
        ("to:\n", "Paris"),
        ("[/a]", "Paris"),
        ("to:", "\n\nto"),
        ("<s>to</s>", "Paris"),
        ("<s>[a] to [/a]", " Paris </s>"),
    ],
)
def test_answers_are_the_tokens_of_the_whole_text(before, prompt, answer):
    """Nor is there a space before them, which some tokenizers put before all that they encode."""
    tokenizer = letters.sentence_pieces(before)
    out = prompt.startswith("<s>")
    made = text.Template((), lambda _: (prompt, answer), written_out=out)
    (ids,), (reply,) = text.encode_prompted([{}], ["a"], made, text.Encoder(tokenizer, 2))
    assert ids == tokenizer.encode(prompt, add_special_tokens=not out).ids
    whole = tokenizer.encode(prompt + answer, add_special_tokens=not out).ids
    assert [*ids, *reply] == (whole if whole[-1] == 2 else [*whole, 2])


@pytest.mark.parametrize("before", ["prepend", "first", "always"])
@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("to: ", "Paris", ["Paris"]),
        ("to: ", " to", ["▁to"]),
        ("to:", ") to", [")", "▁to"]),
        ("?P", "aris", ["a", "r", "i", "s"]),
        ("to:", "", []),
    ],
)
def test_answers_whose_beginning_is_no_token_of_the_whole_text(before, prompt, answer, expected):
    """A prompt is what a model is asked, so that no token has parts of both."""
    tokenizer = letters.sentence_pieces(before)
    made = text.Template((), lambda _: (prompt, answer))
    (ids,), (reply,) = text.encode_prompted([{}], ["a"], made, text.Encoder(tokenizer, 2))
    assert ids == tokenizer.encode(prompt).ids
    assert [tokenizer.id_to_token(i) for i in reply] == expected + ["</s>"] * bool(answer)


def test_values():
    example = {"response": 3.5, "none": None, "blank": " \n", "list": ["a"]}
    assert text.value_of(example, "response", "f:1") == "3.5"
    for field, problem in (
        ("respons", "no field 'respons'. Did you mean 'response'"),
        ("none", "field 'none' holds None"),
        ("list", "which is no text"),
        ("blank", "field 'blank' is empty"),
    ):
        with pytest.raises(ValueError, match=f"f:1: .*{problem}"):
            text.value_of(example, field, "f:1")


def test_tokenizers(tmp_path, monkeypatch):
    made = letters.tokenizer()
    made.enable_padding(length=7)
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    read = text.read_tokenizer(tmp_path / "tokenizer.json")
    assert len(read.encode("four").ids) == 4
    assert text.token_id(read, "<|end|>") == END
    with pytest.raises(ValueError, match=r"no token '<end>'. Did you mean '<\|end\|>'"):
        text.token_id(read, "<end>")
    size = read.get_vocab_size()
    for fitting in (size, size + 20):
        text.check_vocabulary(read, fitting, source="s", model="m")
    for other in (size - 1, size + 40):
        with pytest.raises(ValueError, match=f"tokenizer s has {size} .* model m .* of {other}"):
            text.check_vocabulary(read, other, source="s", model="m")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json is not a tokenizer"):
        text.read_tokenizer(tmp_path / "bad.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[text\]'"):
        text.read_tokenizer(tmp_path / "tokenizer.json")
