"""Texts with labels in files of one's own, and what an encoder reads of them."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.data import labelled_texts, text
from fedlora_jax.data.labelled_texts import Reader
from tests import letters

pytest.importorskip("tokenizers", reason="needs the extra `text`")

ROWS = [
    {"text": f'"{i}", a\nb\t{"x" * (i % 5)}', "label": "cab"[i % 3], "client": f"c{i % 2}"}
    for i in range(30)
]


@pytest.fixture(scope="module")
def reader():
    return Reader(letters.bert(), 0, 24)


def write(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def load(path, reader, split="federated", **options):
    options = {"texts": ("text",), "held_out": {"test": 0}, **options}
    return labelled_texts.load_files(split, {"federated": str(path)}, reader, **options)


def same(found, wanted):
    assert found[1:] == wanted[1:]
    for name in wanted.arrays:
        np.testing.assert_array_equal(found.arrays[name], wanted.arrays[name])


def test_four_forms_of_a_file(tmp_path, reader):
    found = load(write(tmp_path / "x.csv", ROWS), reader)
    assert found.clients == ("c0", "c1") and found.domains == ("all",)
    assert found.arrays["label"].tolist() == [(2, 0, 1)[i % 3] for i in range(30)]
    decode = reader.tokenizer.decode
    assert [decode(x.tolist()) for x in found.arrays["tokens"]] == [x["text"] for x in ROWS]
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    write(tmp_path / "x.tsv", ROWS, "\t")
    for kind in ("json", "jsonl", "tsv"):
        same(load(tmp_path / f"x.{kind}", reader), found)


def test_held_out_and_thinned(tmp_path, reader):
    path = write(tmp_path / "x.csv", ROWS * 2)
    parts = [load(path, reader, split, held_out={"test": 0.4}) for split in ("federated", "test")]
    sides = [{tuple(x) for x in part.arrays["tokens"].tolist()} for part in parts]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30
    with pytest.warns(UserWarning, match=r"^federated: 4 of 60 rows .*config.data.rows.federated"):
        few = load(path, reader, most=4).arrays["tokens"]
    np.testing.assert_array_equal(few, load(path, reader).arrays["tokens"][::15])


def test_numbers(tmp_path, reader):
    rows = [{"a": "x", "b": f"y{i}", "score": i / 4} for i in range(5)]
    path = write(tmp_path / "x.csv", rows)
    options = {"texts": ("a", "b"), "numbers": True, "fields": {"label": "score"}}
    found = load(path, reader, **options)
    assert found.arrays["label"].dtype == np.float32
    assert found.arrays["label"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.arrays["token_types"].max() == 1
    write(tmp_path / "x.csv", [*rows, {"a": "x", "b": "y", "score": "much"}])
    with pytest.raises(ValueError, match="x.csv:7: label 'much' is no number"):
        load(path, reader, **options)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1", "01", "0", "1 ", "001", "+1"], ("0", "+1", "001", "01", "1", "1 ")),
    ],
)
def test_classes_in_order(tmp_path, labels, wanted):
    path = write(tmp_path / "x.csv", [{"text": "t", "label": x} for x in labels])
    names = labelled_texts.class_names_of_files({"federated": path}, texts=("text",))
    assert names == wanted


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("text,label\na,1\nb\n", r"x.csv:3: 1 fields, but the header names 2"),
        ("text,label\na,1\n,2\n", r"x.csv:3: the text in field 'text' is empty"),
        ("test,label\na,1\n", "x.csv:2: no field 'text'. Did you mean 'test'. Fields: test,"),
        ('text,label\n"a\nb",1\n"c"d,1\n', "x.csv:4: "),
        ("text,label\na,1\nb,2\nc,\n", r"x.csv:4: the text in field 'label' is empty"),
        ("text,text\na,1\n", "must name each column, once"),
        ("text,label\n", "holds no example"),
        ("", "holds no example"),
        (b"text,label\n\xff\xfe,1\n", "is no text in UTF-8"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, reader, content, problem):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=problem):
        load(path, reader)


def test_an_unknown_class(tmp_path, reader):
    files = {
        "federated": write(tmp_path / "a.csv", [{"text": "t", "label": "cat"}] * 3),
        "test": write(tmp_path / "b.csv", [{"text": "t", "label": x} for x in ("cat", "cats")]),
    }
    with pytest.raises(ValueError, match="b.csv:3: unknown class 'cats'. Did you mean 'cat'"):
        labelled_texts.load_files("test", files, reader, texts=("text",))
    with pytest.warns(UserWarning, match="skipped 1 bad record: .*b.csv:3"):
        found = labelled_texts.load_files(
            "test", files, reader, texts=("text",), on_bad_record="skip"
        )
    assert found.arrays["label"].tolist() == [0]
    found = labelled_texts.load_files(
        "test", files, reader, texts=("text",), classes=("cats", "cat")
    )
    assert found.arrays["label"].tolist() == [1, 0]


BYTES = st.text("abc", min_size=1, max_size=30)


@given(st.lists(st.tuples(BYTES, BYTES), min_size=1, max_size=4), st.integers(5, 40))
@settings(deadline=None, max_examples=50)
def test_pairs_are_cut_at_the_longer_text(pairs, length):
    """Special tokens stay, padding is at the end, and of the longer text more is lost."""
    for tokenizer, pad, special in ((letters.bert(), 0, 3), (letters.roberta(), 1, 4)):
        if length < special + 2:
            with pytest.raises(ValueError, match=f"use {special + 2} or more"):
                text.padded(tokenizer, pad, pairs, length)
            continue
        found = text.padded(tokenizer, pad, pairs, length)
        assert ("token_types" in found) == (pad == 0)
        for row, (a, b) in zip(found["tokens"], pairs):
            kept = tokenizer.decode(row.tolist(), skip_special_tokens=False)
            middle = "[SEP]" if pad == 0 else "</s></s>"
            first, second = kept.replace("[PAD]", "").replace("<pad>", "").split(middle)[:2]
            first = first.removeprefix("[CLS]").removeprefix("<s>")
            second = second.removesuffix("</s>")
            assert a.startswith(first) and b.startswith(second)
            room = length - special
            assert len(first) + len(second) == min(room, len(a) + len(b))
            lost = len(a) - len(first), len(b) - len(second)
            if lost[0] and len(a) < len(b):
                assert abs(len(first) - len(second)) <= 1
            assert (row != pad).sum() == len(first) + len(second) + special
            assert not (row[(row != pad).sum() :] != pad).any()
