"""Examples from a local file."""

import gzip
import json
import math

import numpy as np
import pytest

from fedlora_jax.data import jsonl, own_files, text
from fedlora_jax.data.bad_records import BadRecord
from tests import letters

pytest.importorskip("tokenizers", reason="needs the extra `text`")

TEMPLATE = text.format_template("{prompt}? {response}")


@pytest.fixture(scope="module")
def encoder():
    return text.Encoder(letters.tokenizer(), letters.END)


def write(path, lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return str(path)


def examples(count, **more):
    return [{"prompt": f"What is {i}", "response": f"It is {i}.", **more} for i in range(count)]


def decoded(encoder, texts):
    tokens, answer = texts.arrays["tokens"], texts.arrays["answer"]
    decode = encoder.tokenizer.decode
    return [decode(row[mask].tolist()) for row, mask in zip(tokens, answer)]


def test_an_example_a_row(tmp_path, encoder):
    lines = [{**x, "client": f"c{i % 3}", "domain": "ba"[i % 2]} for i, x in enumerate(examples(9))]
    files = {"federated": write(tmp_path / "x.jsonl", lines), "test": ""}
    splits = {
        split: jsonl.load(split, files, encoder, TEMPLATE, 40, held_out={"test": 0.4})
        for split in ("federated", "test")
    }
    answers = {split: decoded(encoder, texts) for split, texts in splits.items()}
    assert sorted(answers["federated"] + answers["test"]) == [f" It is {i}." for i in range(9)]
    for split, texts in splits.items():
        assert texts.clients == ("c0", "c1", "c2") and texts.domains == ("a", "b")
        for answer, client, domain in zip(
            answers[split], texts.arrays["client"], texts.arrays["domain"]
        ):
            number = int(answer[-2])
            assert client == number % 3 and texts.domains[domain] == "ba"[number % 2]
    tokens = splits["test"].arrays["tokens"]
    assert tokens.shape == (len(answers["test"]), 40)
    assert encoder.tokenizer.decode(tokens[0].tolist()).endswith("?" + answers["test"][0])


def test_equal_texts_are_in_one_split_and_shares_are_kept(tmp_path):
    lines = examples(400) * 2
    files = {"federated": write(tmp_path / "x.jsonl", lines)}
    shares = {"validation": 0.1, "test": 0.3}
    splits = own_files.read_splits(files, TEMPLATE.fields, held_out=shares)
    found = {name: {x.fields["prompt"] for x in members} for name, members in splits.items()}
    assert sum(map(len, splits.values())) == 800 and sum(map(len, found.values())) == 400
    for name, share in shares.items():
        assert abs(len(found[name]) / 400 - share) < 0.06


def test_a_file_for_each_split(tmp_path, encoder):
    files = {
        "federated": write(tmp_path / "a.jsonl", examples(5, client="z", domain="one")),
        "test": write(tmp_path / "b.jsonl", examples(3, client="y", domain="two")),
    }
    train, test = (
        jsonl.load(split, files, encoder, TEMPLATE, 40) for split in ("federated", "test")
    )
    assert len(train.arrays["tokens"]) == 5 and len(test.arrays["tokens"]) == 3
    assert train.clients == test.clients == ("y", "z") and train.domains == ("one", "two")
    assert set(test.arrays["client"]) == {0} and set(train.arrays["client"]) == {1}
    with pytest.raises(ValueError, match="no example of .*a.jsonl is in the split 'validation'"):
        jsonl.load("validation", files, encoder, TEMPLATE, 40)


def test_without_clients_and_domains(tmp_path, encoder):
    files = {"federated": write(tmp_path / "x.jsonl", examples(4))}
    texts = jsonl.load("federated", files, encoder, TEMPLATE, 40, held_out={"test": 0})
    assert "client" not in texts.arrays and texts.clients == () and texts.domains == ("all",)
    assert texts.arrays["domain"].tolist() == [0] * 4
    options = {"held_out": {"test": 0}}
    with pytest.warns(UserWarning, match="^federated: 2 of 4 rows"):
        few = jsonl.load("federated", files, encoder, TEMPLATE, 40, most=2, **options)
    assert decoded(encoder, few) == [" It is 0.", " It is 2."]


def test_packing_keeps_clients_apart(tmp_path, encoder):
    lines = [{**x, "client": "pq"[i % 2]} for i, x in enumerate(examples(6))]
    files = {"federated": write(tmp_path / "x.jsonl", lines)}
    texts = jsonl.load(
        "federated", files, encoder, TEMPLATE, 16, held_out={"test": 0}, packing=True
    )
    for client in (0, 1):
        mine = texts.arrays["client"] == client
        tokens, answer = texts.arrays["tokens"][mine], texts.arrays["answer"][mine]
        wanted = "".join(f"What is {i}? It is {i}." for i in range(client, 6, 2))
        assert encoder.tokenizer.decode(tokens[answer].tolist()) == wanted[1:]
        assert np.sum(tokens[answer] == letters.END) == 3
    with pytest.raises(ValueError, match="no {response}.*config.data.packing"):
        jsonl.load("federated", files, encoder, text.format_template("{prompt}"), 16)


def test_fields_by_other_names(tmp_path):
    lines = [{"question": 7, "response": "y", "context": "c", "who": "me"}]
    path = write(tmp_path / "x.jsonl", lines)
    template = text.format_template("{context}: {prompt} {response}")
    (example,) = jsonl.read(path, template, {"prompt": "question", "client": "who", "domain": ""})
    assert example.fields == {"context": "c", "prompt": "7", "response": "y"}
    assert example.client == "me" and example.domain is None
    with pytest.raises(ValueError, match="'promt'.*Did you mean 'prompt'"):
        jsonl.read(path, template, {"promt": "question"})


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        ("[1]", r"expected an object with fields, got '\[1\]'"),
        ({"prompt": "a", "respons": "b"}, "no field 'response'. Did you mean 'respons'"),
        ({"prompt": "a", "response": ""}, "the text in field 'response' is empty"),
        ({"prompt": None, "response": "b"}, "field 'prompt' holds None"),
        ({"prompt": math.nan, "response": "b"}, "field 'prompt' holds nan, which is no text"),
        ('{"prompt": "a", "response": 1e999}', "field 'response' holds inf, which is no text"),
        ({"prompt": "a", "response": "b", "client": "x"}, "x.jsonl:1: no field 'client'"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, second, problem):
    path = write(tmp_path / "x.jsonl", [*examples(1), "", second])
    line = "" if "x.jsonl" in problem else "x.jsonl:3: "
    with pytest.raises(ValueError, match=line + problem):
        jsonl.read(path, TEMPLATE)


def test_errors(tmp_path, encoder):
    with pytest.raises(FileNotFoundError):
        jsonl.read(tmp_path / "none.jsonl", TEMPLATE)
    with pytest.raises(ValueError, match="empty.jsonl holds no example"):
        jsonl.read(write(tmp_path / "empty.jsonl", [""]), TEMPLATE)
    for name in ("x.jsonl.gz", "x.json", "x.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b"{}"))
        with pytest.raises(ValueError, match=f"{name} is no text in UTF-8"):
            jsonl.read(tmp_path / name, TEMPLATE)
    files = {"federated": write(tmp_path / "x.jsonl", examples(3))}
    for changed, problem in (
        ({"split": "train"}, "unknown split 'train'"),
        ({"files": {"train": "x"}}, "unknown split 'train'"),
        ({"files": {"federated": ""}}, "config.data.files.federated"),
        ({"held_out": {"test": 1.0}}, "leave a rest"),
        ({"length": 9}, r"x.jsonl:\d: its prompt of 10 tokens leaves nothing"),
    ):
        options = {"split": "federated", "files": files, "length": 40, **changed}
        with pytest.raises(ValueError, match=problem):
            jsonl.load(encoder=encoder, template=TEMPLATE, **options)


def test_an_array_and_a_table_are_the_same(tmp_path):
    lines = examples(5, domain="d")
    one = jsonl.read(write(tmp_path / "x.jsonl", lines), TEMPLATE)
    (tmp_path / "x.json").write_text(json.dumps(lines, indent=2), encoding="utf-8-sig")
    rows = [[x["prompt"], f'"{x["response"]}"', "d"] for x in lines]
    table = "\n".join(",".join(row) for row in [["prompt", "response", "domain"], *rows])
    (tmp_path / "x.csv").write_text(table)
    for file, name in (("x.json", "[1]"), ("x.csv", ":2")):
        found = jsonl.read(tmp_path / file, TEMPLATE)
        assert [x[1:] for x in found] == [x[1:] for x in one]
        assert found[0].name == f"{tmp_path / file}{name}"


def test_a_text_in_a_table_may_be_long(tmp_path):
    """Python's own reader of tables takes 128 KiB."""
    long = "x" * (1 << 18)
    (tmp_path / "x.csv").write_text(f"prompt,response\na,{long}\n")
    (found,) = jsonl.read(tmp_path / "x.csv", TEMPLATE)
    assert found.fields["response"] == long


def test_bad_ones_are_skipped_and_counted(tmp_path, encoder):
    long = {"prompt": "p" * 60, "response": "r"}
    lines = [*examples(3), "{", {"prompt": "a"}, {"prompt": " ", "response": "b"}, long]
    files = {"federated": write(tmp_path / "x.jsonl", lines)}
    options = {"held_out": {"test": 0}}
    with pytest.raises(BadRecord, match="x.jsonl:4: not JSON"):
        jsonl.load("federated", files, encoder, TEMPLATE, 40, **options)
    with pytest.warns(UserWarning) as given:
        found = jsonl.load(
            "federated", files, encoder, TEMPLATE, 40, on_bad_record="skip", **options
        )
    assert decoded(encoder, found) == [f" It is {i}." for i in range(3)]
    said = " ".join(str(warning.message) for warning in given)
    for part in (
        "skipped 1 bad record: ",
        "skipped 2 bad records: ",
        "jsonl:4: not JSON",
        ":7: its",
    ):
        assert part in said
    with pytest.raises(ValueError, match="no record that can be used"), pytest.warns(UserWarning):
        jsonl.read(write(tmp_path / "y.jsonl", ["{"]), TEMPLATE, on_bad_record="skip")
    with pytest.raises(ValueError, match="unknown on_bad_record 'ignore'"):
        jsonl.read(files["federated"], TEMPLATE, on_bad_record="ignore")


def test_a_template_with_a_field_that_may_be_empty(tmp_path):
    template = text.alpaca_template()
    lines = [{**x, "context": c} for x, c in zip(examples(4), ["", "some", None, math.nan])]
    found = jsonl.read(write(tmp_path / "x.jsonl", [*lines, *examples(1)]), template)
    rendered = [template.render(x.fields)[0] for x in found]
    assert [x.fields["context"] for x in found] == ["", "some", "", "", ""]
    assert ["### Input:\nsome\n" in x for x in rendered] == [False, True, False, False, False]
